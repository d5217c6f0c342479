"""The next token's logits, step after step, for both kinds of language model.

A causal LM reads the prompt into its key-value cache and goes on from there. An encoder-decoder's encoder reads the
prompt once; its decoder starts from its start token, with a cache for what it said and one for what it looks at, which
is filled in the first step. Either way the caller gives the ids that were chosen and gets logits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from polymodal.modeling.language_model import decoder_start_id
from polymodal.modeling.seq2seq import move_left, take

if TYPE_CHECKING:
    from transformers import EncoderDecoderCache

    from polymodal.modeling.vlm import MultimodalLM

NextLogits = Callable[[torch.Tensor | None], torch.Tensor]
"""Takes the ids [B] chosen in the step before, None in the first; gives logits [B, V]."""


def start_decoding(model: MultimodalLM, embeds: torch.Tensor, attention_mask: torch.Tensor) -> NextLogits:
    """Begin a generation.

    Args:
        model: The model, in eval mode.
        embeds: [B, T, D] the prompts, media merged.
        attention_mask: [B, T] bool, False on padding, which is on the left.

    Returns:
        What makes the logits of one step after the other.
    """
    start = _encoder_decoder if model.encoder_decoder else _causal
    return start(model, embeds, attention_mask)


def _causal(model: MultimodalLM, embeds: torch.Tensor, attention_mask: torch.Tensor) -> NextLogits:
    from transformers import DynamicCache

    cache = DynamicCache(config=model.llm.config.get_text_config())
    mask = attention_mask
    padded = not bool(mask.all())

    def next_logits(ids: torch.Tensor | None) -> torch.Tensor:
        nonlocal mask
        inputs = {"inputs_embeds": embeds} if ids is None else {"input_ids": ids[:, None]}
        if ids is not None and padded:
            mask = torch.cat((mask, mask.new_ones(len(mask), 1)), dim=1)
        kwargs = model.decoder_inputs(mask, cache) if padded else {}
        logits: torch.Tensor = model.llm(
            **inputs, past_key_values=cache, use_cache=True, logits_to_keep=1, **kwargs
        ).logits
        return logits[:, -1]

    return next_logits


def _encoder_decoder(model: MultimodalLM, embeds: torch.Tensor, attention_mask: torch.Tensor) -> NextLogits:
    llm: Any = model.llm
    index, real = move_left(attention_mask)
    mask = None if bool(real.all()) else real
    encoded = llm.get_encoder()(inputs_embeds=take(embeds, index), attention_mask=mask, return_dict=True)
    cache: EncoderDecoderCache | None = None  # the model makes its own, one part for each of the decoder's attentions
    first = torch.full((len(embeds),), decoder_start_id(llm), device=embeds.device)

    def next_logits(ids: torch.Tensor | None) -> torch.Tensor:
        nonlocal cache
        said = first if ids is None else ids
        out = llm(
            encoder_outputs=encoded,
            attention_mask=mask,
            decoder_input_ids=said[:, None],
            past_key_values=cache,
            use_cache=True,
        )
        cache = out.past_key_values
        last: torch.Tensor = out.logits[:, -1]
        return last

    return next_logits
