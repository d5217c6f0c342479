"""N linear layers with GELU between them: LLaVA-1.5's "mlpNx_gelu" (arXiv:2310.03744).

The first layer goes to the language model's width, the others stay there; "mlp1x_gelu" is one linear layer. GELU is
the exact one, as in the reference. `norm` adds the LayerNorm that InternVL (arXiv:2404.16821) puts first.
"""

from __future__ import annotations

from torch import Tensor, nn

from polymodal.geometry import Size


class MLPProjector(nn.Module):
    """Features ``[N, P, E]`` to tokens ``[N, P, D]``, each by itself."""

    def __init__(
        self, embed_dim: int, llm_dim: int, grid: Size, depth: int = 2, *, bias: bool = True, norm: bool = False
    ) -> None:
        """Build the layers.

        Args:
            embed_dim: E.
            llm_dim: D.
            grid: Rows and columns of the features; the tokens keep it.
            depth: Number of linear layers, 1 or more.
            bias: Whether the layers have a bias.
            norm: Put a LayerNorm over E before the first one.
        """
        super().__init__()
        self.output_grid = grid
        self.norm = nn.LayerNorm(embed_dim) if norm else nn.Identity()
        self.layers = nn.Sequential(nn.Linear(embed_dim, llm_dim, bias=bias))
        for _ in range(depth - 1):
            self.layers.extend([nn.GELU(), nn.Linear(llm_dim, llm_dim, bias=bias)])

    def forward(self, features: Tensor) -> Tensor:
        """Project features ``[N, P, E]`` to ``[N, P, D]``."""
        tokens: Tensor = self.layers(self.norm(features))
        return tokens
