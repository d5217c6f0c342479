"""Learn from another tower's features: the student's patches are to say, linearly, what the teacher's say.

Feature distillation (Romero et al. 2015, arXiv:1412.6550: a regressor between unlike widths; Wei et al. 2022,
arXiv:2205.14141: the teacher's channels made alike before they are compared). The teacher is frozen and its features
are kept, so that an image passes through it once in a whole run. Both grids are averaged to the coarser of the two,
one linear layer leads from the student's width to the teacher's, and the distance is taken on channels of zero mean
and unit variance: without that, the few strong channels of a network with ReLU are all that is learnt, and a cosine is
near 1 from the start. The layer is thrown away after training.
"""

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from polymodal.errors import ConfigError, DataError
from polymodal.media_plan import Size
from polymodal.modeling.dual_encoders.base import PairBatch
from polymodal.modeling.projectors.mlp import Standardize

Distance = Literal["cosine", "smooth_l1"]


class Distiller(nn.Module):
    """The distance between a student's patches and kept features of a teacher."""

    # `fit` must have seen teacher features before the first distance; every process must give it the same ones.

    fitted: Tensor

    def __init__(
        self, width: int, grid: Size, teacher_width: int, teacher_grid: Size, distance: Distance = "cosine"
    ) -> None:
        super().__init__()
        if distance not in ("cosine", "smooth_l1"):
            raise ConfigError(f"distill.loss {distance!r}: use cosine or smooth_l1")
        self.grid, self.teacher_grid, self.distance = grid, teacher_grid, distance
        self.common = Size(min(grid.height, teacher_grid.height), min(grid.width, teacher_grid.width))
        self.head = nn.Linear(width, teacher_width)
        self.standardize = Standardize(teacher_width)
        self.register_buffer("fitted", torch.zeros((), dtype=torch.bool))

    @torch.no_grad()
    def fit(self, features: Tensor) -> None:  # [N, P', E']
        """Measure the teacher's channels."""
        flat = self._teacher(features)
        if not bool(torch.isfinite(flat).all()):
            raise DataError("distill: the teacher's features are not finite")
        self.standardize.measure(flat)
        self.fitted.fill_(True)

    def forward(self, batch: PairBatch, patches: Tensor) -> Tensor:  # patches [B, P, E]
        """Compare."""
        if batch.teacher is None:
            raise DataError("distill: the batch holds no teacher features")
        if not bool(self.fitted):
            raise DataError("distill: the teacher's channels have not been measured; call fit first")
        _check(patches, self.grid, self.head.in_features, "student")
        wanted = self.standardize(self._teacher(batch.teacher))
        # Averaged before the layer: the same, and cheaper by the ratio of the grids.
        said = self.head(pool_grid(patches, self.grid, self.common)).float()
        if self.distance == "cosine":
            return (1 - F.cosine_similarity(said, wanted, dim=-1)).mean()
        return F.smooth_l1_loss(said, wanted)

    def _teacher(self, features: Tensor) -> Tensor:
        """Teacher features in float32 on the common grid."""
        _check(features, self.teacher_grid, self.head.out_features, "teacher")
        return pool_grid(features.to(self.head.weight.device).float(), self.teacher_grid, self.common)


def pool_grid(features: Tensor, grid: Size, target: Size) -> Tensor:  # features [B, P, E] -> [B, P', E]
    """Average features over a coarser grid."""
    if grid == target:
        return features
    maps = features.transpose(1, 2).unflatten(2, (grid.height, grid.width))
    return F.adaptive_avg_pool2d(maps, (target.height, target.width)).flatten(2).transpose(1, 2)


def flip_grid(features: Tensor, grid: Size, flipped: Tensor) -> Tensor:  # features [B, P, E], flipped [B] -> [B, P, E]
    """Mirror the positions of those images that were mirrored."""
    # Kept features are of the image as it lies on disk; an image that is seen mirrored needs them mirrored. (A
    # convolution's features of the mirrored image are not exactly these, but nearer than those of the other side.)
    maps = features.unflatten(1, (grid.height, grid.width))
    return torch.where(flipped[:, None, None, None], maps.flip(2), maps).flatten(1, 2)


def _check(features: Tensor, grid: Size, width: int, whose: str) -> None:
    if features.ndim != 3 or tuple(features.shape[1:]) != (grid.area, width):
        raise DataError(
            f"distill: {whose} features of shape {list(features.shape)}, expected [B, {grid.area}, {width}] "
            f"({grid.height}x{grid.width} positions)"
        )
