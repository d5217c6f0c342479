"""N linear layers with GELU between them: LLaVA-1.5's "mlpNx_gelu" (arXiv:2310.03744).

The first layer goes to the language model's width, the others stay there; "mlp1x_gelu" is one linear layer. GELU is
the exact one, as in the reference. `norm: layer` is the LayerNorm that InternVL (arXiv:2404.16821) puts first;
`hidden_size` widens or narrows what lies between the layers.
"""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor, nn

from polymodal.media_plan import Size
from polymodal.projectors.norm import NormKind, build_norm


class MLPProjector(nn.Module):
    """Features ``[N, P, E]`` to tokens ``[N, P, D]``, each by itself."""

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
        """Build the layers.

        Args:
            embed_dim: E.
            llm_dim: D.
            grid: Rows and columns of the features; the tokens keep it.
            depth: Number of linear layers, 1 or more.
            bias: Whether the layers have a bias.
            norm: What comes before the first one; see `projectors.norm`.
            hidden_size: Width between the layers; D where None.
        """
        super().__init__()
        self.output_grid = grid
        self.norm = build_norm(norm, embed_dim)
        widths = [embed_dim, *[hidden_size or llm_dim] * (depth - 1), llm_dim]
        self.layers = nn.Sequential(nn.Linear(widths[0], widths[1], bias=bias))
        for before, after in pairwise(widths[1:]):
            self.layers.extend([nn.GELU(), nn.Linear(before, after, bias=bias)])

    def forward(self, features: Tensor) -> Tensor:
        """Project features ``[N, P, E]`` to ``[N, P, D]``."""
        tokens: Tensor = self.layers(self.norm(features))
        return tokens
