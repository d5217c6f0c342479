"""The frozen tower that a vision encoder learns from, and what it says of images, kept or fresh.

Images that are not cut pass through the teacher once in a whole run (mirrored ones take the mirrored features);
where every look is another cut, the teacher sees each of them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from polymodal.errors import ConfigError
from polymodal.media_plan import Size
from polymodal.modeling.dual_encoders.base import PairBatch
from polymodal.modeling.dual_encoders.distillation import Distiller
from polymodal.modeling.encoders.pixel_norm import PixelNorm
from polymodal.modeling.encoders.vision import build_vision_encoder

if TYPE_CHECKING:
    from polymodal.config import ImageConfig
    from polymodal.modeling.dual_encoders.base import PairModel
    from polymodal.modeling.dual_encoders.config import DistillConfig


@dataclass(frozen=True)
class Teacher:
    """A frozen tower."""

    encoder: Any  # A `VisionEncoder`, in eval mode
    pixel_norm: PixelNorm
    image: ImageConfig  # Its image rules
    rules: str  # What decides what it says of a tile, besides its weights

    @property
    def features_shape(self) -> tuple[int, int]:
        """(P, E) of what it says of one image."""
        return self.encoder.grid.area, self.encoder.embed_dim

    @torch.no_grad()
    def encode(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Look at tiles: [B, 3, H, W] uint8 to [B, P, E]."""
        found: torch.Tensor = self.encoder(self.pixel_norm(pixel_values))
        return found

    def see(self, batch: PairBatch) -> PairBatch:
        """A batch with what the teacher says of its pixels."""
        assert batch.pixel_values is not None
        return replace(batch, teacher=self.encode(batch.pixel_values))


def load_teacher(distill: DistillConfig, model: PairModel, device: torch.device) -> Teacher:
    """Load a teacher."""
    image = distill.image or model.image
    encoder: Any = build_vision_encoder(distill.tower, tile=Size(*image.tile_size))
    encoder.to(device).eval().requires_grad_(False)
    rules = distill.tower.model_dump_json(exclude={"vision_tower", "revision"})
    return Teacher(encoder, PixelNorm(image.image_mean, image.image_std).to(device), image, rules)


def add_distiller(model: PairModel, teacher: Teacher, distill: DistillConfig) -> None:
    """Give a model the layer that compares its patches with a teacher's features."""
    grid = getattr(model, "patch_grid", None)
    if grid is None:
        raise ConfigError("objective.distill: this model's vision encoder cannot be distilled; leave it out")
    model.distiller = Distiller(
        model.features_shape[1], grid, teacher.encoder.embed_dim, teacher.encoder.grid, distill.loss
    )
