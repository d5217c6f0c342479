"""Flamingo's Perceiver resampler (arXiv:2204.14198, section 3.1.1): a fixed number of latents look at the patches.

In each layer the latents attend to the patches and to themselves at once (keys and values are both, side by side) and
go through a feed-forward part, each with a residual; patches do not change. Differences from the reference: each patch
has a learned position, where Flamingo, made for video, has one for each frame; the width is the encoder's unless
another is chosen, and a linear layer ends in the language model's width.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from polymodal.media_plan import Size
from polymodal.modeling.projectors.mlp import NormKind, build_norm

INIT_STD = 0.02


class ResamplerLayer(nn.Module):
    """Latents attend to patches and latents, then a feed-forward part."""

    def __init__(self, width: int, heads: int, head_dim: int, ratio: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_patches = nn.LayerNorm(width)
        self.norm_latents = nn.LayerNorm(width)
        self.query = nn.Linear(width, heads * head_dim, bias=False)
        self.key_value = nn.Linear(width, 2 * heads * head_dim, bias=False)
        self.output = nn.Linear(heads * head_dim, width, bias=False)
        self.feed_forward = nn.Sequential(
            nn.LayerNorm(width),
            nn.Linear(width, width * ratio, bias=False),
            nn.GELU(),
            nn.Linear(width * ratio, width, bias=False),
        )

    def forward(self, patches: Tensor, latents: Tensor) -> Tensor:
        """Update latents [N, Q, W] from patches [N, P, W]."""
        count = len(latents)
        normed = self.norm_latents(latents)
        seen = torch.cat((self.norm_patches(patches), normed), dim=1)
        query = self.query(normed).view(count, normed.shape[1], self.heads, -1).transpose(1, 2)
        keys = self.key_value(seen).view(count, seen.shape[1], 2, self.heads, -1).permute(2, 0, 3, 1, 4)
        found = F.scaled_dot_product_attention(query, keys[0], keys[1])
        latents = latents + self.output(found.transpose(1, 2).flatten(2))
        updated: Tensor = latents + self.feed_forward(latents)
        return updated


class Resampler(nn.Module):
    """Features [N, P, E] to a fixed number of tokens [N, Q, D]."""

    def __init__(
        self,
        embed_dim: int,
        llm_dim: int,
        grid: Size,
        *,
        num_query_tokens: int = 64,
        hidden_size: int | None = None,
        num_layers: int = 6,
        num_attention_heads: int = 8,
        head_dim: int = 64,
        intermediate_ratio: int = 4,
        bias: bool = True,
        norm: NormKind = "none",
    ) -> None:
        super().__init__()
        width = hidden_size or embed_dim
        self.output_grid = Size(1, num_query_tokens)
        self.norm = build_norm(norm, embed_dim)
        self.input = nn.Linear(embed_dim, width) if width != embed_dim else nn.Identity()
        self.positions = nn.Parameter(INIT_STD * torch.randn(grid.area, width))
        self.latents = nn.Parameter(INIT_STD * torch.randn(num_query_tokens, width))
        self.layers = nn.ModuleList(
            ResamplerLayer(width, num_attention_heads, head_dim, intermediate_ratio) for _ in range(num_layers)
        )
        self.final_norm = nn.LayerNorm(width)
        self.output = nn.Linear(width, llm_dim, bias=bias)

    def forward(self, features: Tensor) -> Tensor:
        """Project features [N, P, E] to [N, Q, D]."""
        patches = self.input(self.norm(features)) + self.positions
        latents = self.latents.to(patches.dtype).expand(len(features), -1, -1)
        for layer in self.layers:
            latents = layer(patches, latents)
        tokens: Tensor = self.output(self.final_norm(latents))
        return tokens
