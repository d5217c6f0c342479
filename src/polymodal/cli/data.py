"""Build, check, prepare and look at training data.

polymodal data check data.jsonl --image-root images    decode and tokenise every row; report.html, dropped.jsonl
polymodal data check data.jsonl --fix                    the same, and write a corrected file
polymodal data inspect data.jsonl --index 3              what the model sees of a row, trained tokens marked
polymodal data prep recipes/default/stage1.yaml          tokenise a recipe's data once, before training
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING

from polymodal.cli import common
from polymodal.errors import ConfigError, DataError

if TYPE_CHECKING:
    from polymodal.data.check.check import Summary
    from polymodal.processing.processor import Processor

FORMATS = "auto, llava, messages, openai, coco, vqav2, gqa, textvqa, docvqa, parquet, webdataset, folder"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's flags."""
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    _add_check(actions.add_parser("check", help="find what is wrong with data files", description=check.__doc__))
    _add_inspect(actions.add_parser("inspect", help="show what the model sees of a row", description=inspect.__doc__))
    _add_prep(actions.add_parser("prep", help="tokenise a recipe's data once", description=prep.__doc__))


def run(args: argparse.Namespace) -> int:
    """Do what was asked for."""
    actions = {"check": check, "inspect": inspect, "prep": prep}
    return actions[args.action](args)


def _add_reading(parser: argparse.ArgumentParser) -> None:
    """Add the flags that say how a file is read and for which model."""
    parser.add_argument(
        "--image-root", type=Path, metavar="DIR", help="where image paths start; the file's own folder if absent"
    )
    parser.add_argument("--format", default="auto", help=f"{FORMATS} (default: %(default)s)")
    parser.add_argument("--annotations", type=Path, metavar="FILE", help="the answers, for formats in two files")
    parser.add_argument("--template", help="a chat template in place of the model's own, such as plain for captions")
    common.add_model_argument(parser)


def _add_check(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="a data file")
    parser.add_argument(
        "--output", type=Path, default=Path("data-check"), metavar="DIR", help="for the report; default: %(default)s"
    )
    parser.add_argument("--fix", action="store_true", help="write a corrected copy of each file (JSON and JSONL)")
    parser.add_argument(
        "--max-dropped", default="1%", metavar="SHARE", help="exit with 1 if more rows must go; default: 1%%"
    )
    parser.add_argument("--max-length", type=int, default=2048, metavar="N", help="most tokens; default: %(default)s")
    parser.add_argument(
        "--workers", type=int, default=min(8, os.cpu_count() or 2), metavar="N", help="threads; default: %(default)s"
    )
    _add_reading(parser)


def check(args: argparse.Namespace) -> int:
    """Read, decode and tokenise every row of data files, and report what is wrong.

    Writes report.html (open it in a browser), dropped.jsonl (id, line, code and reason of each row that must go),
    warnings.jsonl and summary.json. With --fix a corrected file: good rows as they were, some faults repaired, the
    other faulty rows left out. Exit status 1 if more than --max-dropped of the rows must go.
    """
    limit = parse_share(args.max_dropped)
    _at_least_one("--workers", args.workers)
    _at_least_one("--max-length", args.max_length)
    from polymodal.data.check.check import check_files, summary_json
    from polymodal.data.check.report import to_html
    from polymodal.utils.files import write_text
    from polymodal.utils.progress import progress

    processor = _processor(args)
    _make_folder(args.output)
    summary = check_files(
        args.files,
        processor,
        args.output,
        image_root=args.image_root,
        form=args.format,
        annotations=args.annotations,
        max_length=args.max_length,
        fix=args.fix,
        workers=args.workers,
        progress=progress,
    )
    page = to_html(summary, model=args.model, max_length=args.max_length, fixed=args.fix)
    write_text(args.output / "report.html", page)
    write_text(args.output / "summary.json", summary_json(summary))
    print(_result(summary, args.output, args.image_root))
    if summary.dropped_share > limit:
        common.note(f"{summary.dropped_share:.1%} of the rows must go, more than --max-dropped {args.max_dropped}")
        return 1
    return 0


