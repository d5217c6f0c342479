"""The figures of a BLIP-2 run on held-out pairs: retrieval, matching, and stage 2's captions beside the blind control.

    python recipes/blip2/evaluate.py runs/blip2 --data data/pairs/val.json --json runs/blip2/scores.json

RUN holds `stage1/final` and, where it was trained, `stage2/final`. Retrieval is by contrast alone, and with the
matching head's second look at the nearest (`--rerank`). Matching is judged with hard negatives, drawn as in training.
Captions are scored by the share of a reference's content words that they have. There are two controls: the same model
that sees grey, and its captions of other images, which are written as well as its own but do not look.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from polymodal.data.readers.conversations import Record
    from polymodal.evaluation.tasks.questions import Item


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
    from polymodal.evaluation.report import markdown_table
    from polymodal.evaluation.tasks.image_text_matching import matching_scores, open_gallery, retrieval_scores
    from polymodal.evaluation.tasks.retrieval import pairs_of
    from polymodal.metrics.retrieval import chance

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
    from polymodal.evaluation.tasks.questions import evaluate, summarise, table

    asked = [
        replace(record, kind="caption", extra={**record.extra, "answers": record.extra.get("captions")})
        for record in records
    ]
    items = evaluate(load(folder), asked)
    rows = summarise(items)
    others = of_others(items)
    document["captions"] = {
        "kinds": [asdict(row) for row in rows],
        "of_others": others,
        "items": [asdict(item) for item in items],
    }
    return [table(rows), "", f"captions of other images: {others:.1%}"]


def of_others(items: Sequence[Item], most: int = 50) -> float:
    """Mean score of the answers about other images, some `most` for each image."""
    from polymodal.metrics.text import word_recall

    count = len(items)
    steps = range(1, count, max(1, count // most))
    scores = [
        word_recall(items[(place + step) % count].answer or "", item.accepted)
        for place, item in enumerate(items)
        for step in steps
    ]
    return sum(scores) / len(scores) if scores else 0.0


if __name__ == "__main__":
    main()
