"""Writing a model as a stock folder of transformers, without remote code: weights, processor, prompts, card.

`interop.huggingface.export_class` says which class it is and makes configuration and tensors; here the raw-input side
joins in: image rules as `preprocessor_config.json`, the chat template as jinja that gives our ids, the tokenizer with
the placeholder as a real token inside the embedding table. Everything is checked before the first tensor is written,
and the folder appears whole or not at all. Names of weights are those of published folders ("hub"), which transformers,
vLLM and llama.cpp's converters read; transformers' own `save_pretrained` writes others.
"""

from __future__ import annotations

import json
import shutil
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polymodal.checkpoints.model_folder import Loaded
from polymodal.config import RESAMPLE_FILTERS, ImageConfig, ModelConfig
from polymodal.errors import CheckpointError
from polymodal.interop.huggingface.export_chat_template import StockTemplate, check_plain_prompt, stock_template
from polymodal.interop.huggingface.export_class import (
    BLIP,
    Vocabulary,
    check_against_class,
    reasons_against,
    refuse,
    select_strategy,
    stock_family,
    stock_settings,
    stock_tensors,
)
from polymodal.interop.huggingface.export_files import MAX_SHARD_BYTES, write_adapter, write_card, write_shards
from polymodal.interop.huggingface.families import CLASSES
from polymodal.interop.huggingface.weight_names import Style
from polymodal.modeling.lora import fold_in, is_peft, merge_adapter
from polymodal.modeling.projectors.mlp import Standardize
from polymodal.modeling.projectors.qformer_files import TOKENIZER_FOLDER
from polymodal.processing.chat_template.encode import ChatTemplate
from polymodal.processing.chat_template.presets import PRESETS
from polymodal.utils.files import atomic_folder, write_text

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

    from polymodal.modeling.vlm import MultimodalLM

PLACEHOLDER = "<image>"
PROCESSORS = {
    "llava": "LlavaProcessor",
    "llava_next": "LlavaNextProcessor",
    "llava_onevision": "LlavaOnevisionProcessor",
    "blip-2": "Blip2Processor",
    "instructblip": "InstructBlipProcessor",
}
LICENCES = ("LICENSE*", "LICENCE*", "NOTICE*", "COPYING*")


@dataclass(frozen=True)
class Exported:
    """What was written."""

    folder: Path  # Where
    family: str  # The `model_type` of its `config.json`
    image_token_id: int  # The placeholder's id there
    rows: int  # Rows of its vocabulary
    weight_bytes: int  # Size of its weights
    notes: tuple[str, ...]  # What is not quite as here, or was done on the way, in words


