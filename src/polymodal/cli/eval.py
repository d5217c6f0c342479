"""Score a model on held-out data.

    polymodal eval default --data data/default/val.json
    polymodal eval runs/stage2/final --data data/default/val.json --json scores.json --limit 200
    polymodal eval runs/vit_small/final --task retrieval --data data/pairs/val.json
    polymodal eval Salesforce/blip-itm-base-coco --task retrieval --data data/pairs/val.json
    polymodal eval runs/vit_small/final --task zero-shot --data data/pairs/classes.json

questions: each record asks one; its `kind` chooses the metric and its `answers` lists what is right. Beside the model
stand an image-blind control (the same model with every image replaced by grey) and the majority answer.
retrieval: recall of captions by images and of images by captions, for models with an image tower and a text tower
(CLIP, SigLIP, BLIP, any dual encoder). zero-shot: the nearest of the classes' prompts, for the same models.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from polymodal.cli.common import add_loading_arguments, open_model
from polymodal.data.load import load_records
from polymodal.errors import ConfigError
from polymodal.utils.files import write_text

if TYPE_CHECKING:
    from polymodal.evaluation.embedder import Embedder


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's arguments."""
    parser.add_argument("model", help='"default", a model folder, a hub id, or openai:MODEL')
    parser.add_argument("--task", choices=tuple(TASKS), default="questions", help="default: %(default)s")
    parser.add_argument(
        "--data", required=True, type=Path, metavar="FILE", help="held-out records (JSON or JSONL), or classes.json"
    )
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N records of each kind, or images")
    parser.add_argument("--batch-size", type=int, default=16, metavar="N", help="default: %(default)s")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write scores, and every answer, here")
    add_loading_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Evaluate, print the table, and write the answers where asked for."""
    for flag, value in (("--limit", args.limit), ("--batch-size", args.batch_size)):
        if value is not None and value < 1:
            raise ConfigError(f"{flag} {value}: at least 1")
    text, document, failed = TASKS[args.task](args)
    print(text)
    if args.json is not None:
        write_text(args.json, json.dumps({"model": args.model, **document}, indent=1, ensure_ascii=False) + "\n")
    return 1 if failed else 0


def _questions(args: argparse.Namespace) -> tuple[str, dict[str, Any], int]:
    from polymodal.evaluation.tasks.questions import evaluate, summarise, table

    seen: Counter[str] = Counter()
    records = []
    for record in load_records(args.data):
        seen[record.kind] += 1
        if args.limit is None or seen[record.kind] <= args.limit:
            records.append(record)
    model = open_model(args)
    with _bar("answers", 2 * len(records)) as bar:

        def show(done: int, _total: int) -> None:
            bar.update(done - bar.n)

        items = evaluate(model, records, batch_size=args.batch_size, progress=show)
    rows = summarise(items)
    text, failed = table(rows), sum(row.failed for row in rows)
    if failed:
        text += f"\n\n{failed} of {len(items)} items failed; first: {next(i.error for i in items if i.error)}"
    return text, {"kinds": [asdict(row) for row in rows], "items": [asdict(item) for item in items]}, failed


def _retrieval(args: argparse.Namespace) -> tuple[str, dict[str, Any], int]:
    from polymodal.evaluation.tasks import retrieval

    # The data first: a mistake there is found before a model is loaded.
    pairs = retrieval.pairs_of(load_records(args.data), args.limit)
    embedder = _embedder(args)
    with _bar("embedding") as bar:
        found = retrieval.retrieval(embedder, pairs, batch_size=args.batch_size, progress=bar.update)
    return retrieval.table(found), {"task": args.task, "data": str(args.data), **asdict(found)}, 0


def _zero_shot(args: argparse.Namespace) -> tuple[str, dict[str, Any], int]:
    from polymodal.evaluation.tasks import zero_shot

    tasks = zero_shot.load_tasks(args.data, args.limit)
    embedder = _embedder(args)
    with _bar("embedding") as bar:
        rows = zero_shot.zero_shot_scores(embedder, tasks, batch_size=args.batch_size, progress=bar.update)
    document = {"task": args.task, "data": str(args.data), "tasks": [asdict(row) for row in rows]}
    return zero_shot.table(rows), document, 0


def _embedder(args: argparse.Namespace) -> Embedder:
    """The model with an image tower and a text tower that the flags name."""
    import torch

    from polymodal.evaluation.embedder import load_embedder

    if args.quantize is not None:
        raise ConfigError("--quantize: these models have no language model to quantise; leave it out")
    return load_embedder(args.model, args.device or ("cuda" if torch.cuda.is_available() else "cpu"))


def _bar(label: str, total: int | None = None) -> Any:
    return tqdm(total=total, desc=label, disable=not sys.stderr.isatty())


TASKS: dict[str, Callable[[argparse.Namespace], tuple[str, dict[str, Any], int]]] = {
    "questions": _questions,
    "retrieval": _retrieval,
    "zero-shot": _zero_shot,
}
"""Each task and what gives its table, its document and the number of failures."""
