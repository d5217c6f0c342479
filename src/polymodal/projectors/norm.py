"""What comes before a projector's first layer: nothing, a LayerNorm, or a fixed standardisation."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

NormKind = Literal["none", "layer", "standardize"]


class Standardize(nn.Module):
    """Subtract a fixed mean from each channel and divide by a fixed deviation.

    For towers whose channels differ widely in size, such as several depths of a convolutional network side by side: a
    LayerNorm would let the loud ones drown the rest. Mean and deviation are measured once, on the first data, and
    travel with the weights; until then this is the identity.
    """

    mean: Tensor
    scale: Tensor

    def __init__(self, embed_dim: int) -> None:
        """Start as the identity.

        Args:
            embed_dim: E, the number of channels.
        """
        super().__init__()
        self.register_buffer("mean", torch.zeros(embed_dim))
        self.register_buffer("scale", torch.ones(embed_dim))

    @torch.no_grad()
    def measure(self, features: Tensor) -> None:
        """Take mean and deviation from data.

        Args:
            features: ``[..., E]``, a fair sample of what will come.
        """
        flat = features.reshape(-1, features.shape[-1]).float()
        deviation = flat.std(dim=0)
        self.mean.copy_(flat.mean(dim=0))
        # A channel that hardly ever moves must not be blown up to noise.
        self.scale.copy_(1 / (deviation + 0.05 * deviation.mean() + 1e-6))

    def forward(self, features: Tensor) -> Tensor:
        """Standardise features ``[..., E]``."""
        return (features - self.mean) * self.scale


def build_norm(kind: NormKind, embed_dim: int) -> nn.Module:
    """Build the layer that a projector starts with.

    Args:
        kind: Which.
        embed_dim: E.

    Returns:
        A module that keeps the shape.
    """
    if kind == "layer":
        return nn.LayerNorm(embed_dim)
    return Standardize(embed_dim) if kind == "standardize" else nn.Identity()
