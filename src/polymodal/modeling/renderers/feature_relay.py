"""The feature relay of NExT-GPT: hidden states of signal tokens take the place of a pipeline's encoded prompt.

The language model ends its answer with a few signal tokens; learnt queries read their hidden states and give what the
pipeline's text encoder would have given for the caption, which is the target (L2). Wu et al. 2023, arXiv:2309.05519.
The original puts an encoder before the decoder; signal tokens have seen each other in the language model already.

    loss = relay.loss(hidden, torch.cat([renderer.encode(caption) for caption in captions]))
    image = renderer.render(request, prompt_embeds=relay(hidden))
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class FeatureRelay(nn.Module):
    """Queries that read the hidden states of signal tokens."""

    def __init__(
        self, llm_dim: int, text_dim: int, length: int = 77, dim: int = 512, num_layers: int = 4, num_heads: int = 4
    ) -> None:
        super().__init__()
        self.project = nn.Linear(llm_dim, dim)
        self.queries = nn.Parameter(torch.randn(1, length, dim) * dim**-0.5)
        layer = nn.TransformerDecoderLayer(dim, num_heads, 4 * dim, dropout=0.0, batch_first=True, norm_first=True)
        self.decoder = nn.TransformerDecoder(layer, num_layers, nn.LayerNorm(dim))
        self.out = nn.Linear(dim, text_dim)

    def forward(self, hidden: Tensor) -> Tensor:  # [N, S, D] -> [N, L, E]
        """Give what a text encoder would have given."""
        return self.out(self.decoder(self.queries.expand(len(hidden), -1, -1), self.project(hidden)))

    def loss(self, hidden: Tensor, target: Tensor) -> Tensor:  # [N, S, D], [N, L, E]
        """The mean squared distance to the text encoder's output."""
        return F.mse_loss(self(hidden).float(), target.float())
