"""What an image tokenizer is made of; a tokenizer's `config.json` and `init.model` of its recipe."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import Field, model_validator

from polymodal.config import Strict

Count = Annotated[int, Field(gt=0, le=4096)]
Codes = Annotated[int, Field(gt=1, le=2**20)]


class VectorQuantizerConfig(Strict):
    """A learned codebook of running means, with the nearest entry by Euclidean distance.

    Attributes:
        type: "vq".
        codebook_size: K, the number of codes.
        code_dim: Dimensions that distances are taken in; 8 to 32 use a codebook best.
        decay: How slowly entries move: what remains of a running mean after a step.
        commitment: Weight of the encoder's distance to its entries.
        revive_below: Entries that are nearest to fewer vectors than this part of the mean are put where vectors are
            far from theirs; 0 leaves them dead.
        l2_norm: Compare directions alone.
    """

    type: Literal["vq"] = "vq"
    codebook_size: Codes = 1024
    code_dim: Count = 8
    decay: float = Field(default=0.99, ge=0, lt=1)
    commitment: float = Field(default=0.25, ge=0, le=1000)
    revive_below: float = Field(default=0.05, ge=0, lt=0.25)
    l2_norm: bool = False


class FSQConfig(Strict):
    """Finite scalar quantization (Mentzer et al. 2023, arXiv:2309.15505): nothing to learn, and nothing to collapse.

    Attributes:
        type: "fsq".
        levels: Levels of each dimension; K is their product.
    """

    type: Literal["fsq"] = "fsq"
    levels: tuple[Annotated[int, Field(ge=2, le=256)], ...] = Field(default=(8, 8, 4, 4), min_length=1, max_length=16)

    @model_validator(mode="after")
    def _not_too_many(self) -> FSQConfig:
        if math.prod(self.levels) > 2**20:
            raise ValueError(f"levels {list(self.levels)}: {math.prod(self.levels):,} codes, at most {2**20:,}")
        return self


class PatchesConfig(Strict):
    """An image in square patches, a code each.

    Attributes:
        image_size: Side of the square images, in pixels.
        patch_size: Side of the square that a code stands for, in pixels; divides `image_size`.
    """

    image_size: Count = 64
    patch_size: Count = 8

    @model_validator(mode="after")
    def _whole_patches(self) -> PatchesConfig:
        if self.image_size % self.patch_size:
            raise ValueError(f"image_size {self.image_size} is not a multiple of patch_size {self.patch_size}")
        return self


class PatchCodebookConfig(PatchesConfig):
    """The baseline: k-means over patches, without a network.

    Attributes:
        type: "patch_codebook".
        codebook_size: K, the number of codes.
    """

    type: Literal["patch_codebook"] = "patch_codebook"
    codebook_size: Codes = 1024


class ImageVQConfig(PatchesConfig):
    """A learned tokenizer of encoder, codebook and decoder.

    Attributes:
        type: "image_vq".
        hidden_size: Channels on the grid of codes.
        encoder_layers: Residual blocks there, before the codebook.
        decoder_layers: And after it.
        thin_size: Channels at half the image's resolution.
        thin_layers: Residual blocks there, in the encoder and again in the decoder.
        quantizer: The codebook, "vq" or "fsq".
    """

    type: Literal["image_vq"] = "image_vq"
    hidden_size: Count = 192
    encoder_layers: int = Field(default=3, ge=0, le=64)
    decoder_layers: int = Field(default=6, ge=0, le=64)
    thin_size: Count = 24
    thin_layers: int = Field(default=1, ge=0, le=16)
    quantizer: Annotated[VectorQuantizerConfig | FSQConfig, Field(discriminator="type")] = VectorQuantizerConfig()

    @model_validator(mode="after")
    def _even(self) -> ImageVQConfig:
        if self.patch_size % 2:
            raise ValueError(f"patch_size {self.patch_size} must be even")
        return self


class PretrainedTokenizerConfig(Strict):
    """A tokenizer of another library, with its own configuration.

    Attributes:
        type: "diffusers_vq", or "emu3" or "janus" of transformers.
        image_size: Side of the square images that it is given, in pixels.
        model: The configuration of the model's class, as that class writes it.
    """

    type: Literal["diffusers_vq", "emu3", "janus"]
    image_size: Count
    model: dict[str, Any]


ImageTokenizerConfig: TypeAlias = ImageVQConfig | PatchCodebookConfig | PretrainedTokenizerConfig
