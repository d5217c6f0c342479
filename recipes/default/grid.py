"""Draw a grid of held-out questions with a model's answers, the right ones green and the wrong ones red.

    python -m recipes.default.grid default --output docs/default-answers.png

Which questions are shown is drawn by the seed, before any is answered. Only what may be given away is shown: drawings
of openclipart (public domain), Noto emoji (OFL-1.1), drawn shapes, words, charts and pages of the held-out files, and
the package's own example images (examples/pictures/CREDITS.md).
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from polymodal.backends import load
from polymodal.errors import DataError, PolymodalError
from polymodal.evaluation.runner import Settings, run_task
from polymodal.evaluation.task import Example
from polymodal.evaluation.tasks.questions import KIND_METRICS, QUESTIONS
from polymodal.messages import Image as ImagePart
from polymodal.messages import user
from polymodal.utils.files import writing

ROOT = Path(__file__).parents[2]
FREE = frozenset({"openclipart", "emoji", "shapes", "text", "charts", "tables", "documents"})
"""Origins that may be given away; a record is shown where all of its images come from these."""
EXAMPLES: dict[str, tuple[str, ...]] = {
    "apple.png": ("apple",),
    "astronaut.jpg": ("astronaut", "woman", "person"),
    "butterfly.png": ("butterfly", "butterflies"),
    "cat.jpg": ("cat", "kitten", "tabby"),
    "coffee.jpg": ("coffee", "cup", "mug", "espresso", "cappuccino"),
    "penguin.png": ("penguin",),
    "rocket.jpg": ("rocket", "launch pad", "spacecraft"),
    "sailing.png": ("sailboat", "sailing boat", "boat", "ship"),
    "strawberry.png": ("strawberry",),
    "sunflower.png": ("sunflower", "flower"),
}
"""The package's example images and their names, by eye."""
UNMARKED = frozenset({"caption", "caption_zh", "zh"})
"""Kinds that are left out: a caption is neither right nor wrong, and the font that Pillow brings has no Chinese."""
COLUMNS, WIDTH, GAP = 8, 1600, 10
SIDE = (WIDTH - GAP) // COLUMNS - GAP
GREEN, RED, GREY = (25, 125, 50), (195, 30, 30), (90, 90, 90)


@dataclass(frozen=True)
class Cell:
    """A question with its answer."""

    images: tuple[Path, ...]
    question: str
    answer: str
    right: bool
    accepted: str  # the best right answer


