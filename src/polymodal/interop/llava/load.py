"""Original LLaVA-repository folders as models of ours: what the folder leaves out about pictures and prompts is added.

Such a folder names its tower and how pictures are laid out; the tower's own folder says how pixels are scaled. Which
prompt the model was trained on is not written anywhere: there it is guessed from words in the folder's name. Here it
follows from the tokenizer and can be said with `template`: the tokenizer's own chat template where it has one; ChatML
or Llama 3 where it has those tokens; else Mistral's for a Mistral and Vicuna's, which LLaVA-1.5 uses, for the rest. A
picture is followed by a line break, as there.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from polymodal.checkpoints.llava_weights import attach_lora, build_llm, fill_parts, read_state, sort_state
from polymodal.checkpoints.model_folder import Loaded
from polymodal.config import ImageConfig, LLMConfig, ModelConfig, TemplateConfig, VisionConfig
from polymodal.errors import CheckpointError, ConfigError, first_line
from polymodal.interop.llava.config import Repo, is_llava_repo, named_base, read_repo
from polymodal.modeling.encoders.hf_vision import FAMILIES
from polymodal.modeling.language_model import load_llm, load_tokenizer, quieten_transformers
from polymodal.processing.chat_template.presets import PRESETS
from polymodal.processing.image_config_hf import image_config_from_hf
from polymodal.safety.config_json import check_settings, read_json

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Dtype = Literal["float32", "bfloat16", "float16"]

BY_TOKENS = ("chatml", "llama3")
"""Presets that a tokenizer's own tokens tell."""


def load_llava_repo(
    folder: Path,
    *,
    base: str | None = None,
    vision_tower: str | None = None,
    template: str | None = None,
    allow_pickle: bool = False,
    dtype: Dtype = "float32",
) -> Loaded:
    """Load a folder of the LLaVA repository.

    Args:
        folder: A whole model, a projector, or a LoRA.
        base: Of the last two: the language model's folder or hub id, or the folder of a whole LLaVA.
        vision_tower: The tower's folder or hub id, in place of `mm_vision_tower`.
        template: The chat template: a preset, "tokenizer" or jinja text; found out where None.
        allow_pickle: Open pickles; tensors are read from them and nothing else.
        dtype: Of the weights in memory.

    Returns:
        The model in eval mode on the CPU, an adapter attached and not merged; tokenizer, configuration, and a history
        of one entry that says what was loaded.

    Raises:
        CheckpointError: The folder is damaged, cannot be expressed, or must not be opened; names what.
        ConfigError: Parts do not fit each other.
    """
    import torch

    from polymodal.modeling.build import build_vision, image_token_id_for
    from polymodal.modeling.vlm import MultimodalLM

    quieten_transformers()
    repo = read_repo(folder, allow_pickle=allow_pickle)
    llm_config = _llm_config(repo, base, dtype)
    vision, image = _pictures(repo, vision_tower or repo.tower)
    parts = sort_state(read_state(repo))
    llm: PreTrainedModel
    if repo.kind == "whole":
        llm = build_llm(repo, parts.pop("llm", {}), getattr(torch, dtype), llm_config.attn_implementation)
        tokenizer = load_tokenizer(LLMConfig(model_name_or_path=str(folder.resolve())))
    elif base is not None and is_llava_repo(Path(base)):
        loaded = load_llava_repo(
            Path(base), vision_tower=vision_tower, template=template, allow_pickle=allow_pickle, dtype=dtype
        )
        llm, tokenizer = loaded.model.llm, loaded.tokenizer
    else:
        llm, tokenizer = load_llm(llm_config), load_tokenizer(llm_config)
    if "llm" in parts:
        names = sorted(parts["llm"])
        raise CheckpointError(f"{folder}: {len(names)} tensors besides the projector's, such as {names[0]}")
    config = ModelConfig(
        vision=vision.model_copy(update={"vision_tower": "bundled"}) if "vision" in parts else vision,
        image=image,
        projector=repo.projector,
        llm=llm_config,
        template=TemplateConfig(chat_template=template or _template(repo, tokenizer), image_newline_text="\n"),
    )
    embeddings = llm.get_input_embeddings().weight
    built = build_vision(config.model_copy(update={"vision": vision}), None, embeddings.shape[1])
    assert built is not None  # there is a tower
    encoder, projector = built
    projector.to(embeddings.device, embeddings.dtype)
    head = llm.get_output_embeddings()
    model = MultimodalLM(
        llm,
        image_token_id_for(config, tokenizer, head.weight.shape[0]),
        encoder,
        projector,
        image_newline=image.mm_patch_merge_type == "spatial_unpad",
        image_mean=image.image_mean,
        image_std=image.image_std,
    )
    fill_parts(model, repo, parts)
    if repo.kind == "lora":
        attach_lora(model, repo)
    entry = {"stage": "LLaVA repository", "source": str(folder), "kind": repo.kind, "base": base, "tower": repo.tower}
    config = config.model_copy(update={"image_token_id": model.image_token_id})
    return Loaded(model.eval(), tokenizer, config, [entry])


