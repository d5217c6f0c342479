"""Fewer tokens per tile: r x r neighbouring patches become one, then a linear layer or MLP projects it.

`pixel_shuffle` puts the r x r patches side by side along E (space to depth; Shi et al. 2016, arXiv:1609.05158, run
backwards), as InternVL (arXiv:2404.16821), Idefics3 (arXiv:2408.12637) and SmolVLM (arXiv:2504.05299) do: nothing is
lost, the first layer gets r*r times wider; channels are ordered row offset, column offset, E, as there.
`average_pool` takes the mean.
Difference from the reference: the grid may be any rectangle; the references take the root of P as its side.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from polymodal.errors import ConfigError
from polymodal.media_plan import Size


def pixel_shuffle(features: Tensor, grid: Size, ratio: int) -> Tensor:
    """Put each `ratio` x `ratio` block of patches side by side along the channels.

    Args:
        features: ``[N, P, E]``, P = ``grid.area``, row by row.
        grid: Rows and columns of the features, both divisible by `ratio`.
        ratio: r.

    Returns:
        ``[N, P / r**2, E * r**2]``.
    """
    count, _, width = features.shape
    blocks = features.reshape(count, grid.height // ratio, ratio, grid.width // ratio, ratio, width)
    return blocks.permute(0, 1, 3, 2, 4, 5).reshape(count, -1, width * ratio**2)


def average_pool(features: Tensor, grid: Size, ratio: int) -> Tensor:
    """Take the mean of each `ratio` x `ratio` block of patches.

    Args:
        features: ``[N, P, E]``, P = ``grid.area``, row by row.
        grid: Rows and columns of the features, both divisible by `ratio`.
        ratio: r.

    Returns:
        ``[N, P / r**2, E]``.
    """
    count, _, width = features.shape
    blocks = features.reshape(count, grid.height // ratio, ratio, grid.width // ratio, ratio, width)
    return blocks.mean(dim=(2, 4)).reshape(count, -1, width)


def pooled_grid(name: str, grid: Size, ratio: int) -> Size:
    """The grid that is left after pooling.

    Args:
        name: The projector type, for the error.
        grid: Rows and columns before.
        ratio: r.

    Returns:
        Rows and columns after.

    Raises:
        ConfigError: The grid cannot be cut into blocks of r x r.
    """
    if grid.height % ratio or grid.width % ratio:
        raise ConfigError(
            f"mm_projector_type {name!r} joins {ratio}x{ratio} patches, which does not divide the encoder's grid of "
            f"{grid.height}x{grid.width} (rows x columns)"
        )
    return Size(grid.height // ratio, grid.width // ratio)


class PooledProjector(nn.Module):
    """Features ``[N, P, E]`` to fewer tokens ``[N, Q, D]``: pool, then project."""

    def __init__(
        self, pool: Callable[[Tensor, Size, int], Tensor], grid: Size, ratio: int, projector: nn.Module
    ) -> None:
        """Join the two steps.

        Args:
            pool: `pixel_shuffle` or `average_pool`.
            grid: Rows and columns of the features.
            ratio: r.
            projector: Takes the pooled features to D; built for the pooled grid.
        """
        super().__init__()
        self.pool = pool
        self.grid = grid
        self.ratio = ratio
        self.projector = projector
        self.output_grid = Size(grid.height // ratio, grid.width // ratio)

    def forward(self, features: Tensor) -> Tensor:
        """Pool and project features ``[N, P, E]`` to ``[N, Q, D]``."""
        tokens: Tensor = self.projector(self.pool(features, self.grid, self.ratio))
        return tokens
