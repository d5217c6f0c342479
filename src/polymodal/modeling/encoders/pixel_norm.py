"""Normalising pixels on the device: tiles travel as bytes, a quarter of the memory, and become floats here."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class PixelNorm(nn.Module):
    """uint8 tiles to normalised floats; floats pass through."""

    scale: Tensor
    shift: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        means, stds = (torch.tensor(values, dtype=torch.float64).view(-1, 1, 1) for values in (mean, std))
        # Not in the state: they follow from the configuration. Rounded as `processing.image_transform.normalise` does.
        self.register_buffer("scale", (1 / (255 * stds)).float(), persistent=False)
        self.register_buffer("shift", (means / stds).float(), persistent=False)

    def forward(self, pixels: Tensor) -> Tensor:  # [N, 3, H, W]
        """Normalise."""
        return pixels.float() * self.scale - self.shift if pixels.dtype == torch.uint8 else pixels


class Renorm(nn.Module):
    """Floats that were normalised with one mean and deviation a channel to those of another."""

    scale: Tensor
    shift: Tensor

    def __init__(
        self, had: tuple[Sequence[float], Sequence[float]], wanted: tuple[Sequence[float], Sequence[float]]
    ) -> None:
        super().__init__()
        (m, s), (mean, std) = (
            [torch.tensor(values, dtype=torch.float64).view(-1, 1, 1) for values in norm] for norm in (had, wanted)
        )
        self.register_buffer("scale", (s / std).float(), persistent=False)
        self.register_buffer("shift", ((mean - m) / std).float(), persistent=False)

    def forward(self, pixels: Tensor) -> Tensor:  # [N, 3, H, W]
        """Normalise."""
        return pixels * self.scale - self.shift
