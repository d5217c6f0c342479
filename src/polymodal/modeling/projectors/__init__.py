"""Encoder features [N, P, E] to language-model tokens [N, Q, D]: one table, one builder.

`mm_projector_type` is LLaVA's name for the choice. Simple types carry their numbers in their names ("mlp2x_gelu",
"pixel_shuffle2_mlp2x_gelu"), so each entry of `PROJECTORS` is a pattern for the whole name and a builder; "qformer",
"resampler", "abstractor" and "summary" have settings of their own, under their name.
"""

import re
from collections.abc import Callable
from typing import NamedTuple, Protocol

from torch import Tensor, nn

from polymodal.config import AbstractorConfig, ProjectorConfig, QFormerConfig, ResamplerConfig, SummaryConfig
from polymodal.errors import unknown_name
from polymodal.media_plan import Size
from polymodal.modeling.projectors import mlp
from polymodal.modeling.projectors.abstractor import CAbstractor
from polymodal.modeling.projectors.qformer import QFormer, QFormerProjector
from polymodal.modeling.projectors.resampler import Resampler
from polymodal.modeling.projectors.summary import SummaryProjector
from polymodal.utils.modules import ModuleLike


class Projector(ModuleLike, Protocol):
    """What a projector offers.

    Attributes:
        output_grid: Rows and columns of the tokens of one tile; `Size(1, Q)` where they have no order in space.
    """

    output_grid: Size

    def __call__(self, features: Tensor) -> Tensor:
        """Project features [N, P, E] to tokens [N, Q, D], Q = `output_grid.area`."""
        ...


class Widths(NamedTuple):
    """The sizes a projector is built between."""

    embed_dim: int
    llm_dim: int
    grid: Size


Build = Callable[[re.Match[str], ProjectorConfig, Widths], Projector]


def _linear(match: re.Match[str], config: ProjectorConfig, sizes: Widths) -> Projector:
    return mlp.LinearProjector(*sizes, bias=config.bias, norm=config.norm)


def _mlp(match: re.Match[str], config: ProjectorConfig, sizes: Widths) -> Projector:
    depth, hidden_size = int(match["depth"]), config.hidden_size
    return mlp.MLPProjector(*sizes, depth, bias=config.bias, norm=config.norm, hidden_size=hidden_size)


def _pooled(pool: Callable[[Tensor, Size, int], Tensor]) -> Build:
    """Make the builder of "<pool><r>", "<pool><r>_linear" and "<pool><r>_mlp<N>x_gelu"."""

    def build(match: re.Match[str], config: ProjectorConfig, sizes: Widths) -> Projector:
        ratio = int(match["ratio"])
        grid = mlp.pooled_grid(match[0], sizes.grid, ratio)
        width = sizes.embed_dim * ratio**2 if pool is mlp.pixel_shuffle else sizes.embed_dim
        then = config.model_copy(update={"mm_projector_type": match["then"] or "linear"})
        inner = build_projector(then, width, grid, sizes.llm_dim)
        assert isinstance(inner, nn.Module)
        return mlp.PooledProjector(pool, sizes.grid, ratio, inner)

    return build


def _qformer(match: re.Match[str], config: ProjectorConfig, sizes: Widths) -> Projector:
    settings = config.qformer or QFormerConfig()
    qformer = QFormer(sizes.embed_dim, settings, text=settings.text_context, norm=config.norm)
    return QFormerProjector(qformer, sizes.llm_dim, bias=config.bias)


def _resampler(match: re.Match[str], config: ProjectorConfig, sizes: Widths) -> Projector:
    settings = (config.resampler or ResamplerConfig()).model_dump()
    return Resampler(*sizes, bias=config.bias, norm=config.norm, **settings)


def _abstractor(match: re.Match[str], config: ProjectorConfig, sizes: Widths) -> Projector:
    settings = (config.abstractor or AbstractorConfig()).model_dump()
    return CAbstractor(*sizes, bias=config.bias, norm=config.norm, **settings)


def _summary(match: re.Match[str], config: ProjectorConfig, sizes: Widths) -> Projector:
    settings = config.summary or SummaryConfig()
    inner = mlp.MLPProjector(*sizes, bias=config.bias, norm=config.norm, hidden_size=settings.mlp_hidden_size)
    return SummaryProjector(inner, sizes.llm_dim, settings)


_RATIO_THEN = r"(?P<ratio>[1-9]\d*)(_(?P<then>linear|mlp[1-9]\d*x_gelu))?"

PROJECTORS: dict[str, tuple[str, Build]] = {
    "linear": (r"linear", _linear),
    "mlp<N>x_gelu": (r"mlp(?P<depth>[1-9]\d*)x_gelu", _mlp),
    "pixel_shuffle<r>": (rf"pixel_shuffle{_RATIO_THEN}", _pooled(mlp.pixel_shuffle)),
    "avg_pool<r>": (rf"avg_pool{_RATIO_THEN}", _pooled(mlp.average_pool)),
    "qformer": (r"qformer", _qformer),
    "resampler": (r"resampler", _resampler),
    "abstractor": (r"abstractor", _abstractor),
    "summary": (r"summary", _summary),
}
"""Name -> the pattern of the names it answers to, and its builder."""


def build_projector(config: ProjectorConfig, embed_dim: int, grid: Size, llm_dim: int) -> Projector:
    """Build the projector that a config asks for, with fresh weights.

    Args:
        config: The projector part of a model's config. "pixel_shuffle<r>" and "avg_pool<r>" may name what follows
            them ("pixel_shuffle2_mlp2x_gelu"); alone they are followed by "linear". `norm` is applied after pooling.
        embed_dim: E, the encoder's width.
        grid: Rows and columns of the encoder's features.
        llm_dim: D, the language model's width.

    Returns:
        The projector, an nn.Module.

    Raises:
        ConfigError: An unknown type, or one that does not fit the grid.
    """
    name = config.mm_projector_type
    for pattern, build in PROJECTORS.values():
        match = re.fullmatch(pattern, name)
        if match:
            return build(match, config, Widths(embed_dim, llm_dim, grid))
    examples = [name.replace("<N>", number).replace("<r>", number) for name in PROJECTORS for number in "234"]
    raise unknown_name("mm_projector_type", name, {*examples, *PROJECTORS})
