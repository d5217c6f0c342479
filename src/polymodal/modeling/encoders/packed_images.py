"""Images of different sizes through one tower at once, without padding: the patches of all of them in one row.

Norms and matrices of a transformer look at each patch by itself; only attention must stay inside an image. So that is
all that differs: the tower's attention, whichever it is, is called for the images of one length at a time, as a batch.
Work grows with the sum of squared lengths, and every layer runs once whatever the images, so that processes which
share layers stay in step. NaViT (arXiv:2307.06304) packs so too, with a mask over the whole row.

It plugs into transformers' `ALL_ATTENTION_FUNCTIONS`, as `modeling.packed_attention` does for language models. Not all
towers hand keyword arguments on to their attention, so the lengths go to a layer, which is where activation
checkpointing computes again, and from there through a context variable.
"""

from collections.abc import Sequence
from contextvars import ContextVar
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from polymodal.modeling.packed_attention import Kernel, eager_attention

PREFIX = "polymodal_images_"
"""Registered name of the attention inside images; what the tower used before is appended."""

_LENGTHS: ContextVar[Sequence[int] | None] = ContextVar("lengths", default=None)


def keep_images_apart(tower: Any, layers: nn.ModuleList) -> None:
    """Let a tower's layers take `lengths`, those of the images in their single row; without it nothing changes."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    before = tower.config._attn_implementation or "eager"
    if before.startswith(PREFIX):
        return

    def attend(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        usual: Kernel = ALL_ATTENTION_FUNCTIONS.get(before) or eager_attention(module)
        if (lengths := _LENGTHS.get()) is None:
            return usual(module, query, key, value, attention_mask, **kwargs)  # type: ignore[no-any-return]
        parts = list(zip(*(part.split(list(lengths), dim=2) for part in (query, key, value)), strict=True))
        pieces: list[Tensor] = [query] * len(parts)
        for length in sorted(set(lengths)):
            alike = [place for place, own in enumerate(lengths) if own == length]
            q, k, v = (torch.cat(side) for side in zip(*(parts[place] for place in alike), strict=True))
            attended, _ = usual(module, q, k, v, None, **kwargs)  # [images, length, heads, d]
            for place, piece in zip(alike, attended.split(1), strict=True):
                pieces[place] = piece
        return torch.cat(pieces, dim=1), None

    ALL_ATTENTION_FUNCTIONS.register(PREFIX + before, attend)
    ALL_MASK_ATTENTION_FUNCTIONS.register(PREFIX + before, ALL_MASK_ATTENTION_FUNCTIONS[before])
    tower.set_attn_implementation(PREFIX + before)
    for layer in layers:
        kind: Any = type(layer)
        layer.__class__ = _with_lengths(kind)


@cache
def _with_lengths(kind: Any) -> Any:
    """A class of layers whose `forward` takes `lengths`; a class, since copies of a layer must not call the first."""

    def forward(self: nn.Module, *args: Any, lengths: Sequence[int] | None = None, **kwargs: Any) -> Any:
        before = _LENGTHS.set(lengths)
        try:
            return kind.forward(self, *args, **kwargs)
        finally:
            _LENGTHS.reset(before)

    return type(kind)(kind.__name__, (kind,), {"forward": forward, "__module__": kind.__module__})
