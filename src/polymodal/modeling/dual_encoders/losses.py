"""The losses that pull an image and its text together: CLIP's softmax, SigLIP's sigmoid, and BLIP-2's three.

CLIP (Radford et al. 2021, arXiv:2103.00020, figure 3) asks each image which text of the batch is its own, and each
text for its image: softmax cross entropy over the batch, in both directions. SigLIP (Zhai et al. 2023,
arXiv:2303.15343, equation 1) asks of every image and text of the batch whether they are a pair: a sigmoid each, so no
row needs to see the whole batch at once. The first stage of BLIP-2 (Li et al. 2023, arXiv:2301.12597, section 3.1,
after ALBEF, arXiv:2107.07651, and BLIP, arXiv:2201.12086) adds up three:

- ITC, contrastive: queries and text do not see each other; an image is as close to a text as the closest of its
  queries; label smoothing 0.1.
- ITM, matching: both see each other; is this the image's text? Negatives are drawn from the whole step, the closer the
  likelier; the logits of all queries are averaged.
- ITG, captioning: the text sees the queries and its own past (UniLM, Dong et al. 2019, arXiv:1905.03197); label
  smoothing 0.1.

Every function here gives the share of one process's pairs ("local loss"): [b, B] logits, not [B, B]. Summed over
micro-batches and processes the shares are the papers' loss, and with features gathered by `gather_with_grad` so is the
gradient.

Differences from the references: pairs of one image, or of one text, are right answers for each other and never
negatives (`pair_ids`, `right_pairs`); the papers' data does not tell. Logits are taken in float32 under autocast too:
at CLIP's largest scale, 100, bfloat16 rounds them to the next half. BLIP-2's negatives are drawn with one multinomial
per direction, not one host-side draw a row as in LAVIS, and do not depend on the number of processes.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from polymodal.errors import ConfigError, DataError

MAX_LOGIT_SCALE = math.log(100)
"""The temperature's logarithm is kept at most here, as CLIP does."""

IGNORED = -100
"""The label of a position that predicts nothing."""


