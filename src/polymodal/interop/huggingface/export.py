"""A model of ours as a stock folder of transformers, without remote code: weights, processor, prompts, card.

`export_class` says which class it is and gives configuration and weights, `export_chat_template` tokenizer and chat
template; here they become files, with the image rules as `preprocessor_config.json`. Everything is checked before the
first tensor is written, and the folder appears whole or not at all. Names of weights are those of published folders
("hub"), which transformers, vLLM and llama.cpp's converters read; transformers' own `save_pretrained` writes others.
"""

import json
from collections.abc import Iterable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from polymodal.checkpoints.model_folder import ADAPTER_NAME, Loaded
from polymodal.config import RESAMPLE_FILTERS, ImageConfig, ModelConfig
from polymodal.errors import CheckpointError
from polymodal.interop.huggingface import export_class
from polymodal.interop.huggingface.export_card import copy_licences, origins, write_card
from polymodal.interop.huggingface.export_chat_template import check_plain_prompt, stock_template, with_placeholder
from polymodal.interop.huggingface.weight_names import Place, Style, to_stock
from polymodal.interop.huggingface.weights import INDEX_NAME
from polymodal.modeling.lora import fold_in, is_peft, merge_adapter, untie
from polymodal.modeling.projectors.mlp import Standardize
from polymodal.modeling.projectors.qformer_files import TOKENIZER_FOLDER
from polymodal.modeling.vlm import MultimodalLM
from polymodal.processing.chat_template.encode import ChatTemplate
from polymodal.safety.model_folder import CLASSES
from polymodal.utils.files import atomic_folder, write_text


@dataclass(frozen=True)
class Exported:
    """What was written."""

    folder: Path  # Where
    family: str  # The `model_type` of its `config.json`
    image_token_id: int  # The placeholder's id there
    rows: int  # Rows of its vocabulary
    weight_bytes: int  # Size of its weights
    remarks: tuple[str, ...]  # What is not quite as here, or was done on the way, in words


def export_hf(
    loaded: Loaded,
    dst: Path,
    *,
    merge_lora: bool = True,
    dtype: torch.dtype | None = None,
    style: Style = "hub",
    max_shard_bytes: int = 5_000_000_000,
    licences: Path | None = None,
    replace: bool = False,
) -> Exported:
    """Write a model as a stock folder.

    Args:
        loaded: The model. With `merge_lora` its adapter is added to its weights in memory too.
        dst: Where to; appears whole or not at all.
        merge_lora: Add a LoRA adapter to the weights; otherwise it is written to `adapter/` in peft's layout, with
            the names of the stock class, for `PeftModel.from_pretrained`.
        dtype: Of the weights on disk; None takes the language model's.
        style: The spelling of the weights' names.
        max_shard_bytes: The largest file of weights; a single larger tensor has a file of its own.
        licences: The folder that the model came from: its licence files are copied, its card says its licence.
        replace: Overwrite a folder that is there.

    Returns:
        What was written.

    Raises:
        CheckpointError: The stock class cannot express the model; lists every reason.
        PolymodalError: The folder exists and `replace` is false, or cannot be written.
    """
    model, config = loaded.model, loaded.config
    family = export_class.stock_family(config)
    export_class.refuse(
        f"this model cannot be written as a {CLASSES[family]}", export_class.reasons_against(model, config, family)
    )
    adapted, kept = is_peft(model.llm), is_peft(model.llm) and not merge_lora
    if kept:
        merge_adapter(model, False)
        untie(model.llm)  # whoever merges it elsewhere must not change the embeddings through a tied head
    elif adapted:
        fold_in(model.llm)
    dtype = dtype or model.llm.get_input_embeddings().weight.dtype

    tokenizer, image_id, remarks = with_placeholder(loaded.tokenizer, model.image_token_id)
    # Answers are written on at the right; an encoder may end in padding, and BLIP-2's image comes before it.
    tokenizer.padding_side = tokenizer.init_kwargs["padding_side"] = "right" if model.encoder_decoder else "left"
    had = [len(table.weight) for table in export_class.token_tables(model.llm)]
    rows = max(*had, len(tokenizer))
    if rows > min(had):
        remarks.append(f"the vocabulary has {rows} rows instead of {min(had)}: a new row is the mean of the others")
    ours = ChatTemplate(loaded.tokenizer, config.template, model.image_token_id)
    jinja: str | None = None
    if family in export_class.BLIP:
        remarks += check_plain_prompt(ours, config.template, tokenizer, image_id)
    else:
        jinja, tokenizer, differences = stock_template(ours, config.template, tokenizer, image_id)
        remarks += differences
    tokenizer.chat_template = jinja
    if adapted:
        how = "lies in adapter/; PeftModel.from_pretrained(model, FOLDER + '/adapter') adds it"
        remarks.append(f"the LoRA adapter {how if kept else 'was added to the weights'}")
    remarks += [*_differences(model, config), *export_class.left_behind(config)]

    settings, tensors = export_class.stock_model(loaded, family, tokenizer, image_id, rows, dtype, style)
    with atomic_folder(dst, replace=replace) as work:
        settings.save_pretrained(work)
        size = write_weights(work, tensors, dtype, max_shard_bytes)
        _write_processor(work, loaded, settings, tokenizer)
        unsaid = {image_id, *range(len(tokenizer), rows)}
        _write_generation(work, model.llm, tokenizer, [*config.template.stop_token_ids, *ours.stop_ids], unsaid)
        if kept:
            write_adapter(work / ADAPTER_NAME, model, family, rows)
        parts = origins(loaded, licences)
        copy_licences(licences, work, parts)
        write_card(work, dst.name, CLASSES[family], loaded, remarks, parts, chat=jinja is not None)
    return Exported(dst, family, image_id, rows, size, tuple(remarks))


