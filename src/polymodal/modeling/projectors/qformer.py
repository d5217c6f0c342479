"""BLIP-2's Q-Former (arXiv:2301.12597): learned queries look at an image through a BERT and become its tokens.

`QFormer` is the network of all three stages. With its text path it learns from pairs (stage 1); without it, it is the
inside of `QFormerProjector` (stage 2); InstructBLIP (arXiv:2305.06500) keeps the text path there, so that the queries
read the question and fetch what it asks for. The layers are `Blip2QFormerModel` of transformers, so published weights
fit (see `modeling.projectors.qformer_files` for names).

Differences from the reference: the LayerNorm on the tower's output, `ln_vision`, belongs to the Q-Former, with which
it is trained, and not to the tower (transformers keeps it there, as `post_layernorm`), so a frozen tower's output can
be kept and read back; nothing is forced to float32, autocast decides as for every other part; InstructBLIP's own
class is not needed, since it computes the same.
"""

from typing import Any

import torch
from torch import Tensor, nn

from polymodal.config import QFormerConfig
from polymodal.errors import PolymodalError
from polymodal.media_plan import Size
from polymodal.modeling.projectors.mlp import NormKind, build_norm


class QFormer(nn.Module):
    """Queries, optionally followed by text, through a BERT that looks at image features every few layers."""

    def __init__(self, embed_dim: int, config: QFormerConfig, *, text: bool, norm: NormKind = "none") -> None:
        super().__init__()
        from transformers.models.blip_2.modeling_blip_2 import Blip2QFormerModel, Blip2TextEmbeddings

        settings = _settings_of_transformers(embed_dim, config, text)
        self.config = config
        self.embed_dim = embed_dim
        self.norm_kind = norm
        self.norm = build_norm(norm, embed_dim)
        self.ln_vision = nn.LayerNorm(embed_dim, eps=config.vision_norm_eps)
        queries = torch.empty(1, config.num_query_tokens, config.hidden_size)
        self.query_tokens = nn.Parameter(nn.init.normal_(queries, std=config.initializer_range))
        self.embeddings: nn.Module | None = None
        if text:
            self.embeddings = Blip2TextEmbeddings(settings)
            for table in self.embeddings.children():
                assert isinstance(table, nn.Embedding)  # words and positions; torch's own start is 50 times larger
                nn.init.normal_(table.weight, std=config.initializer_range)
                if table.padding_idx is not None:
                    nn.init.zeros_(table.weight[table.padding_idx])
        self.transformer = Blip2QFormerModel(settings)

    @property
    def num_queries(self) -> int:
        """Q."""
        return self.query_tokens.shape[1]

    def encode(
        self,
        features: Tensor | None = None,  # [B, P, E]
        input_ids: Tensor | None = None,  # [B, T]
        attention_mask: Tensor | None = None,  # [B, T]
        mask4d: Tensor | None = None,  # [B, 1, Q + T, Q + T]
    ) -> Tensor:
        """Run queries, text or both."""
        if input_ids is not None:
            self._check_text(input_ids)
        vision = queries = None
        if features is not None:
            vision = self.ln_vision(self.norm(features))
            queries = self.query_tokens.expand(len(features), -1, -1)
        if input_ids is not None:
            assert self.embeddings is not None  # checked above
            hidden = self.embeddings(input_ids=input_ids, query_embeds=queries)
        elif queries is not None:
            hidden = queries
        else:
            raise PolymodalError("the Q-Former was given neither image features nor text")
        count = 0 if queries is None else self.num_queries
        if mask4d is None and input_ids is not None and attention_mask is not None:
            # Four dimensions: transformers would look into a mask of two, which waits for the device.
            mask4d = nn.functional.pad(attention_mask.bool(), (count, 0), value=True)[:, None, None, :]
        out = self.transformer(
            query_embeds=hidden, query_length=count, attention_mask=mask4d, encoder_hidden_states=vision
        )
        found: Tensor = out.last_hidden_state
        return found

    def queries(
        self,
        features: Tensor,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        mask4d: Tensor | None = None,
    ) -> Tensor:  # [B, Q, H]
        """Run as `encode` and keep the queries."""
        return self.encode(features, input_ids, attention_mask, mask4d)[:, : self.num_queries]

    def _check_text(self, input_ids: Tensor) -> None:
        if self.embeddings is None:
            raise PolymodalError("this Q-Former has no text path: it was built for images alone")
        if input_ids.shape[1] > self.config.max_position_embeddings:
            raise PolymodalError(
                f"the Q-Former takes texts of up to {self.config.max_position_embeddings} tokens "
                f"(qformer.max_position_embeddings) and was given {input_ids.shape[1]}"
            )


class QFormerProjector(nn.Module):
    """Features [N, P, E] to tokens [N, Q, D]: the queries of a Q-Former, then one linear layer."""

    def __init__(self, qformer: QFormer, llm_dim: int, *, bias: bool = True) -> None:
        super().__init__()
        self.qformer = qformer
        self.text_context = qformer.embeddings is not None
        self.output_grid = Size(1, qformer.num_queries)
        self.language_projection = nn.Linear(qformer.config.hidden_size, llm_dim, bias=bias)

    @property
    def norm(self) -> nn.Module:
        """What comes first; see `modeling.projectors.mlp`."""
        return self.qformer.norm

    def forward(self, features: Tensor, context: Tensor | None = None) -> Tensor:
        """Project features."""
        # features [N, P, E], context [N, T] -> [N, Q, D]
        if not self.text_context:
            if context is not None:
                raise PolymodalError("this Q-Former reads no text (qformer.text_context is false)")
            tokens: Tensor = self.language_projection(self.qformer.queries(features))
            return tokens
        if context is None:
            raise PolymodalError("this Q-Former reads the question (qformer.text_context), and was given none")
        hidden = self.qformer.encode(features, context.clamp(min=0), context >= 0)
        queries, text = hidden.split([self.qformer.num_queries, context.shape[1]], dim=1)
        tokens = self.language_projection(queries)
        if torch.is_grad_enabled():
            # The last layer's text ends here: its weights get a gradient of zero, which processes wait for.
            tokens = tokens + 0 * text.mean().to(tokens.dtype)
        return tokens


def _settings_of_transformers(embed_dim: int, config: QFormerConfig, text: bool) -> Any:
    """Our settings as transformers names them."""
    from transformers.models.blip_2.configuration_blip_2 import Blip2QFormerConfig

    theirs = Blip2QFormerConfig().to_dict()
    shared = {key: value for key, value in config.model_dump().items() if key in theirs}
    settings = Blip2QFormerConfig(**shared, encoder_hidden_size=embed_dim, use_qformer_text_input=text)
    settings._attn_implementation = "sdpa"  # the one that takes a mask of four dimensions as it is
    return settings
