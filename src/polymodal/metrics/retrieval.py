"""How well images find their captions, captions their images, and images the names of their classes.

Recall@k as Karpathy and Fei-Fei report it (2015, arXiv:1412.2306): an image has found its caption if any of its
captions is among the k nearest; a caption must find its one image. Zero-shot classification is CLIP's (Radford et
al. 2021, arXiv:2103.00020, section 3.1.4): a class is the mean of its prompts' unit vectors, made a unit vector again.

Ties are broken pessimistically: what scores the same as the right answer is counted before it. A model that gives one
score to everything has recall 0, not 1 (`argsort` and `topk` would credit it with the order of the file). Embeddings
may hold several vectors an image, as a Q-Former's queries do; the best one counts, as in BLIP-2 (arXiv:2301.12597).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from polymodal.errors import DataError

KS = (1, 5, 10)
IMAGE_TO_TEXT = "image_to_text"
TEXT_TO_IMAGE = "text_to_image"
BUDGET = 64 << 20
"""Bytes that similarities may take at a time."""


@dataclass(frozen=True)
class Ranks:
    """How many wrong answers stand before the first right one; 0 is a hit at the first place."""

    image_to_text: Tensor  # [I]; the best placed of an image's captions counts
    text_to_image: Tensor  # [T]


def recall(similarity: Tensor, image_of_text: Tensor, ks: Sequence[int] = KS) -> dict[str, float]:
    """Recall at k, both ways."""
    # similarity [I, T], image_of_text [T]
    _check_pairs(similarity.shape[0], similarity.shape[1], image_of_text)
    return recall_of(similarity_ranks(similarity, image_of_text), ks)


def recall_of(ranks: Ranks, ks: Sequence[int] = KS) -> dict[str, float]:
    """Recall at k from ranks."""
    sides = {IMAGE_TO_TEXT: ranks.image_to_text, TEXT_TO_IMAGE: ranks.text_to_image}
    return {f"{side}@{k}": float((found < k).double().mean()) for side, found in sides.items() for k in ks}


def chance(images: int, image_of_text: Tensor, ks: Sequence[int] = KS) -> dict[str, float]:  # image_of_text [T]
    """Recall of a random order, exactly."""
    captions = torch.bincount(image_of_text.cpu(), minlength=images)
    to_text = {f"{IMAGE_TO_TEXT}@{k}": _hit_by_chance(captions, len(image_of_text), k) for k in ks}
    return to_text | {f"{TEXT_TO_IMAGE}@{k}": min(1.0, k / images) for k in ks}


def similarity_ranks(similarity: Tensor, image_of_text: Tensor) -> Ranks:  # similarity [I, T], image_of_text [T]
    """Ranks from a whole matrix."""
    own = image_of_text.to(similarity.device)
    right = own[None, :] == torch.arange(similarity.shape[0], device=own.device)[:, None]
    return Ranks(_ranks(similarity, right), _ranks(similarity.T, right.T))


def embedding_ranks(image: Tensor, text: Tensor, image_of_text: Tensor, *, budget: int = BUDGET) -> Ranks:
    """Ranks from embeddings, a part of the matrix at a time."""
    # image [I, D], text [T, D], image_of_text [T]
    _check_pairs(len(image), len(text), image_of_text)
    own = image_of_text.to(text.device)
    every = torch.arange(len(image), device=own.device)
    by_image = [
        _ranks(similarities(image[part], text), own[None, :] == part[:, None])
        for part in every.split(_rows(image, len(text), budget))
    ]
    by_text = [
        _ranks(similarities(image, text[part]).T, own[part][:, None] == every[None, :])
        for part in torch.arange(len(text), device=own.device).split(_rows(image, len(image), budget))
    ]
    return Ranks(torch.cat(by_image), torch.cat(by_text))


def similarities(image: Tensor, text: Tensor) -> Tensor:  # image [I, D], text [T, D] -> [I, T]
    """Dot products, the greatest over an image's vectors."""
    if image.ndim == 3:
        return torch.einsum("iqd,td->iqt", image, text).amax(dim=1)
    return image @ text.T