def export_hf(
    loaded: Loaded,
    dst: Path,
    *,
    merge_lora: bool = True,
    dtype: torch.dtype | None = None,
    style: Style = "hub",
    max_shard_bytes: int = MAX_SHARD_BYTES,
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
        max_shard_bytes: The largest file of weights.
        licences: A folder whose licence files are copied.
        replace: Overwrite a folder that is there.

    Returns:
        What was written.

    Raises:
        CheckpointError: The stock class cannot express the model; lists every reason.
        PolymodalError: The folder exists and `replace` is false, or cannot be written.
    """
    model, config = loaded.model, loaded.config
    family = stock_family(config)
    refuse(family, reasons_against(model, config, family))
    adapted = is_peft(model.llm)
    if adapted and merge_lora:
        fold_in(model.llm)
    elif adapted:
        merge_adapter(model, False)
    dtype = dtype or model.llm.get_input_embeddings().weight.dtype
    tokenizer, vocabulary, notes = with_placeholder(model, loaded.tokenizer)
    prompt, tokenizer = _prompt(loaded, family, tokenizer, vocabulary.image_token_id)
    notes += [*prompt.notes, *_remarks(model, config, adapted, merge_lora)]
    settings = stock_settings(model, config, family, vocabulary, dtype)
    check_against_class(model, config, family, settings, vocabulary.rows)
    with atomic_folder(dst, replace=replace) as work:
        settings.save_pretrained(work)
        tensors = stock_tensors(model, config, family, vocabulary.rows, style)
        size = write_shards(work, tensors, dtype, max_shard_bytes)
        _write_processor(work, model, config, family, tokenizer, vocabulary.image_token_id)
        _write_generation(work, model, loaded, tokenizer, vocabulary)
        if adapted and not merge_lora:
            write_adapter(work / "adapter", model, family)
        if licences is not None:
            for path in sorted({path for pattern in LICENCES for path in licences.glob(pattern) if path.is_file()}):
                shutil.copyfile(path, work / path.name)
        write_card(work, dst.name, CLASSES[family], loaded, notes, chat=prompt.jinja is not None)
    return Exported(dst, family, vocabulary.image_token_id, vocabulary.rows, size, tuple(notes))


def image_processor_settings(image: ImageConfig, family: str) -> dict[str, Any]:
    """Image rules as `preprocessor_config.json` has them."""
    height, width = image.tile_size
    whole = {"height": height, "width": width}
    settings: dict[str, Any] = {
        "do_convert_rgb": True,
        "do_resize": True,
        "size": whole,
        "resample": RESAMPLE_FILTERS[image.resample],
        "do_center_crop": False,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(image.image_mean),
        "image_std": list(image.image_std),
    }
    cropped = {"do_center_crop": True, "crop_size": whole}
    if family in BLIP:
        settings.pop("do_center_crop")
        return {"image_processor_type": "BlipImageProcessor", **settings}
    if image.image_aspect_ratio == "anyres":
        kind = "LlavaNextImageProcessor" if family == "llava_next" else "LlavaOnevisionImageProcessor"
        settings |= {"image_grid_pinpoints": [list(pinpoint) for pinpoint in image.image_grid_pinpoints]}
        if family == "llava_next":
            settings |= {**cropped, "size": {"shortest_edge": height}, "do_pad": True}
        else:
            settings.pop("do_center_crop")
            settings |= {"do_pad": True}
        return {"image_processor_type": kind, **settings}
    if image.image_aspect_ratio == "pad":
        short = {"size": {"shortest_edge": height}, "do_pad": True}
        return {"image_processor_type": "LlavaImageProcessor", **settings, **cropped, **short}
    if image.image_aspect_ratio == "crop":
        short = {"size": {"shortest_edge": image.resize_short_side or min(height, width)}}
        return {"image_processor_type": "CLIPImageProcessor", **settings, **cropped, **short}
    return {"image_processor_type": "SiglipImageProcessor", **{k: v for k, v in settings.items() if "crop" not in k}}


def with_placeholder(
    model: MultimodalLM, tokenizer: PreTrainedTokenizerBase
) -> tuple[PreTrainedTokenizerBase, Vocabulary, list[str]]:
    """Make a copy of the tokenizer in which the placeholder is a token."""
    copied = deepcopy(tokenizer)
    notes = []
    if model.image_token_id < len(copied):
        image_id = model.image_token_id
    else:
        copied.add_special_tokens({"additional_special_tokens": [PLACEHOLDER]}, replace_extra_special_tokens=False)
        image_id = int(copied.convert_tokens_to_ids(PLACEHOLDER))
        notes.append(
            f"the image's placeholder, {model.image_token_id} in training, is token {image_id} {PLACEHOLDER!r}"
        )
    if copied.pad_token is None and copied.eos_token is not None:
        copied.pad_token = copied.eos_token
        notes.append(f"the tokenizer had no padding token: it pads with {copied.eos_token!r}")
    head: Any = model.llm.get_output_embeddings()
    had = [table.weight.shape[0] for table in (model.llm.get_input_embeddings(), head) if table is not None]
    rows = max(*had, len(copied))
    if rows > min(had):
        notes.append(f"the vocabulary has {rows} rows instead of {min(had)}: a new row is the mean of the others")
    video = copied.get_added_vocab().get("<video>")
    return copied, Vocabulary(image_id, rows, video), notes


def _prompt(
    loaded: Loaded, family: str, tokenizer: PreTrainedTokenizerBase, image_token_id: int
) -> tuple[StockTemplate, PreTrainedTokenizerBase]:
    """The chat template to be written, and the tokenizer that goes with it."""
    template = loaded.config.template
    ours = ChatTemplate(loaded.tokenizer, template, loaded.model.image_token_id)
    if family not in BLIP:
        found = stock_template(ours, template, loaded.tokenizer, tokenizer, image_token_id)
        found.tokenizer.chat_template = found.jinja
        return found, found.tokenizer
    if tokenizer.convert_ids_to_tokens(image_token_id) != PLACEHOLDER:
        raise CheckpointError(
            f"the image's token is {tokenizer.convert_ids_to_tokens(image_token_id)!r}; BLIP-2's processor knows "
            f"only {PLACEHOLDER!r}"
        )
    preset = PRESETS.get(template.chat_template)
    notes = check_plain_prompt(ours, preset is not None and preset.media_only, tokenizer, image_token_id)
    tokenizer.chat_template = None
    return StockTemplate(None, tokenizer, notes), tokenizer


def _remarks(model: MultimodalLM, config: ModelConfig, adapted: bool, merge_lora: bool) -> list[str]:
    notes = []
    if adapted and merge_lora:
        notes.append("the LoRA adapter was added to the weights")
    elif adapted:
        notes.append("the LoRA adapter lies in adapter/; PeftModel.from_pretrained(model, FOLDER + '/adapter') adds it")
    if isinstance(getattr(model.projector, "norm", None), Standardize):
        notes.append("the projector's fixed standardisation was multiplied into its first layer, which is exact")
    qformer = config.projector.qformer
    if qformer is not None and qformer.text_context and qformer.max_text_length < qformer.max_position_embeddings:
        notes.append(
            f"here the Q-Former reads the first {qformer.max_text_length} tokens of a question, there all of it"
        )
    background = config.image.background if config.image else None
    notes.append(f"transparent pixels become {background} here; there the colour that was hidden under them shows")
    return notes


def _write_processor(
    folder: Path,
    model: MultimodalLM,
    config: ModelConfig,
    family: str,
    tokenizer: PreTrainedTokenizerBase,
    image_token_id: int,
) -> None:
    """Tokenizers, `preprocessor_config.json` and `processor_config.json`."""
    assert config.image is not None and config.vision is not None
    encoder: Any = model.vision_encoder
    projector: Any = model.projector
    name = {"processor_class": PROCESSORS[family]}
    tokenizer.save_pretrained(folder)
    images = {**image_processor_settings(config.image, family), **name}
    _write_json(folder / "preprocessor_config.json", images)
    settings: dict[str, Any] = {**name}
    if family in BLIP:
        settings["num_query_tokens"] = projector.output_grid.area
    else:
        settings["image_token"] = tokenizer.convert_ids_to_tokens(image_token_id)
        settings["vision_feature_select_strategy"] = select_strategy(config)
    if family in ("llava", "llava_next"):
        settings["patch_size"] = encoder.model.config.patch_size
        settings["num_additional_image_tokens"] = int(config.vision.type == "clip")
    if family == "llava_onevision":
        # Its "default" takes one off again, for the class token.
        settings["num_image_tokens"] = projector.output_grid.area + int(select_strategy(config) == "default")
        settings["video_token"] = "<video>"
        settings["vision_aspect_ratio"] = f"anyres_max_{config.image.anyres_max}"
        # The class insists on a part for videos, which the same settings describe.
        videos = {key: value for key, value in images.items() if key not in ("image_grid_pinpoints", "do_pad")}
        del videos["image_processor_type"]
        videos["video_processor_type"] = "LlavaOnevisionVideoProcessor"
        _write_json(folder / "video_preprocessor_config.json", videos)
    _write_json(folder / "processor_config.json", settings)
    if family == "instructblip" and model.context_tokenizer is not None:
        model.context_tokenizer.save_pretrained(folder / TOKENIZER_FOLDER)


def _write_generation(
    folder: Path, model: MultimodalLM, loaded: Loaded, tokenizer: PreTrainedTokenizerBase, vocabulary: Vocabulary
) -> None:
    """Where answers end, and what is never said: the placeholder, and rows that belong to no token."""
    from transformers import GenerationConfig

    template = loaded.config.template
    ours = ChatTemplate(loaded.tokenizer, template, model.image_token_id)
    ends = list(dict.fromkeys([*template.stop_token_ids, *ours.stop_ids]))
    known = getattr(model.llm, "generation_config", None)
    unsaid = {vocabulary.image_token_id, *range(len(tokenizer), vocabulary.rows)}
    settings = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id if tokenizer.bos_token_id is not None else _id(known, "bos_token_id"),
        eos_token_id=ends,
        pad_token_id=tokenizer.pad_token_id,
        decoder_start_token_id=_id(known, "decoder_start_token_id") or _id(model.llm.config, "decoder_start_token_id"),
        suppress_tokens=sorted(unsaid),
    )
    settings.save_pretrained(folder)


def _id(settings: Any, name: str) -> int | None:
    found = getattr(settings, name, None)
    return int(found) if isinstance(found, int) else None


def _write_json(path: Path, document: dict[str, Any]) -> None:
    write_text(path, json.dumps(document, indent=2, ensure_ascii=False) + "\n")