def pair_ids(image_ids: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """Number the images and texts of a step, equal ones alike."""
    # image_ids [B], input_ids [B, T], attention_mask [B, T] -> [B, 2]
    texts = input_ids.masked_fill(~attention_mask.bool(), -1)
    numbers = [torch.unique(rows, dim=0, return_inverse=True)[1] for rows in (image_ids, texts)]
    return torch.stack(numbers, dim=1)


def right_pairs(own_ids: Tensor, all_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Which texts of a step are right for each image, and which images for each text: shown together by any pair."""
    # own_ids [b], all_ids [B] of images, every text another; or of images and texts, [b, 2] and [B, 2] -> [b, B] twice
    if all_ids.ndim == 1:
        same = own_ids[:, None] == all_ids[None]
        return same, same
    images, texts = all_ids.unbind(1)
    together = torch.zeros((int(images.max()) + 1, int(texts.max()) + 1), dtype=torch.bool, device=all_ids.device)
    together[images, texts] = True
    return together[own_ids[:, :1], texts[None]], together[images[None], own_ids[:, 1:]]


def clip_loss(
    image: Tensor,  # [b, D]
    text: Tensor,  # [b, D]
    logit_scale: Tensor,
    all_image: Tensor,  # [B, D]
    all_text: Tensor,  # [B, D]
    offset: int,
    own_ids: Tensor | None = None,  # [b], or [b, 2] with the texts
    all_ids: Tensor | None = None,  # [B] or [B, 2]
    label_smoothing: float = 0.0,
) -> Tensor:
    """This process's share of CLIP's loss: the mean cross entropy of both directions over the global batch, halved."""
    scale = at_least_float32(logit_scale).exp()
    to_text, to_image = scale * products(image, all_text), scale * products(text, all_image)
    return both_directions(to_text, to_image, own_ids, all_ids, offset, label_smoothing)


def siglip_loss(
    image: Tensor,  # [b, D]
    text: Tensor,  # [b, D]
    logit_scale: Tensor,
    logit_bias: Tensor,
    all_text: Tensor,  # [B, D]
    offset: int,
    chunk: int | None = None,
    own_ids: Tensor | None = None,  # [b], or [b, 2] with the texts
    all_ids: Tensor | None = None,  # [B] or [B, 2]
) -> Tensor:
    """This process's share of SigLIP's loss: -log sigmoid of every image with every text, over the batch's B."""
    if chunk is not None and chunk < 1:
        raise ConfigError(f"the SigLIP loss takes at least 1 text at a time, not chunk={chunk}")
    total, columns = len(all_text), torch.arange(len(all_text), device=image.device)
    rows = columns[offset : offset + len(text)]
    size = chunk or total
    loss = image.new_zeros((), dtype=torch.promote_types(image.dtype, torch.float32))
    if own_ids is None or all_ids is None:
        own_ids, all_ids = rows, columns
    right = right_pairs(own_ids, all_ids)[0]
    for start in range(0, total, size):
        part = slice(start, start + size)
        inputs = (image, all_text[part], logit_scale, logit_bias, right[:, part])
        if size < total and torch.is_grad_enabled():
            loss = loss + checkpoint(_sigmoid_losses, *inputs, use_reentrant=False, preserve_rng_state=False)
        else:
            loss = loss + _sigmoid_losses(*inputs)
    return loss / total


def clamp_logit_scale(logit_scale: Tensor) -> None:
    """Keep the temperature's logarithm at most ln 100, in place; to be called after each optimizer step."""
    with torch.no_grad():
        logit_scale.clamp_(max=MAX_LOGIT_SCALE)


def both_directions(
    to_text: Tensor,  # [b, B]
    to_image: Tensor,  # [b, B]
    own_ids: Tensor | None,  # [b] or [b, 2]
    all_ids: Tensor | None,  # [B] or [B, 2]
    offset: int,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Cross entropy of images over texts and of texts over images: their mean over the global batch, halved."""
    if own_ids is None or all_ids is None:
        plain = torch.arange(offset, offset + len(to_text), device=to_text.device)
        targets = (plain, plain)
    else:
        right = [found.to(to_text.dtype) for found in right_pairs(own_ids, all_ids)]
        targets = (right[0] / right[0].sum(dim=1, keepdim=True), right[1] / right[1].sum(dim=1, keepdim=True))
    options: dict[str, Any] = {"reduction": "sum", "label_smoothing": label_smoothing}
    summed = F.cross_entropy(to_text, targets[0], **options) + F.cross_entropy(to_image, targets[1], **options)
    return summed / (2 * to_text.shape[1])


def products(left: Tensor, right: Tensor) -> Tensor:  # left [n, D], right [m, D] -> [n, m]
    """Inner products of all rows, in float32 or better whatever autocast says."""
    with torch.autocast(left.device.type, enabled=False):
        return at_least_float32(left) @ at_least_float32(right).T


def at_least_float32(tensor: Tensor) -> Tensor:
    """Half precision as float32; anything wider as it is."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def unit(vectors: Tensor) -> Tensor:
    """Vectors of length one, in float32 or better."""
    return F.normalize(at_least_float32(vectors), dim=-1)


def _sigmoid_losses(image: Tensor, texts: Tensor, logit_scale: Tensor, logit_bias: Tensor, is_pair: Tensor) -> Tensor:
    """Sum of -log sigmoid over [b, m] images and texts: of the logit where they are a pair, else of its negative."""
    logits = at_least_float32(logit_scale).exp() * products(image, texts) + at_least_float32(logit_bias)
    return -F.logsigmoid(torch.where(is_pair, logits, -logits)).sum()


def itc_loss(
    image: Tensor,  # [b, Q, D]
    text: Tensor,  # [b, D]
    temperature: Tensor,
    all_image: Tensor,  # [B, Q, D]
    all_text: Tensor,  # [B, D]
    own_ids: Tensor | None,  # [b] or [b, 2]
    all_ids: Tensor | None,  # [B] or [B, 2]
    offset: int,
    label_smoothing: float = 0.1,
) -> tuple[Tensor, Tensor, Tensor]:
    """This process's share of the contrastive loss."""
    # What is right shares 1 - `label_smoothing` of the target equally; the rest goes to all B alike.
    to_text, to_image = similarities(image, text, temperature, all_image, all_text)
    share = both_directions(to_text, to_image, own_ids, all_ids, offset, label_smoothing)
    return share, to_text.detach(), to_image.detach()


def similarities(
    image: Tensor, text: Tensor, temperature: Tensor, all_image: Tensor, all_text: Tensor
) -> tuple[Tensor, Tensor]:
    """How close images and texts are: the largest cosine over an image's queries, divided by the temperature."""
    # image [b, Q, D], text [b, D], all_image [B, Q, D], all_text [B, D] -> [b, B]
    by_query = products(image.flatten(0, 1), all_text).unflatten(0, image.shape[:2])
    to_queries = products(text, all_image.flatten(0, 1)).unflatten(1, all_image.shape[:2])
    divisor = at_least_float32(temperature)
    # Not amax: it would keep all queries' cosines for the backward pass.
    return by_query.max(dim=1).values / divisor, to_queries.max(dim=2).values / divisor


@torch.no_grad()
def draw_negatives(
    similarity: Tensor, own_ids: Tensor, all_ids: Tensor, offset: int, random: torch.Generator | int
) -> Tensor:
    """Draw a negative for each row, with the probability that a softmax gives it among all that are none of its own."""
    # One random number is drawn for each pair of the global batch, on the CPU; so processes and micro-batches that
    # give the same seed draw what a single batch would.
    # similarity [b, B], own_ids [b], all_ids [B] -> [b]
    if isinstance(random, int):
        random = torch.Generator().manual_seed(random)
    allowed = own_ids[:, None] != all_ids[None]
    if not bool(allowed.any(dim=1).all()):
        raise DataError(
            f"the {len(all_ids)} pairs of a step all show the same image, so none can be a negative of another: "
            "use a larger batch, or more images"
        )
    weights = similarity.double().masked_fill(~allowed, -torch.inf).softmax(dim=1)
    bounds = weights.cumsum(dim=1)
    drawn = torch.rand(len(all_ids), generator=random, dtype=torch.float64)[offset : offset + len(weights)]
    places = drawn.to(bounds.device)[:, None] * bounds[:, -1:]
    columns = torch.searchsorted(bounds, places, right=True).clamp_(max=len(all_ids) - 1)
    # A parallel sum on a GPU may round up over a column of no weight; then the likeliest is taken.
    return torch.where(allowed.gather(1, columns), columns, weights.argmax(dim=1, keepdim=True))[:, 0]


def itm_inputs(negative_images: Tensor, negative_texts: Tensor, offset: int) -> tuple[Tensor, Tensor]:
    """Which image and which text of the global batch each row of the matching loss takes."""
    # negative_images [b], negative_texts [b] -> [3b]
    own = torch.arange(offset, offset + len(negative_images), device=negative_images.device)
    return torch.cat([own, negative_images, own]), torch.cat([own, own, negative_texts])


def itm_loss(logits: Tensor, pairs: int | Tensor | None = None) -> tuple[Tensor, Tensor]:  # logits [3b, Q, 2]
    """The share of the matching loss of b pairs, in the order of `itm_inputs`."""
    averaged = at_least_float32(logits)
    if logits.ndim == 3:
        averaged = averaged.mean(dim=1)
    own = len(averaged) // 3
    labels = (torch.arange(len(averaged), device=logits.device) < own).long()
    loss = F.cross_entropy(averaged, labels, reduction="sum") / (3 * (own if pairs is None else pairs))
    return loss, (averaged.argmax(dim=1) == labels).sum()


def itg_targets(input_ids: Tensor, attention_mask: Tensor, start_id: int) -> tuple[Tensor, Tensor, Tensor]:
    """What the Q-Former reads when it captions, and what it should say."""
    # input_ids [b, T], attention_mask [b, T] -> [b, T]
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
    """The share of the captioning loss of some texts."""
    # logits [b, T, V], labels [b, T]
    if logits.ndim == 3:
        logits, labels = logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    targets = (labels != IGNORED).sum() if count is None else count
    summed = F.cross_entropy(
        at_least_float32(logits), labels, reduction="sum", ignore_index=IGNORED, label_smoothing=label_smoothing
    )
    return summed / torch.as_tensor(targets, device=summed.device).clamp(min=1)