def _differences(model: MultimodalLM, config: ModelConfig) -> list[str]:
    """What a stock class does otherwise, besides prompts."""
    found = []
    if isinstance(getattr(model.projector, "norm", None), Standardize):
        found.append("the projector's fixed standardisation was multiplied into its first layer, which is exact")
    qformer = config.projector.qformer
    if qformer is not None and qformer.text_context and qformer.max_text_length < qformer.max_position_embeddings:
        found.append(
            f"here the Q-Former reads the first {qformer.max_text_length} tokens of a question, there all of it"
        )
    if qformer is not None and qformer.text_context and not model.encoder_decoder:
        found.append(QFORMER_PADDING)
    return [*found, about_transparency(config)]


QFORMER_PADDING = (
    "in a batch InstructBLIP's processor pads the Q-Former's question on the left as well, which moves it: ask one at "
    "a time, or questions of one length"
)


def about_transparency(config: ModelConfig) -> str:
    """What other programs do with transparent pixels."""
    background = config.image.background if config.image else None
    return f"transparent pixels become {background} here; there the colour that was hidden under them shows"


def write_weights(
    folder: Path, tensors: Iterable[tuple[str, torch.Tensor]], dtype: torch.dtype | None, max_bytes: int
) -> int:
    """Write tensors as safetensors, cut as transformers cuts them, one file in memory besides their sources."""
    from huggingface_hub import split_torch_state_dict_into_shards
    from safetensors.torch import save_file

    named: dict[str, torch.Tensor] = {}
    for name, tensor in tensors:
        if name in named:
            raise CheckpointError(f"two tensors are called {name}; nothing was written")
        named[name] = tensor
    kinds = {name: dtype or t.dtype if t.is_floating_point() else t.dtype for name, t in named.items()}
    # What would be stored, without memory: two tensors that share theirs are stored each by itself.
    stored = {name: torch.empty(t.shape, dtype=kinds[name], device="meta") for name, t in named.items()}
    split = split_torch_state_dict_into_shards(stored, max_shard_size=max_bytes)
    for file, names in split.filename_to_tensors.items():
        shard = {name: named[name].detach().to("cpu", kinds[name], copy=True).contiguous() for name in names}
        save_file(shard, folder / file, metadata={"format": "pt"})  # transformers asks for this
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": dict(sorted(split.tensor_to_filename.items()))}
        _write_json(folder / INDEX_NAME, index)
    return int(split.metadata["total_size"])


def write_adapter(folder: Path, model: MultimodalLM, family: str, rows: int) -> None:
    """Write the language model's adapter beside a stock folder, under the names that peft gives its weights there."""
    from peft import get_peft_model_state_dict
    from peft.tuners.lora import LoraLayer
    from safetensors.torch import save_file

    llm: Any = model.llm
    settings = deepcopy(llm.peft_config["default"])
    for name in ("trainable_token_indices", "modules_to_save", "rank_pattern", "alpha_pattern", "target_parameters"):
        if getattr(settings, name, None):
            raise CheckpointError(f"the adapter has {name}, which stock loading does not take; merge it")
    # Modules are named in full, so that the adapter cannot stray into the vision tower, whose layers are called alike.
    layers = {name: module for name, module in llm.named_modules() if isinstance(module, LoraLayer)}
    head = next((name for name, module in layers.items() if module is llm.get_output_embeddings()), None)
    weights = [to_stock(family, Place("llm", f"{name}.weight"), style="memory") for name in layers]
    settings.target_modules = {str(name).removesuffix(".weight") for name in weights}
    settings.base_model_name_or_path = None
    settings.inference_mode = True
    state = get_peft_model_state_dict(llm, save_embedding_layers=False)
    for name in [name for name in state if name.startswith(f"{head}.") and ".lora_A." not in name]:
        state[name] = export_class.grown(state[name], rows)
    tensors = {
        f"base_model.model.{to_stock(family, Place('llm', name), style='memory')}": tensor.detach().cpu().contiguous()
        for name, tensor in state.items()
    }
    for name, tensor in tensors.items():
        export_class.refuse_nan(name, tensor)
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    settings.save_pretrained(str(folder))


