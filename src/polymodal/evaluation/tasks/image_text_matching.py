"""What stage 1 of BLIP-2 is judged by: retrieval with its matching head's second look, and matching by itself.

Retrieval is by contrast, which is cheap: every image and every text is embedded once. The matching head sees image
and text together and is dearer, so it only orders the k that contrast found nearest, as in ALBEF (Li et al. 2021,
arXiv:2107.07651) and LAVIS, whose sum of both scores is kept here.

Matching is counted as in training, one pair to a hard negative image and a hard negative text: always saying no would
be right in two of three cases, so the mean over pairs and negatives (of which one half is chance) stands beside it.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from polymodal.metrics.retrieval import Ranks, recall_of, similarities, similarity_ranks
from polymodal.modeling.dual_encoders.base import Everyone
from polymodal.modeling.dual_encoders.blip2_stage1 import Blip2Stage1

FAR = -1000.0
"""Added to what the matching head did not look at; no score of it is as low."""


@dataclass(frozen=True)
class Gallery:
    """Held-out images and texts, as the model sees them."""

    features: Tensor  # [I, P, E] of the tower
    input_ids: Tensor  # [T, L], padded on the right
    attention_mask: Tensor  # [T, L] bool
    image_of_text: Tensor  # [T] the image that each text belongs to
    image: Tensor  # [I, Q, D] embedded images
    text: Tensor  # [T, D] embedded texts


@dataclass(frozen=True)
class Matching:
    """How often the matching head is right about pairs and hard negatives."""

    accuracy: float  # Over all of them, one pair to two negatives; always saying no scores 2/3
    balanced: float  # Mean of `pairs` and `negatives`; chance is 1/2
    pairs: float  # Of true pairs
    negatives: float  # Of negatives


@torch.no_grad()
def open_gallery(
    model: Blip2Stage1, features: Tensor, texts: list[str], image_of_text: Tensor, batch: int = 64
) -> Gallery:
    """Embed held-out images and texts."""
    # features [I, P, E], image_of_text [T]
    device = model.words.device
    encoded = model.tokenizer(texts, padding=True, truncation=True, max_length=model.max_text, return_tensors="pt")
    ids, mask = encoded["input_ids"].to(device), encoded["attention_mask"].to(device).bool()
    features = features.to(device)
    image = torch.cat([model.embed_images(part) for part in features.split(batch)])
    text = torch.cat([model.embed_texts(*part) for part in zip(ids.split(batch), mask.split(batch), strict=True)])
    return Gallery(features, ids, mask, image_of_text.to(device), image, text)


def retrieval_scores(model: Blip2Stage1, gallery: Gallery, reranked: int = 0, batch: int = 64) -> dict[str, float]:
    """Recall both ways."""
    close = similarities(gallery.image, gallery.text)
    owner = gallery.image_of_text
    if not reranked:
        return recall_of(similarity_ranks(close, owner))
    to_text = second_look(model, gallery, close, reranked, batch)
    to_image = second_look(model, gallery, close.T, reranked, batch, of_texts=True).T
    ranks = Ranks(similarity_ranks(to_text, owner).image_to_text, similarity_ranks(to_image, owner).text_to_image)
    return recall_of(ranks)


def _match(model: Blip2Stage1, gallery: Gallery, images: Tensor, texts: Tensor) -> Tensor:  # [B], [B] -> [B, 2]
    """The matching head's logits, the mean over queries."""
    queries = model.match_queries(gallery.features[images], gallery.input_ids[texts], gallery.attention_mask[texts])
    return queries.mean(dim=1)


@torch.no_grad()
def second_look(
    model: Blip2Stage1, gallery: Gallery, close: Tensor, nearest: int, batch: int = 64, of_texts: bool = False
) -> Tensor:
    """Let the matching head order what contrast found nearest."""
    # close [N, M] -> [N, M]
    columns = close.topk(min(nearest, close.shape[1]), dim=1).indices
    rows = torch.arange(len(close), device=close.device)[:, None].expand_as(columns)
    found: list[Tensor] = []
    for row, column in zip(rows.flatten().split(batch), columns.flatten().split(batch), strict=True):
        image, text = (column, row) if of_texts else (row, column)
        found.append(_match(model, gallery, image, text)[:, 1].to(close.dtype))
    looked = torch.cat(found).view_as(columns) + close.gather(1, columns)
    return (close + FAR).scatter(1, columns, looked)


@torch.no_grad()
def matching_scores(model: Blip2Stage1, gallery: Gallery, group: int = 64, seed: int = 0) -> Matching:
    """Count how often the matching head is right about held-out pairs and hard negatives drawn among them."""
    owners = gallery.image_of_text.tolist()
    firsts = torch.tensor([owners.index(number) for number in range(len(gallery.features))])
    right: list[Tensor] = []
    for start in range(0, len(firsts), group):
        texts = firsts[start : start + group].to(gallery.text.device)
        if start and len(texts) < group:
            break
        images = torch.arange(start, start + len(texts), device=gallery.text.device)
        pairs = (gallery.image[images], gallery.text[texts], images)
        everyone = Everyone(*pairs, gallery.input_ids[texts], gallery.attention_mask[texts], seed=seed + start)
        which_images, which_texts = model.negatives(everyone, len(texts))
        verdict = _match(model, gallery, images[which_images], texts[which_texts]).argmax(dim=1)
        wanted = torch.arange(len(verdict), device=verdict.device) < len(texts)
        right.append((verdict == wanted.long()).view(3, -1).double().cpu())
    table = torch.cat(right, dim=1)
    positives, negatives = float(table[0].mean()), float(table[1:].mean())
    return Matching(float(table.mean()), (positives + negatives) / 2, positives, negatives)
