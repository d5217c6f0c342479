"""Encoder features ``[N, P, E]`` to language-model tokens ``[N, Q, D]``: one table, one builder.

`mm_projector_type` is LLaVA's name for the choice. Simple types carry their numbers in their names ("mlp2x_gelu",
"pixel_shuffle2_mlp2x_gelu"), so each entry of `PROJECTORS` is a pattern for the whole name and a builder; "qformer",
"resampler" and "abstractor" have settings of their own, under their name.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from polymodal.config import AbstractorConfig, ProjectorConfig, QFormerConfig, ResamplerConfig
from polymodal.errors import unknown_name
from polymodal.media_plan import Size
from polymodal.modeling.projectors.abstractor import CAbstractor
from polymodal.modeling.projectors.mlp import (
    LinearProjector,
    MLPProjector,
    PooledProjector,
    average_pool,
    pixel_shuffle,
    pooled_grid,
)
from polymodal.modeling.projectors.qformer import QFormer, QFormerProjector
from polymodal.modeling.projectors.resampler import Resampler


class Projector(Protocol):
    """What a projector offers; every implementation is also an ``nn.Module``.

    Attributes:
        output_grid: Rows and columns of the tokens of one tile; ``Size(1, Q)`` where they have no order in space.
    """

    output_grid: Size

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """Iterate over the weights, as of ``nn.Module``."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Give the weights by name, as of ``nn.Module``."""
        ...

    def to(self, device: torch.device, dtype: torch.dtype) -> Any:
        """Move the weights and change their type, as of ``nn.Module``."""
        ...

    def __call__(self, features: Tensor) -> Tensor:
        """Project features ``[N, P, E]`` to tokens ``[N, Q, D]``, Q = ``output_grid.area``."""
        ...


class Widths(NamedTuple):
    """The sizes a projector is built between."""

    embed_dim: int
    grid: Size
    llm_dim: int


def _linear(match: re.Match[str], config: ProjectorConfig, sizes: Widths) -> Projector:
    """Build "linear"."""
    return LinearProjector(sizes.embed_dim, sizes.llm_dim, sizes.grid, bias=config.bias, norm=config.norm)


def _mlp(match: re.Match[str], config: ProjectorConfig, sizes: Widths) -> Projector:
    """Build "mlp<N>x_gelu"."""
    return MLPProjector(
        sizes.embed_dim,
        sizes.llm_dim,
        sizes.grid,
        int(match["depth"]),
        bias=config.bias,
        norm=config.norm,
        hidden_size=config.hidden_size,
    )


def _pooled(
    pool: Callable[[Tensor, Size, int], Tensor],
) -> Callable[[re.Match[str], ProjectorConfig, Widths], Projector]:
    """Make the builder of "<pool><r>", "<pool><r>_linear" and "<pool><r>_mlp<N>x_gelu"."""

    def build(match: re.Match[str], config: ProjectorConfig, sizes: Widths) -> Projector:
        ratio = int(match["ratio"])
        grid = pooled_grid(match[0], sizes.grid, ratio)
        width = sizes.embed_dim * ratio**2 if pool is pixel_shuffle else sizes.embed_dim
        then = config.model_copy(update={"mm_projector_type": match["then"] or "linear"})
        inner = build_projector(then, width, grid, sizes.llm_dim)
        assert isinstance(inner, nn.Module)
        return PooledProjector(pool, sizes.grid, ratio, inner)

    return build


def _qformer(match: re.Match[str], config: ProjectorConfig, sizes: Widths) -> Projector:
    """Build "qformer"; its text path only where it reads a context."""
    settings = config.qformer or QFormerConfig()
    qformer = QFormer(sizes.embed_dim, settings, text=settings.text_context, norm=config.norm)
    return QFormerProjector(qformer, sizes.llm_dim, bias=config.bias)


def _resampler(match: re.Match[str], config: ProjectorConfig, sizes: Widths) -> Projector:
    """Build "resampler"."""
    settings = (config.resampler or ResamplerConfig()).model_dump()
    return Resampler(sizes.embed_dim, sizes.llm_dim, sizes.grid, bias=config.bias, norm=config.norm, **settings)


def _abstractor(match: re.Match[str], config: ProjectorConfig, sizes: Widths) -> Projector:
    """Build "abstractor"."""
    settings = (config.abstractor or AbstractorConfig()).model_dump()
    return CAbstractor(sizes.embed_dim, sizes.llm_dim, sizes.grid, bias=config.bias, norm=config.norm, **settings)


class Kind(NamedTuple):
    """One entry of the table: which names it answers to, and how it is built."""

    pattern: re.Pattern[str]
    build: Callable[[re.Match[str], ProjectorConfig, Widths], Projector]


_RATIO_THEN = r"(?P<ratio>[1-9]\d*)(_(?P<then>linear|mlp[1-9]\d*x_gelu))?"

PROJECTORS: dict[str, Kind] = {
    "linear": Kind(re.compile(r"linear"), _linear),
    "mlp<N>x_gelu": Kind(re.compile(r"mlp(?P<depth>[1-9]\d*)x_gelu"), _mlp),
    "pixel_shuffle<r>": Kind(re.compile(rf"pixel_shuffle{_RATIO_THEN}"), _pooled(pixel_shuffle)),
    "avg_pool<r>": Kind(re.compile(rf"avg_pool{_RATIO_THEN}"), _pooled(average_pool)),
    "qformer": Kind(re.compile(r"qformer"), _qformer),
    "resampler": Kind(re.compile(r"resampler"), _resampler),
    "abstractor": Kind(re.compile(r"abstractor"), _abstractor),
}


def build_projector(config: ProjectorConfig, embed_dim: int, grid: Size, llm_dim: int) -> Projector:
    """Build the projector that a config asks for, with fresh weights.

    Args:
        config: The projector part of a model's config. "pixel_shuffle<r>" and "avg_pool<r>" may name what follows
            them ("pixel_shuffle2_mlp2x_gelu"); alone they are followed by "linear". `norm` is applied after pooling.
        embed_dim: E, the encoder's width.
        grid: Rows and columns of the encoder's features.
        llm_dim: D, the language model's width.

    Returns:
        The projector, an ``nn.Module``.

    Raises:
        ConfigError: An unknown type, or one that does not fit the grid.
    """
    name = config.mm_projector_type
    for kind in PROJECTORS.values():
        match = kind.pattern.fullmatch(name)
        if match:
            return kind.build(match, config, Widths(embed_dim, grid, llm_dim))
    examples = [name.replace("<N>", number).replace("<r>", number) for name in PROJECTORS for number in "234"]
    raise unknown_name("mm_projector_type", name, {*examples, *PROJECTORS})
