"""Score a model on held-out data.

    polymodal eval default --data data/default/val.json
    polymodal eval runs/stage2/final --data data/default/val.json --json scores.json --limit 200
    polymodal eval runs/vit_small/final --task retrieval --data data/pairs/val.json
    polymodal eval runs/vit_small/final --task zero-shot --data data/pairs/classes.json

questions: each record asks one; its `kind` chooses the metric and its `answers` lists what is right. Beside the model
stand an image-blind control (the same model with every image replaced by grey) and the majority answer.
retrieval: recall of captions by images and of images by captions, for models with an image tower and a text tower
(CLIP, SigLIP, any dual encoder). zero-shot: the nearest of the classes' prompts, for the same models.
"""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's arguments."""
    from polymodal.cli.common import add_device_argument, add_endpoint_arguments, add_quantize_argument

    parser.add_argument("model", help='"default", a model folder, a hub id, or openai:MODEL')
    parser.add_argument(
        "--task", choices=("questions", "retrieval", "zero-shot"), default="questions", help="default: %(default)s"
    )
    parser.add_argument(
        "--data", required=True, type=Path, metavar="FILE", help="held-out records (JSON or JSONL), or classes.json"
    )
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N records of each kind, or images")
    parser.add_argument("--batch-size", type=int, default=16, metavar="N", help="default: %(default)s")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write scores, and every answer, here")
    add_device_argument(parser)
    add_quantize_argument(parser)
    add_endpoint_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Evaluate, print the table, and write the answers where asked for."""
    if args.task != "questions":
        return _compare(args)
    import json
    import sys
    from collections import Counter
    from dataclasses import asdict

    from tqdm import tqdm

    from polymodal.cli.common import open_model
    from polymodal.data.load import load_records
    from polymodal.evaluation.tasks.questions import evaluate, summarise, table
    from polymodal.utils.files import write_text

    records = load_records(args.data)
    if args.limit is not None:
        seen: Counter[str] = Counter()
        kept = []
        for record in records:
            seen[record.kind] += 1
            if seen[record.kind] <= args.limit:
                kept.append(record)
        records = kept
    model = open_model(args)
    with tqdm(total=2 * len(records), desc="answers", disable=not sys.stderr.isatty()) as bar:

        def show(done: int, _total: int) -> None:
            bar.update(done - bar.n)

        items = evaluate(model, records, batch_size=args.batch_size, progress=show)
    rows = summarise(items)
    print(table(rows))
    failed = sum(row.failed for row in rows)
    if failed:
        print(f"\n{failed} of {len(items)} items failed; first: {next(i.error for i in items if i.error)}")
    if args.json is not None:
        document = {"model": str(args.model), "kinds": [asdict(r) for r in rows], "items": [asdict(i) for i in items]}
        write_text(args.json, json.dumps(document, indent=1, ensure_ascii=False) + "\n")
    return 1 if failed else 0


def _compare(args: argparse.Namespace) -> int:
    """Score a model with an image tower and a text tower."""
    import json
    import sys
    from dataclasses import asdict
    from typing import Any

    import torch
    from tqdm import tqdm

    from polymodal.data.load import load_records
    from polymodal.errors import ConfigError
    from polymodal.evaluation.embedder import load_embedder
    from polymodal.evaluation.tasks import retrieval, zero_shot
    from polymodal.utils.files import write_text

    if args.quantize is not None:
        raise ConfigError("--quantize: these models have no language model to quantise; leave it out")
    for flag, value in (("--limit", args.limit), ("--batch-size", args.batch_size)):
        if value is not None and value < 1:
            raise ConfigError(f"{flag} {value}: at least 1")
    # The data first: a mistake there is found before a model is loaded.
    document: dict[str, Any]
    pairs = retrieval.pairs_of(load_records(args.data), args.limit) if args.task == "retrieval" else None
    tasks = zero_shot.load_tasks(args.data, args.limit) if args.task == "zero-shot" else []
    embedder = load_embedder(args.model, args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    with tqdm(desc="embedding", disable=not sys.stderr.isatty()) as bar:
        if pairs is not None:
            found = retrieval.retrieval(embedder, pairs, batch_size=args.batch_size, progress=bar.update)
            text, document = retrieval.table(found), asdict(found)
        else:
            rows = zero_shot.zero_shot_scores(embedder, tasks, batch_size=args.batch_size, progress=bar.update)
            text, document = zero_shot.table(rows), {"tasks": [asdict(row) for row in rows]}
    print(text)
    if args.json is not None:
        document = {"model": str(args.model), "task": args.task, "data": str(args.data), **document}
        write_text(args.json, json.dumps(document, indent=1, ensure_ascii=False) + "\n")
    return 0
