"""Image tokenizers of other libraries: `VQModel` of diffusers, and those of Emu3 and Janus in transformers.

All take and give pixels from -1 to 1. `VQModel` can be trained further: its encoder gets a gradient, and `legacy` is
off, with which diffusers weighs commitment and codebook the wrong way round (diffusers#8226). The classes of
transformers cannot, since none passes a gradient through its codes; Chameleon's has no decoder, and is refused.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from polymodal.config import parse_config
from polymodal.errors import CheckpointError, ConfigError
from polymodal.media_plan import Size
from polymodal.modeling.pretrained import building
from polymodal.modeling.tokenizers.config import PretrainedTokenizerConfig
from polymodal.modeling.tokenizers.quantizers import Quantized, check_ids
from polymodal.utils.extras import extra
from polymodal.utils.safetensors_io import compare_tensors, copy_tensors, read_header

INSIDE = "vqmodel."
"""What the names of a tokenizer's tensors begin with inside a whole Emu3 or Janus, behind the name of the model."""
EMU3_SIDE = 512
"""Pixels of a side where nobody says: Emu3 takes any size."""
MOST_PARTS = 20_000
"""Modules and parameters of a tokenizer."""


class _Wrapped(nn.Module):
    """What the classes have in common; see `ImageTokenizer`."""

    def __init__(self, config: PretrainedTokenizerConfig, model: nn.Module, codebook_size: int, ratio: int) -> None:
        super().__init__()
        if config.image_size % ratio:
            raise ConfigError(f"image_size {config.image_size} is not a multiple of {ratio}, as this tokenizer needs")
        self.config, self.image_size, self.codebook_size = config, config.image_size, codebook_size
        side = config.image_size // ratio
        self.grid = Size(side, side)
        self.model: Any = model

    def _pixels(self, drawn: Tensor) -> Tensor:
        return (drawn.float() / 2 + 0.5).clamp(0, 1)


class DiffusersVQ(_Wrapped):
    """`VQModel` of diffusers."""

    def __init__(self, config: PretrainedTokenizerConfig) -> None:
        model = _made(config, lambda: _vq_model()(**_known(config.model)))
        super().__init__(config, model, model.quantize.n_e, 2 ** (len(model.config.block_out_channels) - 1))
        model.quantize.legacy = False

    def reconstruct(self, pixels: Tensor) -> tuple[Tensor, Quantized]:
        """Through the codes and back: pixels [N, 3, H, W] to the same, not clipped; and the codes."""
        latents = self.model.encode(2 * pixels - 1).latents
        vectors, loss, (*_, ids) = self.model.quantize(latents.float())
        drawn = self.model.decode(vectors, force_not_quantize=True).sample
        return drawn.float() / 2 + 0.5, Quantized(vectors, ids.view(len(pixels), *latents.shape[2:]), loss)

    forward = reconstruct

    def after_step(self) -> None:
        """Nothing: the codebook has a gradient of its own."""

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """Pixels [N, 3, H, W], 0 to 1, to ids [N, rows * columns]."""
        ids: Tensor = self.model.quantize(self.model.encode(2 * pixels - 1).latents)[2][2]
        return ids.view(len(pixels), self.grid.area)

    @torch.no_grad()
    def decode(self, ids: Tensor) -> Tensor:
        """Ids [N, rows * columns] to pixels [N, 3, H, W], 0 to 1."""
        check_ids(ids, self.codebook_size, self.grid)
        shape = (len(ids), self.grid.height, self.grid.width, self.model.quantize.vq_embed_dim)
        vectors = self.model.quantize.get_codebook_entry(ids.flatten(), shape)
        # With `lookup_from_codebook` the model would look up once more.
        drawn = self.model.decoder(
            self.model.post_quant_conv(vectors), vectors if self.model.config.norm_type == "spatial" else None
        )
        return self._pixels(drawn)


class Emu3VQ(_Wrapped):
    """`Emu3VQVAE` of transformers, on images."""

    def __init__(self, config: PretrainedTokenizerConfig) -> None:
        from transformers.models.emu3 import Emu3VQVAE, Emu3VQVAEConfig

        model = _made(config, lambda: Emu3VQVAE(Emu3VQVAEConfig(**_known(config.model))))
        super().__init__(config, model, model.config.codebook_size, model.vision_spatial_factor)

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """Pixels [N, 3, H, W], 0 to 1, to ids [N, rows * columns]."""
        sizes = torch.tensor([[self.image_size, self.image_size]] * len(pixels))
        return torch.stack(list(self.model.encode(2 * pixels - 1, sizes).image_tokens)).flatten(1)

    @torch.no_grad()
    def decode(self, ids: Tensor) -> Tensor:
        """Ids [N, rows * columns] to pixels [N, 3, H, W], 0 to 1."""
        check_ids(ids, self.codebook_size, self.grid)
        return self._pixels(self.model.decode(ids.view(-1, self.grid.height, self.grid.width)))