def image_processor_settings(image: ImageConfig, family: str) -> dict[str, Any]:
    """Image rules as `preprocessor_config.json` has them."""
    height, width = image.tile_size
    whole = {"height": height, "width": width}
    settings: dict[str, Any] = {
        "do_convert_rgb": True,
        "do_resize": True,
        "size": whole,
        "resample": RESAMPLE_FILTERS[image.resample],
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(image.image_mean),
        "image_std": list(image.image_std),
    }
    tiles = {"image_grid_pinpoints": [list(pinpoint) for pinpoint in image.image_grid_pinpoints], "do_pad": True}
    cropped = {"do_center_crop": True, "crop_size": whole, "size": {"shortest_edge": height}}
    how = image.image_aspect_ratio
    kind, more = "SiglipImageProcessor", {}
    if family in export_class.BLIP:
        kind = "BlipImageProcessor"
    elif family == "llava_next":
        kind, more = "LlavaNextImageProcessor", tiles | cropped
    elif family == "llava_onevision":
        kind, more = "LlavaOnevisionImageProcessor", tiles
    elif how == "pad":
        kind, more = "LlavaImageProcessor", cropped | {"do_pad": True}
    elif how == "crop":
        short = image.resize_short_side or min(height, width)
        kind, more = "CLIPImageProcessor", cropped | {"size": {"shortest_edge": short}}
    return {"image_processor_type": kind, **settings, **more}


def _write_processor(folder: Path, loaded: Loaded, stock: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    """Tokenizers, `preprocessor_config.json` and `processor_config.json`, beside the configuration of the class."""
    model, config, family = loaded.model, loaded.config, stock.model_type
    assert config.image is not None and config.vision is not None
    tokenizer.save_pretrained(folder)
    if family == "instructblip" and model.context_tokenizer is not None:
        model.context_tokenizer.save_pretrained(folder / TOKENIZER_FOLDER)
    settings: dict[str, Any] = {"processor_class": CLASSES[family].replace("ForConditionalGeneration", "Processor")}
    images = {**image_processor_settings(config.image, family), **settings}
    _write_json(folder / "preprocessor_config.json", images)
    if family in export_class.BLIP:
        settings["num_query_tokens"] = stock.num_query_tokens
    else:
        settings["image_token"] = tokenizer.convert_ids_to_tokens(stock.image_token_index)
        settings["vision_feature_select_strategy"] = stock.vision_feature_select_strategy
    if family in ("llava", "llava_next"):
        settings["patch_size"] = stock.vision_config.patch_size
        settings["num_additional_image_tokens"] = int(config.vision.type == "clip")
    if family == "llava_onevision":
        projector: Any = model.projector
        # Its "default" takes one off again, for the class token.
        one = int(stock.vision_feature_select_strategy == "default")
        settings["num_image_tokens"] = projector.output_grid.area + one
        settings["video_token"] = "<video>"
        settings["vision_aspect_ratio"] = stock.vision_aspect_ratio
        # The class insists on a part for videos, which the same settings describe.
        only_images = ("image_processor_type", "image_grid_pinpoints", "do_pad")
        videos = {key: value for key, value in images.items() if key not in only_images}
        videos["video_processor_type"] = "LlavaOnevisionVideoProcessor"
        _write_json(folder / "video_preprocessor_config.json", videos)
    _write_json(folder / "processor_config.json", settings)


def _write_generation(
    folder: Path, llm: Any, tokenizer: PreTrainedTokenizerBase, ends: Sequence[int], unsaid: set[int]
) -> None:
    """Where answers end, and what is never said: the placeholder, and rows that belong to no token."""
    from transformers import GenerationConfig

    def own(name: str) -> int | None:
        given = (getattr(settings, name, None) for settings in (getattr(llm, "generation_config", None), llm.config))
        return next((int(token) for token in given if isinstance(token, int)), None)

    GenerationConfig(
        bos_token_id=own("bos_token_id") if tokenizer.bos_token_id is None else tokenizer.bos_token_id,
        eos_token_id=list(dict.fromkeys(ends)),
        pad_token_id=tokenizer.pad_token_id,
        decoder_start_token_id=own("decoder_start_token_id"),
        suppress_tokens=sorted(unsaid),
    ).save_pretrained(folder)


def _write_json(path: Path, document: dict[str, Any]) -> None:
    write_text(path, json.dumps(document, indent=2, ensure_ascii=False) + "\n")
