"""Images and sounds as codes, and back: one table, one builder, one kind of folder.

A tokenizer's folder holds `config.json`, whose `type` is a name of `IMAGE_TOKENIZERS`, and `model.safetensors`.
Published folders of diffusers' `VQModel`, and of Emu3 and Janus in transformers, are read as they are; see
`pretrained`, and `audio` for sounds.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from polymodal.config import Strict, parse_config
from polymodal.errors import CheckpointError, ConfigError, unknown_name
from polymodal.modeling.tokenizers.base import AudioTokenizer, ImageTokenizer
from polymodal.modeling.tokenizers.config import (
    ImageTokenizerConfig,
    ImageVQConfig,
    PatchCodebookConfig,
    PretrainedTokenizerConfig,
)
from polymodal.modeling.tokenizers.image_vq import ImageVQ
from polymodal.modeling.tokenizers.patch_codebook import PatchCodebook
from polymodal.modeling.tokenizers.pretrained import PRETRAINED, load_published
from polymodal.safety.config_json import check_settings, read_json
from polymodal.utils.files import make_folder, write_text
from polymodal.utils.safetensors_io import compare_tensors, copy_tensors, read_header, read_tensors, write_tensors

__all__ = [
    "CONFIG",
    "IMAGE_TOKENIZERS",
    "AudioTokenizer",
    "ImageTokenizer",
    "build_image_tokenizer",
    "load_image_tokenizer",
    "save_image_tokenizer",
]

CONFIG, WEIGHTS = "config.json", "model.safetensors"

IMAGE_TOKENIZERS: dict[str, tuple[type[Strict], Callable[[Any], nn.Module]]] = {
    "image_vq": (ImageVQConfig, ImageVQ),
    "patch_codebook": (PatchCodebookConfig, PatchCodebook),
    **{name: (PretrainedTokenizerConfig, kind) for name, kind in PRETRAINED.items()},
}
"""Name -> its configuration's class, and its builder."""


def build_image_tokenizer(config: ImageTokenizerConfig) -> ImageTokenizer:
    """Build the image tokenizer that a configuration asks for, with fresh weights.

    Args:
        config: Of one of `IMAGE_TOKENIZERS`.

    Returns:
        The tokenizer, an nn.Module.

    Raises:
        ConfigError: An unknown type, or values that its class does not take.
    """
    if config.type not in IMAGE_TOKENIZERS:
        raise unknown_name("image tokenizer", config.type, IMAGE_TOKENIZERS)
    return cast(ImageTokenizer, IMAGE_TOKENIZERS[config.type][1](config))


def save_image_tokenizer(tokenizer: ImageTokenizer, folder: Path | str, dtype: torch.dtype | None = None) -> None:
    """Write a tokenizer's folder.

    Args:
        tokenizer: One of `IMAGE_TOKENIZERS`.
        folder: Where to; made where it is not there.
        dtype: Of floats in the file, such as `torch.float16` for half the bytes; as they are when None.

    Raises:
        CheckpointError: A weight is NaN or infinite; nothing was saved.
        ConfigError: It has no configuration that a folder could keep.
    """
    folder = Path(folder)
    config = getattr(tokenizer, "config", None)
    if not isinstance(config, Strict) or getattr(config, "type", None) not in IMAGE_TOKENIZERS:
        raise ConfigError(f"{type(tokenizer).__name__}: only tokenizers of IMAGE_TOKENIZERS are kept in a folder")
    make_folder(folder)
    state = tokenizer.state_dict()
    floats = {name: tensor.to(dtype) for name, tensor in state.items() if dtype and tensor.is_floating_point()}
    write_tensors(folder / WEIGHTS, {**state, **floats})
    write_text(folder / CONFIG, json.dumps(config.model_dump(mode="json"), indent=2) + "\n")


def load_image_tokenizer(folder: Path | str, image_size: int | None = None) -> ImageTokenizer:
    """Load an image tokenizer: a folder of ours, of a `VQModel` of diffusers, or of Emu3 or Janus.

    Args:
        folder: Holds `config.json` and safetensors.
        image_size: Of published tokenizers that take images of any size: the side to use, in pixels.

    Returns:
        The tokenizer, on the CPU, in float32, in eval mode.

    Raises:
        CheckpointError: A file is missing or damaged, or the weights do not fit.
        ConfigError: The folder holds no image tokenizer, or one whose class cannot decode.
    """
    folder = Path(folder)
    if not (folder / CONFIG).is_file():
        raise CheckpointError(f"{folder}: {CONFIG} is missing; give the folder of an image tokenizer")
    settings = read_json(folder / CONFIG)
    check_settings(settings, str(folder / CONFIG))
    name = settings.get("type")
    if name is None:
        return cast(ImageTokenizer, load_published(folder, settings, image_size).eval())
    if name not in IMAGE_TOKENIZERS:
        raise unknown_name(f"image tokenizer in {folder / CONFIG}", str(name), IMAGE_TOKENIZERS)
    kind, build = IMAGE_TOKENIZERS[name]
    config = parse_config(kind, settings, str(folder / CONFIG))
    if not (folder / WEIGHTS).is_file():
        raise CheckpointError(f"{folder}: {WEIGHTS} is missing")
    # Sizes are compared before memory is taken.
    with torch.device("meta"):
        compare_tensors(build(config).state_dict(), read_header(folder / WEIGHTS), folder / WEIGHTS)
    tokenizer = build(config)
    copy_tensors(tokenizer.state_dict(), read_tensors(folder / WEIGHTS), folder / WEIGHTS)
    return cast(ImageTokenizer, tokenizer.eval())
