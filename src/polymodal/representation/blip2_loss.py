"""BLIP-2's three losses of its first stage; `masks` has the attention masks that go with them.

Li et al. 2023, arXiv:2301.12597, section 3.1, after ALBEF (arXiv:2107.07651) and BLIP (arXiv:2201.12086):

- ITC, contrastive: queries and text do not see each other (`unimodal_mask`); a picture is as close to a text as the
  closest of its queries; label smoothing 0.1.
- ITM, matching: both see each other (`bidirectional_mask`); is this the picture's text? Negatives are drawn from the
  whole step, the closer the likelier; the logits of all queries are averaged.
- ITG, captioning: text sees the queries and the text before it, queries only themselves (`unilm_mask`, from UniLM, Dong
  et al. 2019, arXiv:1905.03197); label smoothing 0.1.

The loss is their plain sum. Each function gives a share that sums over micro-batches and processes to the mean over the
global batch.

Differences from the reference (LAVIS): negatives are drawn with one multinomial per direction, not one host-side draw a
row, and do not depend on the number of processes; the pairs of one picture are never each other's negatives; the
gradient may cross processes (`gather_with_grad`), where LAVIS cuts it (`gather`).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from polymodal.errors import DataError
from polymodal.modeling.dual_encoders.losses import at_least_float32, both_directions, products

IGNORED = -100
"""The label of a position that predicts nothing."""


def itc_loss(
    image: Tensor,
    text: Tensor,
    temperature: Tensor,
    all_image: Tensor,
    all_text: Tensor,
    own_ids: Tensor | None,
    all_ids: Tensor | None,
    offset: int,
    label_smoothing: float = 0.1,
) -> tuple[Tensor, Tensor, Tensor]:
    """This process's share of the contrastive loss.

    Pairs of one picture share 1 - `label_smoothing` of the target equally; the rest goes to all B alike.

    Args:
        image: [b, Q, D] normalised query features of this process's pictures.
        text: [b, D] normalised features of their texts.
        temperature: Divides the cosines; a learned scalar.
        all_image: [B, Q, D] of all processes, in global order.
        all_text: [B, D].
        own_ids: [b] ids of the pictures; with None every pair is of a picture of its own.
        all_ids: [B], where `own_ids` are given.
        offset: Where this process's rows begin in the global batch.
        label_smoothing: Spread over all B.

    Returns:
        The share, and the logits of pictures to texts and of texts to pictures, [b, B] and detached, for
        `draw_negatives`.
    """
    to_text, to_image = similarities(image, text, temperature, all_image, all_text)
    share = both_directions(to_text, to_image, own_ids, all_ids, offset, label_smoothing)
    return share, to_text.detach(), to_image.detach()


def similarities(
    image: Tensor, text: Tensor, temperature: Tensor, all_image: Tensor, all_text: Tensor
) -> tuple[Tensor, Tensor]:
    """How close pictures and texts are: the largest cosine over a picture's queries, divided by the temperature.

    Args:
        image: [b, Q, D], normalised.
        text: [b, D], normalised.
        temperature: A scalar.
        all_image: [B, Q, D].
        all_text: [B, D].

    Returns:
        [b, B] of pictures to all texts, and [b, B] of texts to all pictures.
    """
    by_query = products(image.flatten(0, 1), all_text).unflatten(0, image.shape[:2])
    to_queries = products(text, all_image.flatten(0, 1)).unflatten(1, all_image.shape[:2])
    divisor = at_least_float32(temperature)
    # Not amax: it would keep all queries' cosines for the backward pass.
    return by_query.max(dim=1).values / divisor, to_queries.max(dim=2).values / divisor


@torch.no_grad()
def draw_negatives(
    similarity: Tensor, own_ids: Tensor, all_ids: Tensor, offset: int, random: torch.Generator | int
) -> Tensor:
    """Draw a negative for each row, with the probability that a softmax gives it among all that are none of its own.

    One random number is drawn for each pair of the global batch, on the CPU; so processes and micro-batches that give
    the same seed draw what a single batch would.

    Args:
        similarity: [b, B] logits, from `itc_loss` or `similarities`.
        own_ids: [b] ids of the rows' pictures.
        all_ids: [B] of the columns'; those with the row's id are never drawn.
        offset: Where the rows begin in the global batch.
        random: A seed, or a CPU generator at the same place in every process. Give the two directions different seeds,
            or one generator, one after the other.

    Returns:
        [b] int64 columns.

    Raises:
        DataError: There is nothing to draw from, since all pairs are of one picture.
    """
    if isinstance(random, int):
        random = torch.Generator().manual_seed(random)
    allowed = own_ids[:, None] != all_ids[None]
    if not bool(allowed.any(dim=1).all()):
        raise DataError(
            f"the {len(all_ids)} pairs of a step all show the same picture, so none can be a negative of another: "
            "use a larger batch, or more pictures"
        )
    weights = similarity.double().masked_fill(~allowed, -torch.inf).softmax(dim=1)
    bounds = weights.cumsum(dim=1)
    drawn = torch.rand(len(all_ids), generator=random, dtype=torch.float64)[offset : offset + len(weights)]
    places = drawn.to(bounds.device)[:, None] * bounds[:, -1:]
    columns = torch.searchsorted(bounds, places, right=True).clamp_(max=len(all_ids) - 1)
    # A parallel sum on a GPU may round up over a column of no weight; then the likeliest is taken.
    return torch.where(allowed.gather(1, columns), columns, weights.argmax(dim=1, keepdim=True))[:, 0]


def itm_inputs(negative_images: Tensor, negative_texts: Tensor, offset: int) -> tuple[Tensor, Tensor]:
    """Which picture and which text of the global batch each row of the matching loss takes.

    Args:
        negative_images: [b] drawn for each text.
        negative_texts: [b] drawn for each picture.
        offset: Where these pairs begin in the global batch.

    Returns:
        [3b] rows of pictures and [3b] rows of texts: the pairs, then negative pictures with the texts, then the
        pictures with negative texts.
    """
    own = torch.arange(offset, offset + len(negative_images), device=negative_images.device)
    return torch.cat([own, negative_images, own]), torch.cat([own, own, negative_texts])


def itm_loss(logits: Tensor, pairs: int | Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The share of the matching loss of b pairs, in the order of `itm_inputs`.

    Args:
        logits: [3b, Q, 2], of each query; or [3b, 2], averaged already. Column 1 says that they match.
        pairs: Of the whole step; these b when None.

    Returns:
        The share, and how many of the 3b are right, a scalar tensor.
    """
    averaged = at_least_float32(logits)
    if logits.ndim == 3:
        averaged = averaged.mean(dim=1)
    own = len(averaged) // 3
    labels = (torch.arange(len(averaged), device=logits.device) < own).long()
    loss = F.cross_entropy(averaged, labels, reduction="sum") / (3 * (own if pairs is None else pairs))
    return loss, (averaged.argmax(dim=1) == labels).sum()