def parse_share(text: str) -> float:
    """Read a share, "1%" or "0.01"."""
    try:
        share = float(text.strip().removesuffix("%")) / (100 if text.strip().endswith("%") else 1)
    except ValueError:
        share = -1.0
    if not 0 <= share <= 1:
        raise ConfigError(f"--max-dropped {text!r}: write a share, such as 1% or 0.01")
    return share


def _result(summary: Summary, output: Path, image_root: Path | None) -> str:
    """The lines that are printed: one for each fault, then the counts."""
    from polymodal.data.check.rows import FAULTS

    lines = [
        f"{FAULTS[code].severity:<5}{count:>8}  {code:<20}{FAULTS[code].advice}"
        for code, count in sorted(summary.counts.items(), key=lambda item: (FAULTS[item[0]].severity, -item[1]))
    ]
    lines += [f"fixed{count:>8}  {name}" for name, count in summary.repairs.most_common()]
    warned = sum(file.warned for file in summary.files)
    good = summary.rows - len(summary.dropped) - warned
    lines.append(f"{summary.rows} rows: {good} good, {warned} to look at, {len(summary.dropped)} to drop")
    lines += [
        f"wrote {file.fixed} (its images: --image-root {image_root or file.path.parent})"
        for file in summary.files
        if file.fixed is not None
    ]
    lines.append(f"wrote {output / 'report.html'}")
    return common.printable("\n".join(lines))


def _add_inspect(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, metavar="FILE", help="a data file")
    parser.add_argument("--index", type=int, default=0, metavar="N", help="the row, counted from 0; default: 0")
    parser.add_argument("--html", metavar="FILE", help="write the view as one self-contained page")
    parser.add_argument("--png", metavar="FILE", help="write the tiles drawn on the images")
    parser.add_argument("--color", choices=("auto", "always", "never"), default="auto", help="default: %(default)s")
    _add_reading(parser)


def inspect(args: argparse.Namespace) -> int:
    """Show what the model sees of one row: its tokens by kind, those that carry a loss, and its images' tiles."""
    from polymodal.cli.inspect import show
    from polymodal.data.load import iter_rows, row_record

    if args.index < 0:
        raise ConfigError(f"--index {args.index}: rows are counted from 0")
    rows = iter_rows(args.file, args.image_root, format=args.format, annotations=args.annotations)
    last = -1
    for row in rows:
        last = row.number
        if row.number == args.index:
            record = row_record(row)
            common.note(f"{row.where}: id {record.id}{f', kind {record.kind}' if record.kind else ''}")
            show(_processor(args), record.messages, html=args.html, png=args.png, color=args.color)
            return 0
    raise DataError(f"{args.file}: no row {args.index}; the last is {last}")


def _add_prep(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", type=Path, metavar="RECIPE", help="a recipe, such as recipes/default/stage1.yaml")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="values that replace the recipe's")


def prep(args: argparse.Namespace) -> int:
    """Read, decode and tokenise a recipe's data once, into memory maps that training opens at once.

    Training does the same when it has to; with this it is done on a machine without a GPU, and before the run.
    """
    from polymodal.training.recipes.load import load_recipe
    from polymodal.training.recipes.pipeline import is_pipeline
    from polymodal.training.sft.prepare_data import prepare_recipe

    if is_pipeline(args.recipe):
        raise ConfigError(f"{args.recipe} is a pipeline, whose later stages start from earlier ones; give one stage")
    print(common.printable(prepare_recipe(load_recipe(args.recipe, args.overrides))))
    return 0


def _processor(args: argparse.Namespace) -> Processor:
    """The model's processor, under another template where one was named."""
    from polymodal.backends import load_processor

    return load_processor(args.model).with_template(args.template)


def _at_least_one(flag: str, value: int) -> None:
    if value < 1:
        raise ConfigError(f"{flag} {value}: at least 1")


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--output {folder}: cannot be made ({error.strerror or error})") from error