def _llm_config(repo: Repo, base: str | None, dtype: Dtype) -> LLMConfig:
    """Where the language model is from; what lies in a LLaVA folder becomes part of our model."""
    if repo.kind == "whole":
        if base is not None:
            raise ConfigError(f"{repo.folder}: the folder holds a whole model; leave the base out")
        return LLMConfig(model_name_or_path="bundled", dtype=dtype)
    if base is None:
        named = named_base(repo.folder)
        what = "a LoRA" if repo.kind == "lora" else "only a projector"
        hint = f" (it was trained on {named!r})" if named else ""
        raise CheckpointError(
            f"{repo.folder}: holds {what}; name the language model with --base of `polymodal convert`{hint}"
        )
    inside = is_llava_repo(Path(base))
    return LLMConfig(model_name_or_path="bundled" if inside else base, dtype=dtype)


def _pictures(repo: Repo, tower: str) -> tuple[VisionConfig, ImageConfig]:
    """The tower and the picture rules."""
    kind = _tower_settings(tower).get("model_type")
    family = next((name for name, found in FAMILIES.items() if kind in found.model_types), None)
    if family is None:
        raise CheckpointError(f"vision tower {tower!r}: model_type {kind!r} is none of {', '.join(FAMILIES)}")
    vision = VisionConfig(
        vision_tower=tower,
        type=family,
        # The repository's SigLIP tower has its last layer cut off and takes what is then the last, whatever is asked.
        mm_vision_select_layer=repo.select_layer if family == "clip" else -2,
        mm_vision_select_feature=repo.select_feature,
    )
    image = image_config_from_hf(_tower_file(tower, "preprocessor_config.json"))
    height, width = image.tile_size
    changes: dict[str, Any] = {}
    if repo.aspect_ratio == "pad":
        changes = {"image_aspect_ratio": "pad", "resize_short_side": None}
    if repo.aspect_ratio == "anyres":
        scale = (height, width) if repo.in_tiles else (1, 1)
        changes = {
            "image_aspect_ratio": "anyres",
            "resize_short_side": None,
            "image_grid_pinpoints": tuple((rows * scale[0], columns * scale[1]) for rows, columns in repo.pinpoints),
            "mm_patch_merge_type": repo.merge,
            "anyres_max": repo.anyres_max,
        }
    return vision, ImageConfig(**{**image.model_dump(), **changes})


def _template(repo: Repo, tokenizer: PreTrainedTokenizerBase) -> str:
    """The prompt, as this file's first lines say."""
    if tokenizer.chat_template:
        return "tokenizer"
    vocabulary = tokenizer.get_added_vocab()
    for name in BY_TOKENS:
        if all(token in vocabulary for token in PRESETS[name].tokens):
            return name
    return "mistral" if repo.text_settings.model_type in ("mistral", "mixtral") else "vicuna"


def _tower_settings(tower: str) -> dict[str, Any]:
    """A tower's `config.json`."""
    settings = _tower_file(tower, "config.json")
    check_settings(settings, f"vision tower {tower!r}")
    return settings


def _tower_file(tower: str, name: str) -> dict[str, Any]:
    """A JSON file of a tower, from its folder or the hub."""
    folder = Path(tower).expanduser()
    if folder.is_dir():
        return read_json(folder / name)
    from huggingface_hub import hf_hub_download

    try:
        return read_json(Path(hf_hub_download(tower, name)))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"vision tower {tower!r}: {name} is not to be had ({first_line(error)}); name its folder with "
            "--vision-tower"
        ) from error
