"""A model of one's own from its parts: each a folder, a hub id, or a module that is there already.

What can be read from the parts is not asked for: the tower's family and its image rules, the chat template, widths and
token counts.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import nn

from polymodal.backends.local import LocalBackend
from polymodal.checkpoints.locate import referred_folder
from polymodal.config import (
    AudioConfig,
    FusedTowerConfig,
    ImageConfig,
    LLMConfig,
    ModelConfig,
    ProjectorConfig,
    TemplateConfig,
    VisionConfig,
    parse_config,
)
from polymodal.errors import ConfigError
from polymodal.modeling.build import build_model
from polymodal.modeling.encoders.efficientnet import PIXEL_MEAN, PIXEL_STD
from polymodal.modeling.encoders.hf_vision import FAMILIES, family_of
from polymodal.modeling.encoders.vision import OWN
from polymodal.modeling.language_model import load_tokenizer, open_tokenizer
from polymodal.modeling.pretrained import config_json
from polymodal.processing.image_config_hf import image_config_from_hf
from polymodal.safety.config_json import read_json
from polymodal.utils.devices import best_device, check_device
from polymodal.utils.files import shipped

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Resolution = Literal["fixed", "slices", "anyres", "native"]

EFFICIENTNET = "efficientnet_lite0"
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
HALF = (0.5, 0.5, 0.5)
NORMS = {
    "clip": (CLIP_MEAN, CLIP_STD), "eva_clip": (CLIP_MEAN, CLIP_STD), "siglip": (HALF, HALF), "siglip2": (HALF, HALF),
    "dinov2": (IMAGENET_MEAN, IMAGENET_STD), "dinov2_with_registers": (IMAGENET_MEAN, IMAGENET_STD),
    EFFICIENTNET: (PIXEL_MEAN, PIXEL_STD),
}  # fmt: skip
"""What each family was trained with, for towers without a `preprocessor_config.json`."""


def compose(
    vision: str | Path | nn.Module | Sequence[str | Path | nn.Module] | None = None,
    projector: str | ProjectorConfig | nn.Module = "mlp2x_gelu",
    llm: str | Path | PreTrainedModel = "smollm2",
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    audio: str | Path | None = None,
    image: ImageConfig | None = None,
    resolution: Resolution = "fixed",
    template: str | None = None,
    device: str | None = None,
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    seed: int = 0,
    name: str = "model",
) -> LocalBackend:
    """Put a multimodal language model together; what is new, such as the projector, has random weights.

    Args:
        vision: A vision tower: a folder or hub id of a CLIP, SigLIP, SigLIP 2, DINOv2 or EVA-CLIP, "efficientnet_lite0"
            or "vit_small" of the package, or any module [N, 3, H, W] -> [N, P, E]; or a list of them, which stand side
            by side: each sees the same tiles, normalised as it was trained (a module of yours as the first). None for a
            model of text.
        projector: LLaVA's name of one ("linear", "mlp2x_gelu", "qformer", ...), its configuration, or any module
            [N, P, E] -> [N, Q, D]; how many tokens that makes is found by running it once.
        llm: A causal language model: a folder, a hub id, "smollm2", or a model of transformers.
        tokenizer: Of a language model that is given as a model; else its own.
        audio: A Whisper, whose encoder hears: a folder or hub id; None for a model that hears nothing.
        image: How images become tiles; the (first) tower's own rules, padded to a square as LLaVA does, where None. A
            tower that is a module of yours needs it.
        resolution: "fixed" (one tile), "slices" (tiles and a thumbnail), "anyres" (LLaVA-NeXT's) or "native" (the
            image's own shape), where there is no `image`.
        template: A preset ("chatml", "vicuna", "llama3", ...); the tokenizer's own where None, or else "vicuna".
        device: Where to put it; None takes a GPU where there is one.
        dtype: Of the language model's weights.
        seed: Of what is new.
        name: What replies call the model.

    Returns:
        The model behind the chat protocol; `train`, `save` and `load` go on from it.

    Raises:
        ConfigError: A part is of another kind than its place or does not fit the next, or there is no such device.
        CheckpointError: A part cannot be found or loaded.
    """
    if resolution not in get_args(Resolution):
        raise ConfigError(f"resolution: {resolution!r}; choose one of {', '.join(get_args(Resolution))}")
    towers = _several(vision)
    for tower in towers:
        head = getattr(tower, "get_output_embeddings", None)
        if head is not None and head() is not None:
            raise ConfigError(
                f"vision: a {type(tower).__name__} is a language model; the order is vision, projector, llm"
            )
    if isinstance(llm, nn.Module) and not hasattr(llm, "get_output_embeddings"):
        raise ConfigError(f"llm: a {type(llm).__name__} is no language model of transformers")
    if device is not None:
        check_device(device)
    torch.manual_seed(seed)
    if isinstance(llm, nn.Module):
        tokenizer = tokenizer if tokenizer is not None else _own_tokenizer(llm)
    config, tokenizer = configure(vision, projector, _name(llm), tokenizer, audio, image, resolution, template, dtype)
    model, tokenizer = build_model(
        config,
        tokenizer=tokenizer,
        encoder=[tower if isinstance(tower, nn.Module) else None for tower in towers],
        projector=projector if isinstance(projector, nn.Module) else None,
        llm=llm if isinstance(llm, nn.Module) else None,
    )
    return LocalBackend(model.to(device or best_device()), tokenizer, config, name)


def configure(
    vision: Any,
    projector: Any,
    llm: str,
    tokenizer: PreTrainedTokenizerBase | None = None,
    audio: str | Path | None = None,
    image: ImageConfig | None = None,
    resolution: Resolution = "fixed",
    template: str | None = None,
    dtype: Any = "float32",
) -> tuple[ModelConfig, PreTrainedTokenizerBase]:
    """The configuration of a model from its parts, and its tokenizer; no weight is read."""
    settings = LLMConfig(model_name_or_path=llm, dtype=dtype)
    tokenizer = tokenizer if tokenizer is not None else load_tokenizer(settings)
    towers = _several(vision)
    named: list[dict[str, Any]] = [{"vision_tower": _name(tower), "type": _family(tower)} for tower in towers]
    between = _projector_config(projector)
    joined = re.match(r"(?:pixel_shuffle|avg_pool)(\d+)", between.mm_projector_type)
    side = int(joined[1]) if joined else 1  # patches a side of a token
    rules = image
    if towers and image is None:
        rules = _image_rules(towers[0], named[0]["type"], resolution, side)
    for further, about in zip(towers[1:], named[1:], strict=True):
        own = rules if about["type"] == OWN else _image_rules(further, about["type"], "fixed", 1)
        norms = [{"image_mean": each.image_mean, "image_std": each.image_std} for each in (own, rules) if each]
        about |= {} if norms[0] == norms[1] else norms[0]
    config = ModelConfig(
        vision=VisionConfig(**named[0], fused=tuple(FusedTowerConfig(**more) for more in named[1:])) if named else None,
        image=rules,
        projector=between,
        llm=settings,
        template=TemplateConfig(chat_template=template or ("tokenizer" if tokenizer.chat_template else "vicuna")),
        audio=None if audio is None else AudioConfig(audio_tower=str(audio), type="whisper"),
    )
    return config, tokenizer


def _several(vision: Any) -> list[Any]:
    """The vision towers that are to stand side by side; one, or none."""
    return list(vision) if isinstance(vision, list | tuple) else [] if vision is None else [vision]


def _name(part: str | Path | nn.Module) -> str:
    return "bundled" if isinstance(part, nn.Module) else str(part)


def _own_tokenizer(llm: Any) -> PreTrainedTokenizerBase:
    """The tokenizer that lies where a language model was loaded from."""
    source = str(getattr(llm, "name_or_path", "") or "")
    if not source:
        raise ConfigError("llm: a model that was loaded from nowhere has no tokenizer; give `tokenizer` too")
    return open_tokenizer(source, f"tokenizer of {source!r}", fast=True)


def _projector_config(projector: str | ProjectorConfig | nn.Module) -> ProjectorConfig:
    if isinstance(projector, ProjectorConfig):
        return projector
    if isinstance(projector, str):
        return ProjectorConfig(mm_projector_type=projector)
    if isinstance(projector, nn.Module):
        return ProjectorConfig()
    raise ConfigError(f"projector: a {type(projector).__name__}; give a name, a ProjectorConfig or a module")


def _settings(vision: str | Path) -> dict[str, Any]:
    """A tower's own `config.json`; of a whole model's the part about vision."""
    folder = shipped(str(vision))
    found = config_json(str(folder or vision), f"vision {str(vision)!r}")
    return {**found, **(found.get("vision_config") or {}), "model_type": found.get("model_type")}


def _family(vision: Any) -> str:
    """The family of a tower, by its own configuration."""
    if isinstance(vision, nn.Module):
        kind = getattr(getattr(vision, "config", None), "model_type", None)
        return family_of(kind) or OWN
    if not isinstance(vision, str | Path):
        raise ConfigError(f"vision: a {type(vision).__name__}; give a folder, a hub id or a module")
    if str(vision) == EFFICIENTNET:
        return EFFICIENTNET
    kind = _settings(vision)["model_type"]
    found = family_of(kind)
    if found is None:
        raise ConfigError(
            f"vision {str(vision)!r}: model_type {kind!r} is no vision tower known here: {', '.join(FAMILIES)}"
        )
    return found


def _image_rules(vision: Any, family: str, resolution: Resolution, side: int) -> ImageConfig:
    """How images become tiles: the tower's own size, norm and filter, in the layout that was asked for."""
    if family == OWN:
        raise ConfigError("image: a tower of your own does not say how it wants its images; give an ImageConfig")
    given = getattr(vision, "config", None)
    folder = None if isinstance(vision, nn.Module) else shipped(str(vision)) or referred_folder(str(vision))
    file = None if folder is None else folder / "preprocessor_config.json"
    mean, std = NORMS[family]
    settings = {} if family == EFFICIENTNET else given.to_dict() if given is not None else _settings(vision)
    patch = settings.get("patch_size", 1)
    naflex = math.isqrt(settings.get("num_patches", 196)) * patch  # pixels a side of what SigLIP 2 counts in patches
    if family == EFFICIENTNET:
        own: dict[str, Any] = {"tile_size": (224, 224), "image_mean": mean, "image_std": std}
    elif file is not None and file.is_file():
        read = image_config_from_hf(_fixed_size(read_json(file)))
        own = read.model_dump(include={"tile_size", "image_mean", "image_std", "resample"})
    else:
        size = settings.get("image_size", naflex if family == "siglip2" else 224)
        own = {"tile_size": (size, size), "image_mean": mean, "image_std": std}
    height, width = own["tile_size"]
    layout: dict[str, Any] = {"fixed": {"image_aspect_ratio": "pad"}, "slices": {"image_aspect_ratio": "slice"}}.get(
        resolution, {}
    )
    if resolution == "anyres":  # LLaVA-NeXT's grids, in tiles
        grids = [(height * rows, width * columns) for rows, columns in ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))]
        merge = "spatial_unpad"
        layout = {"image_aspect_ratio": "anyres", "image_grid_pinpoints": grids, "mm_patch_merge_type": merge}
    if resolution == "native":  # in whole tokens, rows ended by a newline: else nothing says how wide an image is
        token = patch * side
        own["tile_size"] = (height // token * token or token, width // token * token or token)
        layout = {"image_aspect_ratio": "native", "mm_patch_merge_type": "spatial_unpad"}
    return parse_config(ImageConfig, {**own, **layout}, "image")


def _fixed_size(preprocessor: dict[str, Any]) -> dict[str, Any]:
    """A preprocessor's settings; NaFlex's, which says how many patches an image has at most, as a square of so many."""
    most, patch = (preprocessor.get(key) for key in ("max_num_patches", "patch_size"))
    if not isinstance(most, int) or not isinstance(patch, int):
        return preprocessor
    size = math.isqrt(most) * patch
    plain = {key: value for key, value in preprocessor.items() if key not in ("max_num_patches", "patch_size")}
    return {**plain, "image_processor_type": "SiglipImageProcessor", "size": {"height": size, "width": size}}
