"""Who sees whom in the Q-Former: the three attention masks of BLIP-2's first stage (arXiv:2301.12597, figure 2).

Queries and text go through one transformer side by side, [Q; T]; the mask alone makes it two separate encoders, one
joint encoder or a captioner. Each mask is [b, 1, Q + T, Q + T], True where a row may look at a column, which
transformers' `Blip2QFormerModel` takes as it is with sdpa attention. Cross-attention to the picture is not masked.

Difference from the reference (LAVIS): captioning reuses the keys and values of a pass over the queries there. Under
`unilm_mask` the queries' outputs are those of a pass over the queries alone, so one pass gives both (UniLM, Dong et al.
2019, arXiv:1905.03197).
"""

from __future__ import annotations

import torch
from torch import Tensor


def bidirectional_mask(text_mask: Tensor, queries: int) -> Tensor:
    """Everyone sees everyone, for image-text matching.

    Args:
        text_mask: [b, T]; False or 0 for padding, which nobody sees.
        queries: Q.

    Returns:
        [b, 1, Q + T, Q + T] bool.
    """
    return _mask(text_mask, queries, queries_see_text=True, text_sees_queries=True)


def unimodal_mask(text_mask: Tensor, queries: int) -> Tensor:
    """Queries see queries and text sees text, for contrastive learning.

    Args:
        text_mask: [b, T]; False or 0 for padding, which nobody sees but, in an empty text, itself.
        queries: Q; 0 for a pass over text alone.

    Returns:
        [b, 1, Q + T, Q + T] bool.
    """
    mask = _mask(text_mask, queries, queries_see_text=False, text_sees_queries=False)
    # A row that sees nothing would be no number.
    empty = ~mask.any(dim=-1, keepdim=True)
    return mask | (empty & torch.eye(mask.shape[-1], dtype=torch.bool, device=mask.device))


def unilm_mask(text_mask: Tensor, queries: int) -> Tensor:
    """Queries see queries; text sees the queries and itself up to the same place, for captioning.

    Args:
        text_mask: [b, T]; False or 0 for padding, which nobody sees.
        queries: Q.

    Returns:
        [b, 1, Q + T, Q + T] bool.
    """
    mask = _mask(text_mask, queries, queries_see_text=False, text_sees_queries=True)
    # Queries come first, so this takes nothing from the text's view of them.
    causal = torch.ones(mask.shape[-2:], dtype=torch.bool, device=mask.device).tril_()
    causal[:queries] = True
    return mask & causal


def _mask(text_mask: Tensor, queries: int, queries_see_text: bool, text_sees_queries: bool) -> Tensor:
    count, length = text_mask.shape
    mask = torch.ones((count, 1, queries + length, queries + length), dtype=torch.bool, device=text_mask.device)
    mask[..., queries:] = text_mask.bool()[:, None, None]
    if not queries_see_text:
        mask[:, :, :queries, queries:] = False
    if not text_sees_queries:
        mask[:, :, queries:, :queries] = False
    return mask
