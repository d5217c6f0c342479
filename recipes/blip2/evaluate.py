"""The figures of a BLIP-2 run on held-out pairs: retrieval, matching, and stage 2's captions beside the blind control.

    python recipes/blip2/evaluate.py runs/blip2 --data data/pairs/val.json --json runs/blip2/scores.json

RUN holds `stage1/final` and, where it was trained, `stage2/final`. Retrieval is by contrast alone, and with the
matching head's second look at the nearest (`--rerank`). Matching is judged with hard negatives, drawn as in training.
Captions are scored by the share of a reference's content words that they have. There are two controls: the same model
that sees grey, and its captions of other images, which are written as well as its own but do not look.

Retrieval is by contrast, which is cheap: every image and every text is embedded once. The matching head sees image
and text together and is dearer, so it only orders the k that contrast found nearest, as in ALBEF (Li et al. 2021,
arXiv:2107.07651) and LAVIS, whose sum of both scores is kept here.

Matching is counted as in training, one pair to a hard negative image and a hard negative text: always saying no would
be right in two of three cases, so the mean over pairs and negatives (of which one half is chance) stands beside it.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from polymodal.metrics.retrieval import Ranks, recall_of, similarities, similarity_ranks
from polymodal.modeling.dual_encoders.base import Everyone
from polymodal.modeling.dual_encoders.blip2_stage1 import Blip2Stage1

if TYPE_CHECKING:
    from polymodal.data.readers.conversations import Record
    from polymodal.evaluation.task import Sample


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    from polymodal.data.load import load_records
    from polymodal.modeling.language_model import quieten_transformers
    from polymodal.utils.files import write_text

    quieten_transformers()
    parser = argparse.ArgumentParser(description="Score a BLIP-2 run on held-out pairs.")
    parser.add_argument("run", type=Path, help="the folder of stage1/ and stage2/")
    parser.add_argument("--data", type=Path, required=True, metavar="FILE", help="held-out pairs")
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N images")
    parser.add_argument("--rerank", type=int, default=16, metavar="K", help="the matching head orders the nearest K")
    parser.add_argument("--group", type=int, default=64, metavar="N", help="pairs that negatives are drawn among")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the scores here")
    parser.add_argument("--no-captions", action="store_true", help="leave stage 2 out")
    args = parser.parse_args(arguments)
    records = load_records(args.data)[: args.limit]
    document: dict[str, Any] = {"run": str(args.run), "data": str(args.data), "images": len(records)}
    lines = look_up(args.run / "stage1" / "final", records, args.rerank, args.group, document)
    if not args.no_captions and (args.run / "stage2" / "final").is_dir():
        lines += ["", *captions(args.run / "stage2" / "final", records, document)]
    print("\n".join(lines))
    if args.json is not None:
        write_text(args.json, json.dumps(document, indent=1, ensure_ascii=False) + "\n")
    return document


def look_up(folder: Path, records: Sequence[Record], nearest: int, group: int, document: dict[str, Any]) -> list[str]:
    """Score stage 1; returns the lines of its tables and adds to the document."""
    import torch

    from polymodal.evaluation.embedder import load_embedder
    from polymodal.evaluation.tasks.retrieval import pairs_of
    from polymodal.metrics.retrieval import chance
    from polymodal.metrics.text import markdown_table

    embedder = load_embedder(folder)
    model: Any = embedder.model
    pairs = pairs_of(records)
    owner = torch.tensor(pairs.image_of_text)
    gallery = open_gallery(model, torch.cat([*embedder.features(pairs.images)]), list(pairs.texts), owner)
    plain, looked = retrieval_scores(model, gallery), retrieval_scores(model, gallery, nearest)
    expected, matching = chance(len(pairs.images), owner), matching_scores(model, gallery, group)
    document |= {"recall": plain, "recall_reranked": looked, "chance": expected, "reranked": nearest}
    document["matching"] = asdict(matching)
    rows = []
    for name in plain:
        shares = (f"{found[name]:.1%}" for found in (plain, looked, expected))
        rows.append((name.replace("_", " ").replace("@", " @"), *shares))
    return [
        f"{len(pairs.images)} images, {len(pairs.texts)} texts",
        "",
        markdown_table(("", "contrast", f"+ matching on the nearest {nearest}", "chance"), rows),
        "",
        f"matching: {matching.accuracy:.1%} of pairs and hard negatives right (always no: 66.7%), "
        f"balanced {matching.balanced:.1%} (pairs {matching.pairs:.1%}, negatives {matching.negatives:.1%})",
    ]


def captions(folder: Path, records: Sequence[Record], document: dict[str, Any]) -> list[str]:
    """Let stage 2 caption; returns the lines of its table and adds to the document."""
    from polymodal.backends import load
    from polymodal.evaluation.results import summarise, table
    from polymodal.evaluation.runner import Settings
    from polymodal.evaluation.tasks.questions import QUESTIONS, ask_records

    asked = [
        replace(record, kind="caption", extra={**record.extra, "answers": record.extra.get("captions")})
        for record in records
    ]
    run = ask_records(load(folder), asked)
    scores = summarise(QUESTIONS, "", run, Settings())
    others = of_others(run.samples)
    document["captions"] = {**scores, "of_others": others, "items": [asdict(sample) for sample in run.samples]}
    return [table([scores]), "", f"captions of other images: {others:.1%}"]


def of_others(samples: Sequence[Sample], most: int = 50) -> float:
    """Mean score of the answers about other images, some `most` for each image."""
    from polymodal.metrics.text import word_recall

    count = len(samples)
    steps = range(1, count, max(1, count // most))
    scores = [
        word_recall(samples[(place + step) % count].answer or "", sample.references)
        for place, sample in enumerate(samples)
        for step in steps
    ]
    return sum(scores) / len(scores) if scores else 0.0


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


if __name__ == "__main__":
    main()
