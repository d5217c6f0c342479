"""Retrieval: which caption belongs to an image, and which image to a caption, among all of a held-out file.

Recall@1, 5 and 10 both ways (`metrics.retrieval` says how ties are broken), each beside the chance level and
a 95% interval: images are drawn anew with their captions, since captions of one image are not independent.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from polymodal.data.pairs import image_and_captions
from polymodal.data.readers.conversations import Record
from polymodal.errors import DataError
from polymodal.evaluation.embedder import Embedder, Progress
from polymodal.evaluation.task import Figures, Sample, Task
from polymodal.messages import Source
from polymodal.metrics.intervals import mean_interval
from polymodal.metrics.retrieval import IMAGE_TO_TEXT, KS, TEXT_TO_IMAGE, Ranks, chance, embedding_ranks, recall_of
from polymodal.metrics.text import markdown_table, span


@dataclass(frozen=True)
class Recall:
    """One recall."""

    way: str  # "image_to_text" or "text_to_image"
    k: int  # Places that count
    score: float  # 0 to 1
    low: float  # Lower end of the 95% interval
    high: float  # Upper end
    chance: float  # What a random order scores


@dataclass(frozen=True)
class Retrieval:
    """The scores of one file."""

    images: int  # How many there are
    texts: int  # How many there are
    shared: int  # Texts that occur with several images. Only one of these counts as right, which costs recall
    recalls: tuple[Recall, ...]  # All of them
    ranks: Ranks  # Of the first right text of each image, and of each text's image


@dataclass(frozen=True)
class Pairs:
    """Images and their captions."""

    images: tuple[Source, ...]  # [I] where each is
    texts: tuple[str, ...]  # [T]
    image_of_text: tuple[int, ...]  # [T] the image that each text belongs to


def pairs_of(records: Sequence[Record], limit: int | None = None) -> Pairs:
    """Read pairs off records: one image each, with its captions."""
    captions: dict[str, dict[str, None]] = {}
    sources: dict[str, Source] = {}
    for record in records:
        source, own = image_and_captions(record)
        key = source if isinstance(source, str) else repr(source)
        if key not in captions and limit is not None and len(captions) == limit:
            continue
        captions.setdefault(key, {}).update(dict.fromkeys(own))
        sources.setdefault(key, source)
    texts = [(text, number) for number, own in enumerate(captions.values()) for text in own]
    return Pairs(tuple(sources.values()), tuple(t for t, _ in texts), tuple(n for _, n in texts))


def retrieval(embedder: Embedder, pairs: Pairs, *, batch_size: int = 32, progress: Progress | None = None) -> Retrieval:
    """Score a model."""
    if len(pairs.images) < 2:
        raise DataError(f"retrieval among {len(pairs.images)} images says nothing; give two or more")
    image = embedder.images(pairs.images, batch_size=batch_size, progress=progress)
    text = embedder.texts(pairs.texts, batch_size=batch_size, progress=progress)
    own = torch.tensor(pairs.image_of_text)
    ranks = embedding_ranks(image, text, own)
    scores, expected = recall_of(ranks), chance(len(image), own)
    owners = {IMAGE_TO_TEXT: np.arange(len(image)), TEXT_TO_IMAGE: own.numpy()}
    rows = []
    for way, owner in owners.items():
        for k in KS:
            found = (getattr(ranks, way) < k).double().numpy()
            interval = mean_interval(np.bincount(owner, weights=found), np.bincount(owner))
            rows.append(Recall(way, k, scores[f"{way}@{k}"], *interval, expected[f"{way}@{k}"]))
    return Retrieval(len(image), len(text), len(text) - len(set(pairs.texts)), tuple(rows), ranks)


def samples_of(found: Retrieval, pairs: Pairs) -> list[Sample]:
    """What was looked for, as scored samples: each image's captions, then each caption's image."""
    captions: list[list[str]] = [[] for _ in pairs.images]
    for text, owner in zip(pairs.texts, pairs.image_of_text):
        captions[owner].append(text)
    looked = [(IMAGE_TO_TEXT, "<image>", own, image) for image, own in enumerate(captions)]
    looked += [(TEXT_TO_IMAGE, text, [f"image {n}"], n) for text, n in zip(pairs.texts, pairs.image_of_text)]
    ranks = [float(rank) for way in (IMAGE_TO_TEXT, TEXT_TO_IMAGE) for rank in getattr(found.ranks, way)]
    return [
        Sample(f"{way} {number}", way, prompt, tuple(right), RETRIEVAL.metric, {}, {"image": image, "rank": rank},
               f"rank {rank + 1:g}", score=float(rank < 1))
        for number, ((way, prompt, right, image), rank) in enumerate(zip(looked, ranks, strict=True))
    ]  # fmt: skip


def _recalls(samples: Sequence[Sample]) -> Figures:
    """Recall both ways, image to text first."""
    ranks = {
        way: np.array([s.extra["rank"] for s in samples if s.kind == way]) for way in (IMAGE_TO_TEXT, TEXT_TO_IMAGE)
    }
    return {f"{way}@{k}": float((own < k).mean()) for way, own in ranks.items() for k in KS if len(own)}


RETRIEVAL = Task(
    "retrieval", "which caption belongs to an image, and which image to a caption", "recall@1", ("",),
    lambda _folder, _split: (), aggregate=_recalls, group="image",
)  # fmt: skip


def table(result: Retrieval) -> str:
    """The scores as a Markdown table, in percent."""
    shared = f" ({result.shared} of them repeated: only one place counts)" if result.shared else ""
    rows = (
        (f"{row.way.replace('_', ' ')} @{row.k}", f"{row.score:.1%}", span((row.low, row.high)), f"{row.chance:.1%}")
        for row in result.recalls
    )
    table = markdown_table(("", "recall", "95%", "chance"), rows)
    return f"{result.images} images, {result.texts} texts{shared}\n\n{table}"