def choose(files: Sequence[Path], count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Rows with whole paths: the example images, then as many of each kind as there is room for."""
    rng = random.Random(f"{seed}/grid")
    kinds: dict[str, list[dict[str, Any]]] = {}
    for file in files:
        for row in _rows(file):
            origins = {key.split(":")[0] for key in row.get("sources") or [row.get("source")]}
            if origins <= FREE and row.get("image") and row.get("kind") not in UNMARKED:
                images = [row["image"]] if isinstance(row["image"], str) else row["image"]
                kinds.setdefault(row["kind"], []).append({**row, "image": [str(file.parent / one) for one in images]})
    rows = [_example(name, answers) for name, answers in EXAMPLES.items() if (_pictures() / name).is_file()][:count]
    for of_kind in kinds.values():
        rng.shuffle(of_kind)
    drawn: list[dict[str, Any]] = []
    shown: set[str] = set()  # nothing is shown twice while there is something else
    while len(rows) + len(drawn) < count and any(kinds.values()):
        for kind in sorted(kinds):
            if kinds[kind] and len(rows) + len(drawn) < count:
                of_kind = kinds[kind]
                fresh = (number for number, row in enumerate(of_kind) if not shown & set(row.get("sources", ())))
                drawn.append(of_kind.pop(next(fresh, 0)))
                shown |= set(drawn[-1].get("sources", ()))
    return rows + sorted(drawn, key=lambda row: str(row["kind"]))


def answered(model: Any, rows: Sequence[dict[str, Any]]) -> list[Cell]:
    """What a model answers to them."""
    examples = []
    for number, row in enumerate(rows):
        asked = str(row["conversations"][-2]["value"]).replace("<image>", "").strip()
        metric = KIND_METRICS.get(row["kind"], "exact")
        message = user(*map(ImagePart, row["image"]), asked)
        examples.append(Example(str(number), (message,), tuple(row["answers"]), row["kind"], metric))
    run = run_task(model, QUESTIONS, examples, Settings(cached=False))
    cells = []
    for row, sample in zip(rows, run.samples, strict=True):
        said, right = sample.answer or f"({sample.error})", bool(sample.score)
        cells.append(Cell(tuple(map(Path, row["image"])), _asked(row), said, right, str(row["answers"][0])))
    return cells


def draw(cells: Sequence[Cell]) -> Image.Image:
    """The grid: each image, its question below, and the answer in green or in red."""
    small, large = ImageFont.load_default(15), ImageFont.load_default(18)
    texts = [
        (_wrapped(cell.question, small, 3), _wrapped(cell.answer, large, 3), () if cell.right else _right(cell, small))
        for cell in cells
    ]
    heights = [SIDE + 8 + 18 * len(asked) + 23 * len(said) + 18 * len(right) + 14 for asked, said, right in texts]
    lines = [range(start, min(start + COLUMNS, len(cells))) for start in range(0, len(cells), COLUMNS)]
    tops = [GAP]
    for line in lines:
        tops.append(tops[-1] + max(heights[number] for number in line))
    sheet = Image.new("RGB", (WIDTH, tops[-1]), "white")
    pen = ImageDraw.Draw(sheet)
    for line, top in zip(lines, tops, strict=False):
        for number in line:
            cell, (asked, said, right) = cells[number], texts[number]
            colour = GREEN if cell.right else RED
            x, y = GAP + (number - line.start) * (SIDE + GAP), top
            sheet.paste(_side_by_side(cell.images), (x, y))
            pen.rectangle((x - 2, y - 2, x + SIDE + 1, y + SIDE + 1), outline=colour, width=3)
            y += SIDE + 6
            for text, font, ink, step in (
                *((text, small, GREY, 18) for text in asked),
                *((text, large, colour, 23) for text in said),
                *((text, small, GREY, 18) for text in right),
            ):
                pen.text((x, y), text, font=font, fill=ink)
                y += step
    return sheet


def _right(cell: Cell, font: Any) -> tuple[str, ...]:
    return _wrapped(f"right: {cell.accepted}", font, 2)


def _side_by_side(files: Sequence[Path]) -> Image.Image:
    """A square with one image, or with several in a row."""
    square = Image.new("RGB", (SIDE, SIDE), "white")
    wide = SIDE // len(files)
    for number, file in enumerate(files):
        with Image.open(file) as opened:
            image = opened.convert("RGBA")
        image.thumbnail((wide - 4, SIDE - 4), Image.Resampling.LANCZOS)
        square.paste(image, (number * wide + (wide - image.width) // 2, (SIDE - image.height) // 2), image)
    return square


def _wrapped(text: str, font: Any, most: int) -> tuple[str, ...]:
    """A text in lines as wide as an image; three dots where it has more."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= SIDE or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    return tuple(lines if len(lines) <= most else [*lines[: most - 1], lines[most - 1] + " ..."])


def _asked(row: dict[str, Any]) -> str:
    """The question without marks of images and without how to answer."""
    return str(row["conversations"][-2]["value"]).replace("<image>", "").strip().split("\nAnswer ")[0]


def _pictures() -> Path:
    return ROOT / "examples" / "pictures"


def _example(name: str, answers: tuple[str, ...]) -> dict[str, Any]:
    asked = [{"from": "human", "value": "<image>\nWhat is this?"}, {"from": "gpt", "value": answers[0]}]
    return {"image": [str(_pictures() / name)], "conversations": asked, "kind": "name", "answers": list(answers)}


def _rows(file: Path) -> list[dict[str, Any]]:
    try:
        return list(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise DataError(f"{file}: no file of held-out questions ({error})") from None


def main(argv: Sequence[str] | None = None) -> int:
    """Draw what the command line names; 2 and one line where that cannot be."""
    parser = argparse.ArgumentParser(
        prog="python -m recipes.default.grid", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help='"default", a model folder, or what else `polymodal eval` takes')
    parser.add_argument("--output", type=Path, required=True, metavar="PNG", help="the image to write")
    parser.add_argument(
        "--data", type=Path, action="append", metavar="FILE", help="held-out questions; default: data/default/val.json"
    )
    parser.add_argument("--count", type=int, default=40, help="questions; default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    args = parser.parse_args(argv)
    try:
        cells = answered(load(args.model), choose(args.data or [Path("data/default/val.json")], args.count, args.seed))
        with writing(args.output):
            args.output.parent.mkdir(parents=True, exist_ok=True)
            draw(cells).quantize(256).save(args.output, format="PNG", optimize=True)
    except PolymodalError as error:
        print(f"grid: {error}", file=sys.stderr)
        return 2
    print(f"{args.output}: {sum(cell.right for cell in cells)} of {len(cells)} right")
    return 0


if __name__ == "__main__":
    sys.exit(main())
