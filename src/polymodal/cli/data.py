"""Check, prepare and look at training data.

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

CHECK = """Read, decode and tokenise every row of data files, and report what is wrong. Writes report.html (open it in a
browser), dropped.jsonl (id, line, code and reason of each row that must go), warnings.jsonl and summary.json. With
--fix a corrected file: good rows as they were, some faults repaired, the other faulty rows left out. Exit status 1 if
more than --max-dropped of the rows must go."""
PREP = """Read, decode and tokenise a recipe's data once, into memory maps that training opens at once. Training does
the same when it has to; with this it is done on a machine without a GPU, and before the run."""
FORMATS = "auto, llava, messages, openai, coco, vqav2, gqa, textvqa, docvqa, parquet, webdataset, folder"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's flags."""
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    checks = actions.add_parser("check", help="find what is wrong with data files", description=CHECK)
    inspects = actions.add_parser("inspect", help="show what the model sees of a row", description=inspect.__doc__)
    preps = actions.add_parser("prep", help="tokenise a recipe's data once", description=PREP)
    add = checks.add_argument
    add("files", nargs="+", type=Path, metavar="FILE", help="a data file")
    output = Path("data-check")
    add("--output", type=Path, default=output, metavar="DIR", help="for the report; default: %(default)s")
    add("--fix", action="store_true", help="write a corrected copy of each file (JSON and JSONL)")
    add("--max-dropped", default="1%", metavar="SHARE", help="exit with 1 if more rows must go; default: 1%%")
    add("--max-length", type=int, default=2048, metavar="N", help="most tokens; default: %(default)s")
    workers = min(8, os.cpu_count() or 2)
    add("--workers", type=int, default=workers, metavar="N", help="threads; default: %(default)s")
    add = inspects.add_argument
    add("file", type=Path, metavar="FILE", help="a data file")
    add("--index", type=int, default=0, metavar="N", help="the row, counted from 0; default: 0")
    add("--html", metavar="FILE", help="write the view as one self-contained page")
    add("--png", metavar="FILE", help="write the tiles drawn on the images")
    add("--color", choices=("auto", "always", "never"), default="auto", help="default: %(default)s")
    for parser in (checks, inspects):
        add = parser.add_argument
        add("--image-root", type=Path, metavar="DIR", help="where image paths start; the file's own folder if absent")
        add("--format", default="auto", help=f"{FORMATS} (default: %(default)s)")
        add("--annotations", type=Path, metavar="FILE", help="the answers, for formats in two files")
        add("--template", help="a chat template in place of the model's own, such as plain for captions")
        common.add_model_argument(parser)
    add = preps.add_argument
    add("recipe", type=Path, metavar="RECIPE", help="a recipe, such as recipes/default/stage1.yaml")
    add("overrides", nargs="*", metavar="KEY=VALUE", help="values that replace the recipe's")


def run(args: argparse.Namespace) -> int:
    """Do what was asked for."""
    return {"check": check, "inspect": inspect, "prep": prep}[args.action](args)


def check(args: argparse.Namespace) -> int:
    """Read, decode and tokenise every row of data files, and report what is wrong."""
    limit = parse_share(args.max_dropped)
    for flag, value in (("--workers", args.workers), ("--max-length", args.max_length)):
        if value < 1:
            raise ConfigError(f"{flag} {value}: at least 1")
    if args.image_root is not None and not args.image_root.is_dir():
        raise ConfigError(f"--image-root {args.image_root}: no such folder")
    from polymodal.data.check.check import check_files, summary_json
    from polymodal.data.check.report import to_html
    from polymodal.data.readers.registry import detect_format
    from polymodal.utils.files import check_writable, make_folder, write_text
    from polymodal.utils.progress import progress

    check_writable(args.output, "--output ", folder=True)
    for file in args.files if args.format == "auto" else ():
        detect_format(file)  # a recipe is found to be none before anything is loaded
    processor = _processor(args)
    make_folder(args.output, "--output ")
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

    lines = []
    for code, count in sorted(summary.counts.items(), key=lambda item: (FAULTS[item[0]].severity, -item[1])):
        lines.append(f"{FAULTS[code].severity:<5}{count:>8}  {code:<20}{FAULTS[code].advice}")
        lines += [f"{'':15}such as {where}: {reason}" for where, _, reason in summary.examples.get(code, [])[:1]]
    lines += [f"fixed{count:>8}  {name}" for name, count in summary.repairs.most_common()]
    warned = sum(file.warned for file in summary.files)
    good = summary.rows - len(summary.dropped) - warned
    lines.append(f"{summary.rows} rows: {good} good, {warned} to look at, {len(summary.dropped)} to drop")
    if found := ", ".join(
        f"{summary.media[name]:,} {name.replace('_', ' ')}"
        for name in ("videos", "video_frames", "sounds", "documents", "pages")
        if summary.media[name]
    ):
        seconds = summary.media["video_seconds"], summary.media["sound_seconds"]
        lines.append(f"decoded {found}; {seconds[0]:,.1f} s of video, {seconds[1]:,.1f} s of sound")
    if summary.fields:
        lines.append("rows with " + ", ".join(f"{name}: {count:,}" for name, count in sorted(summary.fields.items())))
    if summary.silent:
        lines.append(f"{summary.silent} answers are shown and not trained (loss: false, weight: 0, train: false)")
    lines += [
        f"wrote {file.fixed} (its images: --image-root {image_root or file.path.parent})"
        for file in summary.files
        if file.fixed is not None
    ]
    lines.append(f"wrote {output / 'report.html'}")
    return common.printable("\n".join(lines))


def inspect(args: argparse.Namespace) -> int:
    """Show what the model sees of one row: its tokens by kind, those that carry a loss, and its images' tiles."""
    from polymodal.cli.inspect import show
    from polymodal.data.load import iter_rows, row_record

    if args.index < 0:
        raise ConfigError(f"--index {args.index}: rows are counted from 0")
    common.check_files(args, "html", "png")
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


def prep(args: argparse.Namespace) -> int:
    """Read, decode and tokenise a recipe's data once, into memory maps that training opens at once."""
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
