"""Modules of a user's own as parts of a model: what a part has to say of itself is found by running it once."""

import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from polymodal.config import TowerConfig
from polymodal.errors import ConfigError, first_line
from polymodal.media_plan import Size
from polymodal.modeling.encoders.hf_vision import FAMILIES, HFVisionEncoder
from polymodal.modeling.encoders.vision import VisionEncoder
from polymodal.modeling.projectors import Projector
from polymodal.utils.modules import evaluating


class Own(nn.Module):
    """A user's module, with what running it once has told of it."""

    def __init__(self, module: nn.Module, **facts: Any) -> None:
        super().__init__()
        self.module = module
        vars(self).update(facts)

    def forward(self, inputs: Tensor) -> Tensor:
        """As the module does."""
        return self.module(inputs)  # type: ignore[no-any-return]

    def save(self, folder: Path) -> None:
        """Write the weights, which its maker alone can read."""
        folder.mkdir(parents=True, exist_ok=True)
        save_file(self.module.state_dict(), folder / "model.safetensors")


def measured_encoder(encoder: Any, vision: TowerConfig, tile: Size | None) -> VisionEncoder:
    """A module as a vision encoder: a tower of transformers, or any that turns a tile into features."""
    if all(hasattr(encoder, name) for name in ("embed_dim", "grid", "tile")):
        return encoder  # type: ignore[no-any-return]
    if vision.type in FAMILIES:
        select = vision.mm_vision_select_layer, vision.mm_vision_select_feature
        return HFVisionEncoder(encoder, *select, tile)
    if tile is None:
        raise ConfigError("image: a vision encoder of your own is run once on a tile; say its tile_size")
    shape = _dry_run("vision", encoder, (1, 3, tile.height, tile.width))
    return Own(encoder, embed_dim=shape[2], grid=_grid(shape[1]), tile=tile)  # type: ignore[return-value]


def measured_projector(projector: Any, encoder: VisionEncoder, llm_dim: int) -> Projector:
    """A module as a projector: how many tokens it makes is found by running it once."""
    if hasattr(projector, "output_grid") and not hasattr(encoder, "grid"):
        return projector  # type: ignore[no-any-return]
    if not hasattr(encoder, "grid") or not hasattr(encoder, "embed_dim"):
        raise ConfigError(
            "projector: how many tokens it makes is found behind a vision encoder with `grid` and `embed_dim`; give it "
            "an `output_grid`, or put the model together with `polymodal.compose`, which runs the encoder too"
        )
    _, count, width = _dry_run("projector", projector, (1, encoder.grid.area, encoder.embed_dim))
    if width != llm_dim:
        raise ConfigError(f"projector: makes tokens of width {width}, and the language model takes {llm_dim}")
    if hasattr(projector, "output_grid"):
        return projector  # type: ignore[no-any-return]
    grid = encoder.grid if count == encoder.grid.area else _grid(count)
    return Own(projector, output_grid=grid)  # type: ignore[return-value]


def _grid(count: int) -> Size:
    side = math.isqrt(count)
    return Size(side, side) if side * side == count else Size(1, count)


def _dry_run(part: str, module: nn.Module, shape: tuple[int, ...]) -> tuple[int, int, int]:
    """The shape that a module gives for zeros of a shape."""
    weight = next(module.parameters(), torch.empty(0))
    told = f"{part}: {type(module).__name__} was run on {list(shape)} and"
    try:
        with evaluating(module), torch.no_grad():
            out = module(torch.zeros(shape, device=weight.device, dtype=weight.dtype))
    except Exception as error:  # whatever a stranger's module raises
        raise ConfigError(f"{told} raised {type(error).__name__}: {first_line(error)}") from error
    if not isinstance(out, Tensor) or out.ndim != 3 or len(out) != 1:
        gave = list(out.shape) if isinstance(out, Tensor) else type(out).__name__
        raise ConfigError(f"{told} gave {gave}; a tensor [1, tokens, width] is needed")
    return out.shape[0], out.shape[1], out.shape[2]
