"""Tokens that sum a tile up, before the tokens of its patches: an MLP for each patch, then a small transformer.

An MLP takes each patch by itself, so what needs several of them (a word of five letters, three of a kind, what the
whole is called) is left to the language model, each pass of which is dear. Here S learned queries and the P patches
look at each other in a few narrow transformer layers, as queries and inputs do in a Perceiver (arXiv:2103.03206),
before they reach it; the patches' own tokens follow, so nothing fine is lost.

Both begin as the MLP alone: the transformer's output is added, by a layer of zeros, to the MLP of the mean patch for
the queries and to each patch's own for the rest. So what a warm start writes into the MLP (class names) is said by
every token, and a classifier's scores, which are made of the mean patch, are said exactly by the first S.
"""

import torch
from torch import Tensor, nn

from polymodal.config import SummaryConfig
from polymodal.media_plan import Size
from polymodal.modeling.projectors.mlp import MLPProjector

INIT_STD = 0.02


class SummaryProjector(nn.Module):
    """Features [N, P, E] to tokens [N, S + P, D], the summary first."""

    def __init__(self, mlp: MLPProjector, llm_dim: int, settings: SummaryConfig) -> None:
        super().__init__()
        width, self.queries = settings.hidden_size, settings.num_query_tokens
        patches = mlp.output_grid.area
        self.output_grid = Size(1, self.queries + patches)
        self.mlp = mlp
        self.input = nn.Linear(llm_dim, width)
        self.places = nn.Parameter(INIT_STD * torch.randn(self.queries + patches, width))
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(
                width, settings.num_attention_heads, 4 * width, dropout=0.0, activation="gelu",
                batch_first=True, norm_first=True,
            )
            for _ in range(settings.num_layers)
        )  # fmt: skip
        self.norm = nn.LayerNorm(width)
        self.output = nn.Linear(width, llm_dim)
        nn.init.zeros_(self.output.weight)
        nn.init.zeros_(self.output.bias)

    def forward(self, features: Tensor, tokens: Size | None = None) -> Tensor:
        """Project features [N, P, E] to [N, S + P, D], to the first tokens of these where fewer are asked for."""
        whole = self.mlp(features.mean(dim=1, keepdim=True))
        said = torch.cat((whole.expand(-1, self.queries, -1), self.mlp(features)), dim=1)
        hidden = self.input(said) + self.places
        for layer in self.layers:
            hidden = layer(hidden)
        count = self.output_grid.area if tokens is None else tokens.area
        summed: Tensor = said[:, :count] + self.output(self.norm(hidden[:, :count]))
        return summed
