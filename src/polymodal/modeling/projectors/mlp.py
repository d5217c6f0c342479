"""Projectors that look at each token by itself: one linear layer, an MLP, and either after a pooling; and their norms.

"linear" is the first LLaVA's (arXiv:2304.08485), "mlpNx_gelu" LLaVA-1.5's (arXiv:2310.03744): the first layer goes to
the language model's width, the others stay there, with the exact GELU between them. `norm: layer` is the LayerNorm that
InternVL (arXiv:2404.16821) puts first; `hidden_size` widens or narrows what lies between the layers.

Pooling makes one token of r x r neighbouring patches. `pixel_shuffle` puts them side by side along E (space to depth;
Shi et al. 2016, arXiv:1609.05158, run backwards), as InternVL, Idefics3 (arXiv:2408.12637) and SmolVLM
(arXiv:2504.05299) do: nothing is lost, the first layer gets r*r times wider; channels are ordered row offset, column
offset, E, as there. `average_pool` takes the mean. Difference from the reference: the grid may be any rectangle; the
references take the root of P as its side.
"""

from collections.abc import Callable
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn

from polymodal.errors import ConfigError
from polymodal.media_plan import Size

NormKind = Literal["none", "layer", "standardize"]


class Standardize(nn.Module):
    """Subtract a fixed mean from each channel and divide by a fixed deviation."""

    # For towers whose channels differ widely in size, such as several depths of a convolutional network side by side:
    # a LayerNorm would let the loud ones drown the rest. Mean and deviation are measured once, on the first data, and
    # travel with the weights; until then this is the identity.

    mean: Tensor
    scale: Tensor

    def __init__(self, embed_dim: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(embed_dim))
        self.register_buffer("scale", torch.ones(embed_dim))

    @torch.no_grad()
    def measure(self, features: Tensor) -> None:  # [..., E]
        """Take mean and deviation from data."""
        flat = features.reshape(-1, features.shape[-1]).float()
        deviation = flat.std(dim=0)
        self.mean.copy_(flat.mean(dim=0))
        # A channel that hardly ever moves must not be blown up to noise.
        self.scale.copy_(1 / (deviation + 0.05 * deviation.mean() + 1e-6))

    def forward(self, features: Tensor) -> Tensor:
        """Standardise features [..., E]."""
        return (features - self.mean) * self.scale


def build_norm(kind: NormKind, embed_dim: int) -> nn.Module:
    """Build the layer that a projector starts with."""
    if kind == "layer":
        return nn.LayerNorm(embed_dim)
    return Standardize(embed_dim) if kind == "standardize" else nn.Identity()


class LinearProjector(nn.Module):
    """Features [N, P, E] to tokens [N, P, D], each by itself."""

    def __init__(self, embed_dim: int, llm_dim: int, grid: Size, *, bias: bool = True, norm: NormKind = "none") -> None:
        super().__init__()
        self.output_grid = grid
        self.norm = build_norm(norm, embed_dim)
        self.linear = nn.Linear(embed_dim, llm_dim, bias=bias)

    def forward(self, features: Tensor) -> Tensor:
        """Project features [N, P, E] to [N, P, D]."""
        tokens: Tensor = self.linear(self.norm(features))
        return tokens


class MLPProjector(nn.Module):
    """Features [N, P, E] to tokens [N, P, D], each by itself."""

    def __init__(
        self,
        embed_dim: int,
        llm_dim: int,
        grid: Size,
        depth: int = 2,
        *,
        bias: bool = True,
        norm: NormKind = "none",
        hidden_size: int | None = None,
    ) -> None:
        super().__init__()
        self.output_grid = grid
        self.norm = build_norm(norm, embed_dim)
        widths = [embed_dim, *[hidden_size or llm_dim] * (depth - 1), llm_dim]
        self.layers = nn.Sequential(nn.Linear(widths[0], widths[1], bias=bias))
        for before, after in pairwise(widths[1:]):
            self.layers.extend([nn.GELU(), nn.Linear(before, after, bias=bias)])

    def forward(self, features: Tensor) -> Tensor:
        """Project features [N, P, E] to [N, P, D]."""
        tokens: Tensor = self.layers(self.norm(features))
        return tokens


def pixel_shuffle(features: Tensor, grid: Size, ratio: int) -> Tensor:  # features [N, P, E] -> [N, P / r**2, E * r**2]
    """Put each `ratio` x `ratio` block of patches side by side along the channels."""
    return (
        _blocks(features, grid, ratio)
        .permute(0, 1, 3, 2, 4, 5)
        .reshape(len(features), -1, features.shape[2] * ratio**2)
    )


def average_pool(features: Tensor, grid: Size, ratio: int) -> Tensor:  # features [N, P, E] -> [N, P / r**2, E]
    """Take the mean of each `ratio` x `ratio` block of patches."""
    return _blocks(features, grid, ratio).mean(dim=(2, 4)).flatten(1, 2)


def _blocks(features: Tensor, grid: Size, ratio: int) -> Tensor:  # -> [N, rows, r, columns, r, E]
    return features.unflatten(1, (grid.height // ratio, ratio, grid.width // ratio, ratio))


def pooled_grid(name: str, grid: Size, ratio: int) -> Size:
    """The grid that is left after pooling."""
    if grid.height % ratio or grid.width % ratio:
        raise ConfigError(
            f"mm_projector_type {name!r} joins {ratio}x{ratio} patches, which does not divide the encoder's grid of "
            f"{grid.height}x{grid.width} (rows x columns)"
        )
    return Size(grid.height // ratio, grid.width // ratio)


class PooledProjector(nn.Module):
    """Features [N, P, E] to fewer tokens [N, Q, D]: pool, then project."""

    def __init__(
        self, pool: Callable[[Tensor, Size, int], Tensor], grid: Size, ratio: int, projector: nn.Module
    ) -> None:
        super().__init__()
        self.pool = pool
        self.grid = grid
        self.ratio = ratio
        self.projector = projector
        self.output_grid = Size(grid.height // ratio, grid.width // ratio)

    def forward(self, features: Tensor, tokens: Size | None = None) -> Tensor:
        """Pool and project features [N, P, E] to [N, Q, D], `tokens` rows and columns of them where it is given."""
        grid = self.grid if tokens is None else tokens * Size(self.ratio, self.ratio)
        projected: Tensor = self.projector(self.pool(features, grid, self.ratio))
        return projected