def itg_targets(input_ids: Tensor, attention_mask: Tensor, start_id: int) -> tuple[Tensor, Tensor, Tensor]:
    """What the Q-Former reads when it captions, and what it should say.

    Args:
        input_ids: [b, T], padded on the right.
        attention_mask: [b, T]; False or 0 for padding.
        start_id: The token that stands in the place of the first, [DEC], and tells captioning from reading.

    Returns:
        [b, T] decoder ids; [R] positions in the flattened [b * T] that predict a token, for a head that runs on these
        alone; [R] the tokens that they predict.
    """
    decoder_ids = input_ids.clone()
    decoder_ids[:, 0] = start_id
    predicting = torch.zeros_like(attention_mask, dtype=torch.bool)
    predicting[:, :-1] = attention_mask[:, 1:].bool()
    rows = predicting.flatten().nonzero()[:, 0]
    return decoder_ids, rows, decoder_ids.flatten()[rows + 1]


def itg_count(attention_mask: Tensor) -> Tensor:
    """How many tokens a batch's captions predict, of [b, T]; a scalar tensor."""
    return attention_mask[:, 1:].sum()


def itg_loss(logits: Tensor, labels: Tensor, label_smoothing: float = 0.1, count: int | Tensor | None = None) -> Tensor:
    """The share of the captioning loss of some texts.

    Args:
        logits: [b, T, V], of all positions; or [R, V], of those of `itg_targets`.
        labels: [b, T] the tokens that stand there, `IGNORED` for padding, shifted here by one; or [R] targets.
        label_smoothing: Spread over the vocabulary.
        count: Targets of the whole step, as `itg_count` gives; those in `labels` when None.

    Returns:
        A scalar, float32 or better.
    """
    if logits.ndim == 3:
        logits, labels = logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    targets = (labels != IGNORED).sum() if count is None else count
    summed = F.cross_entropy(
        at_least_float32(logits), labels, reduction="sum", ignore_index=IGNORED, label_smoothing=label_smoothing
    )
    return summed / torch.as_tensor(targets, device=summed.device).clamp(min=1)
