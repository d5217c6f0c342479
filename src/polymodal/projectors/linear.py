"""One linear layer from the encoder's width to the language model's, as in the first LLaVA (arXiv:2304.08485)."""

from __future__ import annotations

from torch import Tensor, nn

from polymodal.media_plan import Size
from polymodal.projectors.norm import NormKind, build_norm


class LinearProjector(nn.Module):
    """Features ``[N, P, E]`` to tokens ``[N, P, D]``, each by itself."""

    def __init__(self, embed_dim: int, llm_dim: int, grid: Size, *, bias: bool = True, norm: NormKind = "none") -> None:
        """Build the layer.

        Args:
            embed_dim: E.
            llm_dim: D.
            grid: Rows and columns of the features; the tokens keep it.
            bias: Whether the layer has a bias.
            norm: What comes before it; see `projectors.norm`.
        """
        super().__init__()
        self.output_grid = grid
        self.norm = build_norm(norm, embed_dim)
        self.linear = nn.Linear(embed_dim, llm_dim, bias=bias)

    def forward(self, features: Tensor) -> Tensor:
        """Project features ``[N, P, E]`` to ``[N, P, D]``."""
        tokens: Tensor = self.linear(self.norm(features))
        return tokens
