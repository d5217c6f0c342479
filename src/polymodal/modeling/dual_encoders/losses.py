"""The losses that pull a picture and its text together: CLIP's softmax and SigLIP's sigmoid.

CLIP (Radford et al. 2021, arXiv:2103.00020, figure 3) asks each picture which text of the batch is its own, and each
text for its picture: softmax cross entropy over the batch, in both directions. SigLIP (Zhai et al. 2023,
arXiv:2303.15343, equation 1) asks of every picture and text of the batch whether they are a pair: a sigmoid each, so no
row needs to see the whole batch at once.

Every function here gives the share of one process's pairs ("local loss"): [b, B] logits, not [B, B]. Summed over
processes the shares are the papers' loss, and with features gathered by `gather_with_grad` so is the gradient.

Differences from the references: several texts of one picture may be counted as right answers (`own_ids`, `all_ids`);
the papers' data does not tell, and takes them for negatives. Logits are taken in float32 under autocast too: at CLIP's
largest scale, 100, bfloat16 rounds them to the next half.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from polymodal.errors import ConfigError

MAX_LOGIT_SCALE = math.log(100)
"""The temperature's logarithm is kept at most here, as CLIP does."""


def clip_loss(
    image: Tensor,
    text: Tensor,
    logit_scale: Tensor,
    all_image: Tensor,
    all_text: Tensor,
    offset: int,
    own_ids: Tensor | None = None,
    all_ids: Tensor | None = None,
    label_smoothing: float = 0.0,
) -> Tensor:
    """This process's share of CLIP's loss: the mean cross entropy of both directions over the global batch, halved.

    Args:
        image: [b, D] normalised features of this process's pictures.
        text: [b, D] of their texts.
        logit_scale: The logarithm of what multiplies the cosines; a learned scalar.
        all_image: [B, D] of all processes, in global order.
        all_text: [B, D].
        offset: Where this process's rows begin in them.
        own_ids: [b] ids of the pictures. Pairs of one picture then share the right answer equally, in both
            directions; without ids each pair has its own, as in the paper.
        all_ids: [B] of all processes, where `own_ids` are given.
        label_smoothing: This much of the target is spread over all B; none in the paper.

    Returns:
        A scalar, float32 or better.
    """
    scale = at_least_float32(logit_scale).exp()
    to_text, to_image = scale * products(image, all_text), scale * products(text, all_image)
    return both_directions(to_text, to_image, own_ids, all_ids, offset, label_smoothing)


def siglip_loss(
    image: Tensor,
    text: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor,
    all_text: Tensor,
    offset: int,
    chunk: int | None = None,
    own_ids: Tensor | None = None,
    all_ids: Tensor | None = None,
) -> Tensor:
    """This process's share of SigLIP's loss: -log sigmoid of every picture with every text, over the global batch's B.

    Args:
        image: [b, D] normalised features of this process's pictures.
        text: [b, D] of their texts; the loss sees them in `all_text`.
        logit_scale: The logarithm of what multiplies the cosines; a learned scalar.
        logit_bias: Added to the logits; a learned scalar.
        all_text: [B, D] of all processes, in global order.
        offset: Where this process's rows begin in it.
        chunk: Texts at a time. At most [b, chunk] logits then exist, which the backward pass computes again; all at
            once when None.
        own_ids: [b] ids of the pictures. Every text of the same picture then counts as its pair; without ids only its
            own, as in the paper.
        all_ids: [B] of all processes, where `own_ids` are given.

    Returns:
        A scalar, float32 or better.

    Raises:
        ConfigError: `chunk` is less than 1.
    """
    if chunk is not None and chunk < 1:
        raise ConfigError(f"the SigLIP loss takes at least 1 text at a time, not chunk={chunk}")
    total, columns = len(all_text), torch.arange(len(all_text), device=image.device)
    rows = columns[offset : offset + len(text)]
    size = chunk or total
    loss = image.new_zeros((), dtype=torch.promote_types(image.dtype, torch.float32))
    for start in range(0, total, size):
        part = slice(start, start + size)
        if own_ids is None or all_ids is None:
            is_pair = rows[:, None] == columns[None, part]
        else:
            is_pair = own_ids[:, None] == all_ids[None, part]
        inputs = (image, all_text[part], logit_scale, logit_bias, is_pair)
        if size < total and torch.is_grad_enabled():
            loss = loss + checkpoint(_sigmoid_losses, *inputs, use_reentrant=False, preserve_rng_state=False)
        else:
            loss = loss + _sigmoid_losses(*inputs)
    return loss / total


def clamp_logit_scale(logit_scale: Tensor) -> None:
    """Keep the temperature's logarithm at most ln 100, in place; to be called after each optimizer step.

    Args:
        logit_scale: The parameter.
    """
    with torch.no_grad():
        logit_scale.clamp_(max=MAX_LOGIT_SCALE)


def both_directions(
    to_text: Tensor,
    to_image: Tensor,
    own_ids: Tensor | None,
    all_ids: Tensor | None,
    offset: int,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Cross entropy of pictures over texts and of texts over pictures: their mean over the global batch, halved.

    Args:
        to_text: [b, B] logits of this process's pictures.
        to_image: [b, B] logits of this process's texts.
        own_ids: [b]; pairs with the same id share the right answer equally. Without ids each pair has its own.
        all_ids: [B], where `own_ids` are given.
        offset: Where this process's rows begin in the columns.
        label_smoothing: This much of the target is spread over all B.

    Returns:
        This process's share, a scalar.
    """
    if own_ids is None or all_ids is None:
        targets = torch.arange(offset, offset + len(to_text), device=to_text.device)
    else:
        same = (own_ids[:, None] == all_ids[None]).to(to_text.dtype)
        targets = same / same.sum(dim=1, keepdim=True)
    summed = [
        F.cross_entropy(logits, targets, reduction="sum", label_smoothing=label_smoothing)
        for logits in (to_text, to_image)
    ]
    return (summed[0] + summed[1]) / (2 * to_text.shape[1])


def products(left: Tensor, right: Tensor) -> Tensor:
    """Inner products of all rows, in float32 or better whatever autocast says.

    Args:
        left: [n, D].
        right: [m, D].

    Returns:
        [n, m].
    """
    with torch.autocast(left.device.type, enabled=False):
        return at_least_float32(left) @ at_least_float32(right).T


def at_least_float32(tensor: Tensor) -> Tensor:
    """Half precision as float32; anything wider as it is."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _sigmoid_losses(image: Tensor, texts: Tensor, logit_scale: Tensor, logit_bias: Tensor, is_pair: Tensor) -> Tensor:
    """Sum of -log sigmoid over [b, m] pictures and texts: of the logit where they are a pair, else of its negative."""
    logits = at_least_float32(logit_scale).exp() * products(image, texts) + at_least_float32(logit_bias)
    return -F.logsigmoid(torch.where(is_pair, logits, -logits)).sum()
