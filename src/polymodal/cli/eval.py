"""Score a model on held-out questions, beside an image-blind control and the majority answer.

    polymodal eval default --data data/default/val.json
    polymodal eval runs/stage2/final --data data/default/val.json --json scores.json --limit 200

Each record of the data file asks one question; its `kind` chooses the metric and its `answers` lists what is right.
The control is the same model with every picture replaced by grey.
"""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's arguments."""
    from polymodal.cli.common import add_device_argument

    parser.add_argument("model", help='"default" or a model folder')
    parser.add_argument("--data", required=True, type=Path, metavar="FILE", help="held-out records (JSON or JSONL)")
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N records of each kind")
    parser.add_argument("--batch-size", type=int, default=16, metavar="N", help="default: %(default)s")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write scores and every answer here")
    add_device_argument(parser)


def run(args: argparse.Namespace) -> int:
    """Evaluate, print the table, and write the answers where asked for.

    Args:
        args: The parsed arguments.

    Returns:
        0, or 1 where an item failed.
    """
    import json
    import sys
    from collections import Counter
    from dataclasses import asdict

    from tqdm import tqdm

    from polymodal.backends import load
    from polymodal.data.records import load_records
    from polymodal.evaluation.heldout import evaluate, summarise, table
    from polymodal.files import write_text

    records = load_records(args.data)
    if args.limit is not None:
        seen: Counter[str] = Counter()
        kept = []
        for record in records:
            seen[record.kind] += 1
            if seen[record.kind] <= args.limit:
                kept.append(record)
        records = kept
    model = load(args.model, args.device)
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
