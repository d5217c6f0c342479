"""Honeybee's C-Abstractor (arXiv:2312.06742): convolutions, a pooling to a square of tokens, convolutions, an MLP.

Convolutions let a token see its neighbourhood and keep where it is, which attention of a few free queries loses; the
number of tokens can be chosen all the same. A block is RegNet-Y's bottleneck (arXiv:2003.13678): 1x1, depthwise 3x3,
squeeze and excitation (arXiv:1709.01507), 1x1, with a residual, a LayerNorm over the channels after each convolution
and SiLU. Differences from the reference: the grid may be any rectangle that is not smaller than the square of tokens
(the reference takes the root of P); the MLP has GELU, as LLaVA's.
"""

import math
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from polymodal.errors import ConfigError
from polymodal.media_plan import Size
from polymodal.modeling.projectors.mlp import NormKind, build_norm

INIT_STD = 0.02
SQUEEZE = 4
"""How much narrower the middle of a squeeze and excitation is than its block's input."""


class LayerNorm2d(nn.LayerNorm):
    """A LayerNorm over the channels of maps."""

    def forward(self, maps: Tensor) -> Tensor:
        """Normalise maps [N, C, H, W]."""
        return super().forward(maps.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class SqueezeExcite(nn.Module):
    """Weigh each channel by what all channels are on average."""

    def __init__(self, channels: int, inner: int) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(channels, inner, 1)
        self.excite = nn.Conv2d(inner, channels, 1)

    def forward(self, maps: Tensor) -> Tensor:
        """Weigh maps [N, C, H, W]."""
        gate = self.excite(F.silu(self.squeeze(maps.mean(dim=(2, 3), keepdim=True))))
        return maps * gate.sigmoid()


class Bottleneck(nn.Module):
    """RegNet-Y's block."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(before, after, 1, bias=False),
            LayerNorm2d(after),
            nn.SiLU(),
            nn.Conv2d(after, after, 3, padding=1, groups=after, bias=False),
            LayerNorm2d(after),
            nn.SiLU(),
            SqueezeExcite(after, max(1, before // SQUEEZE)),
            nn.Conv2d(after, after, 1, bias=False),
            LayerNorm2d(after),
        )
        self.shortcut: nn.Module = nn.Identity()
        if before != after:
            self.shortcut = nn.Sequential(nn.Conv2d(before, after, 1, bias=False), LayerNorm2d(after))

    def forward(self, maps: Tensor) -> Tensor:
        """Take maps [N, C, H, W] to [N, C', H, W]."""
        return F.silu(self.body(maps) + self.shortcut(maps))


class CAbstractor(nn.Module):
    """Features [N, P, E] on a grid to a square of tokens [N, Q, D]."""

    def __init__(
        self,
        embed_dim: int,
        llm_dim: int,
        grid: Size,
        *,
        num_query_tokens: int = 144,
        hidden_size: int = 1024,
        depth: int = 3,
        mlp_depth: int = 2,
        bias: bool = True,
        norm: NormKind = "none",
    ) -> None:
        super().__init__()
        side = math.isqrt(num_query_tokens)
        if side > min(grid.height, grid.width):
            raise ConfigError(
                f"abstractor.num_query_tokens {num_query_tokens} needs {side}x{side} patches or more, the encoder's "
                f"grid is {grid.height}x{grid.width} (rows x columns; a class token leaves one row)"
            )
        self.grid = grid
        self.output_grid = Size(side, side)
        self.norm = build_norm(norm, embed_dim)
        self.positions = nn.Parameter(INIT_STD * torch.randn(grid.area, embed_dim))
        self.before = _blocks(embed_dim, hidden_size, depth)
        self.after = _blocks(hidden_size, hidden_size, depth)
        widths = [hidden_size, *[llm_dim] * mlp_depth]
        self.readout = nn.Sequential(nn.Linear(widths[0], widths[1], bias=bias))
        for inside, outside in pairwise(widths[1:]):
            self.readout.extend([nn.GELU(), nn.Linear(inside, outside, bias=bias)])

    def forward(self, features: Tensor) -> Tensor:
        """Project features [N, P, E] to [N, Q, D], row by row."""
        patches = self.norm(features) + self.positions
        maps = patches.transpose(1, 2).unflatten(2, (self.grid.height, self.grid.width))
        pooled = F.adaptive_avg_pool2d(self.before(maps), (self.output_grid.height, self.output_grid.width))
        tokens: Tensor = self.readout(self.after(pooled).flatten(2).transpose(1, 2))
        return tokens


def _blocks(before: int, after: int, depth: int) -> nn.Sequential:
    """So many blocks, the first of which changes the width."""
    return nn.Sequential(*(Bottleneck(before if number == 0 else after, after) for number in range(depth)))