def class_embeddings(prompts: Tensor) -> Tensor:  # [C, N, D] -> [C, D]
    """One unit vector a class from the vectors of its prompts."""
    mean = torch.nn.functional.normalize(prompts, dim=-1).mean(dim=1)
    return torch.nn.functional.normalize(mean, dim=-1)


def zero_shot(image: Tensor, classes: Tensor, labels: Tensor, *, budget: int = BUDGET) -> dict[str, float]:
    """Share of images whose class is the nearest, and among the five nearest."""
    # image [I, D], classes [C, D], labels [I]
    ranks = zero_shot_ranks(image, classes, labels, budget=budget)
    return {f"top{k}": float((ranks < k).double().mean()) for k in (1, 5)}


def zero_shot_ranks(image: Tensor, classes: Tensor, labels: Tensor, *, budget: int = BUDGET) -> Tensor:
    """How many wrong classes stand before the first right one."""
    # image [I, D], classes [C, D], labels [I] -> [I]
    right = right_classes(labels, len(classes)).to(image.device)
    if len(right) != len(image):
        raise DataError(f"{len(image)} images but labels of {len(right)}")
    parts = torch.arange(len(image), device=image.device).split(_rows(image, len(classes), budget))
    return torch.cat([_ranks(similarities(image[part], classes), right[part]) for part in parts])


def right_classes(labels: Tensor, classes: int) -> Tensor:  # labels [I] -> [I, C]
    """Labels as a table of what is right."""
    if labels.ndim == 1:
        if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < classes:
            raise DataError(f"labels from {int(labels.min())} to {int(labels.max())}, but there are {classes} classes")
        return torch.nn.functional.one_hot(labels, classes).bool()
    if labels.shape[1] != classes:
        raise DataError(f"labels for {labels.shape[1]} classes, but there are {classes}")
    if not bool(labels.any(dim=1).all()):
        raise DataError(f"image {int((~labels.any(dim=1)).nonzero()[0])} has no right class")
    return labels.bool()


def zero_shot_chance(labels: Tensor, classes: int) -> dict[str, float]:  # labels [I]
    """What a random order of the classes scores, exactly."""
    right = right_classes(labels, classes).sum(dim=1)
    return {f"top{k}": _hit_by_chance(right, classes, k) for k in (1, 5)}


def _hit_by_chance(right: Tensor, among: int, k: int) -> float:  # right [N], how many answers of each are right
    """How often a right answer is among the first k in a random order."""
    k = min(k, among)
    # All k places hold wrong answers in C(A - c, k) of C(A, k) orders.
    hit = {c: 1 - math.comb(among - c, k) / math.comb(among, k) for c in set(right.tolist())}
    return sum(hit[c] for c in right.tolist()) / len(right)


def _ranks(scores: Tensor, right: Tensor) -> Tensor:
    """Of each row [R, C]: how many wrong columns score at least as high as its best right one."""
    if not bool(torch.isfinite(scores).all()):
        raise DataError("a similarity is not finite: the model gives NaN or infinite embeddings")
    best = scores.masked_fill(~right, -torch.inf).amax(dim=1, keepdim=True)
    return ((scores >= best) & ~right).sum(dim=1)


def _rows(image: Tensor, columns: int, budget: int) -> int:  # image [I, D] or [I, Q, D]
    # Scores, the masked copy and the masks: about ten bytes an entry, for each of an image's vectors.
    queries = image.shape[1] if image.ndim == 3 else 1
    return max(1, budget // (10 * max(1, columns * queries)))


def _check_pairs(images: int, texts: int, image_of_text: Tensor) -> None:
    if len(image_of_text) != texts:
        raise DataError(f"{texts} texts but image_of_text has {len(image_of_text)}")
    if not images or not texts:
        raise DataError(f"nothing to find: {images} images, {texts} texts")
    low, high = int(image_of_text.min()), int(image_of_text.max())
    if low < 0 or high >= images:
        raise DataError(f"image_of_text goes from {low} to {high}, but there are {images} images")
    lonely = torch.bincount(image_of_text.cpu(), minlength=images) == 0
    if bool(lonely.any()):
        raise DataError(f"image {int(lonely.nonzero()[0])} has no text")