class JanusVQ(_Wrapped):
    """`JanusVQVAE` of transformers."""

    def __init__(self, config: PretrainedTokenizerConfig) -> None:
        from transformers.models.janus import JanusVQVAE, JanusVQVAEConfig

        model = _made(config, lambda: JanusVQVAE(JanusVQVAEConfig(**_known(config.model))))
        ratio = 2 ** (len(model.config.channel_multiplier) - 1)
        super().__init__(config, model, model.config.num_embeddings, ratio)
        if self.grid.height != model.config.num_patches:
            raise ConfigError(
                f"image_size {config.image_size}: Janus's tokenizer has {model.config.num_patches} codes a side, so it "
                f"takes {model.config.num_patches * ratio} pixels"
            )

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """Pixels [N, 3, H, W], 0 to 1, to ids [N, rows * columns]."""
        ids: Tensor = self.model.encode(2 * pixels - 1).image_tokens
        return ids.view(len(pixels), self.grid.area)

    @torch.no_grad()
    def decode(self, ids: Tensor) -> Tensor:
        """Ids [N, rows * columns] to pixels [N, 3, H, W], 0 to 1."""
        check_ids(ids, self.codebook_size, self.grid)
        return self._pixels(self.model.decode(ids))


PRETRAINED: dict[str, Callable[[PretrainedTokenizerConfig], nn.Module]] = {
    "diffusers_vq": DiffusersVQ,
    "emu3": Emu3VQ,
    "janus": JanusVQ,
}
"""Name -> class."""


def load_published(folder: Path, settings: dict[str, Any], image_size: int | None) -> nn.Module:
    """Load the folder of a tokenizer as its authors publish it, alone or inside of a whole model."""
    config = _published_config(folder, settings, image_size)
    found: dict[str, Path] = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= dict.fromkeys(read_header(path), path)
    inside = {name: path for name, path in found.items() if INSIDE in name}
    if not found:
        raise CheckpointError(f"{folder}: holds no safetensors; other forms of weights are not read")
    given: dict[str, Tensor] = {}
    for path in sorted(set((inside or found).values())):
        with safe_open(path, framework="pt") as file:  # of a whole model the tokenizer alone
            mine = [name for name, where in (inside or found).items() if where == path]
            given |= {f"model.{name.split(INSIDE, 1)[-1]}": file.get_tensor(name) for name in mine}
    with torch.device("meta"):
        compare_tensors(PRETRAINED[config.type](config).state_dict(), given, folder)
    tokenizer = PRETRAINED[config.type](config)
    copy_tensors(tokenizer.state_dict(), given, folder)
    return tokenizer


def _published_config(folder: Path, settings: dict[str, Any], image_size: int | None) -> PretrainedTokenizerConfig:
    """Tell whose tokenizer a `config.json` describes."""
    kind = settings.get("_class_name") or settings.get("model_type")
    inner = settings.get("vq_config", settings)
    if not isinstance(inner, dict):
        raise ConfigError(f"{folder}: vq_config is {inner!r:.40}, not a mapping of keys")
    if kind == "VQModel":
        name, side = "diffusers_vq", _number(settings, "sample_size", 32, folder)
    elif kind in ("emu3", "emu3_vqgan"):
        name, side = "emu3", EMU3_SIDE
    elif kind in ("janus", "janus_vqgan"):
        levels = inner.get("channel_multiplier", (1, 1, 2, 2, 4))
        if not isinstance(levels, list | tuple) or not 0 < len(levels) < 10:
            raise ConfigError(f"{folder}: channel_multiplier is {levels!r:.40}, not a list of a few numbers")
        name, side = "janus", _number(inner, "num_patches", 32, folder) * 2 ** (len(levels) - 1)
    elif kind in ("chameleon", "chameleon_vqgan"):
        raise ConfigError(
            f"{folder}: ChameleonVQVAE of transformers has no decoder, so its codes cannot be drawn; use a VQModel, "
            "Emu3 or Janus"
        )
    else:
        raise ConfigError(f"{folder}: {kind!r} is no image tokenizer known here; known are VQModel, emu3 and janus")
    plain = {"type": name, "image_size": image_size or side, "model": _plain(inner)}
    return parse_config(PretrainedTokenizerConfig, plain, str(folder))


def _number(settings: dict[str, Any], key: str, usual: int, folder: Path) -> int:
    value = settings.get(key, usual)
    if not isinstance(value, int) or not 0 < value <= 4096:
        raise ConfigError(f"{folder}: {key} is {value!r:.40}, not a number from 1 to 4096")
    return value


def _plain(settings: dict[str, Any]) -> dict[str, Any]:
    """A configuration without what only says who wrote it."""
    written = {"architectures", "dtype", "torch_dtype", "transformers_version", "model_type"}
    return {key: value for key, value in settings.items() if not key.startswith("_") and key not in written}


def _known(settings: dict[str, Any]) -> dict[str, Any]:
    """A copy that the class may keep; lists of names as tuples, as diffusers has them."""
    copied = json.loads(json.dumps(settings))
    return {key: tuple(value) if isinstance(value, list) else value for key, value in copied.items()}


def _made(config: PretrainedTokenizerConfig, build: Callable[[], Any]) -> Any:
    """Build a model of another library, whose many complaints about a configuration become one line."""
    with building(f"{config.type} tokenizer", MOST_PARTS):
        return build().eval()


def _vq_model() -> Any:
    return extra("diffusers", "a VQModel needs", "polymodal[diffusion]").VQModel
