"""Images with nothing to name, and how often "I am not sure" was right.

    polymodal eval MODEL --data data/default_judges/unsure.json --output DIR
    python -m recipes.default.dataset.unsure DIR/unsure/samples.jsonl

A good model has both shares high: not sure where nothing can be named, a right name where the image is clear.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polymodal.errors import DataError, PolymodalError
from polymodal.metrics.intervals import wilson
from polymodal.metrics.text import markdown_table, mentions, span

if TYPE_CHECKING:
    from PIL import Image as Pictures

NOT_SURE = (
    *("not sure", "unsure", "not certain", "uncertain", "unclear", "do not know", "don't know", "hard to tell"),
    *("hard to say", "cannot tell", "can't tell", "cannot say", "can't say", "cannot see", "can't see", "cannot name"),
    *("can't name", "不确定", "不知道", "看不清", "看不出", "无法确定"),
)
SIDE = 384


def nothing(rng: random.Random) -> Pictures.Image:
    """An image that shows nothing: noise, clouds, scribbles, a ramp of colours or soft blots."""
    import numpy as np
    from PIL import Image, ImageDraw, ImageFilter

    drawn = np.random.default_rng(rng.getrandbits(32))
    how = rng.choice(("noise", "clouds", "scribbles", "ramp", "blots"))
    if how == "noise":
        cells = rng.choice((16, 48, 128, SIDE))
        spread = rng.uniform(20, 110)
        pixels = drawn.normal(rng.uniform(70, 190), spread, (cells, cells, rng.choice((1, 3))))
        image = Image.fromarray(np.broadcast_to(pixels, (cells, cells, 3)).clip(0, 255).astype("uint8"))
        return image.resize((SIDE, SIDE), Image.Resampling.NEAREST)
    if how == "clouds":
        total = np.zeros((SIDE, SIDE, 3))
        for cells, weight in ((4, 1.0), (8, 0.6), (16, 0.35), (32, 0.2)):
            layer = Image.fromarray(drawn.integers(0, 256, (cells, cells, 3), dtype="uint8"))
            total += weight * np.asarray(layer.resize((SIDE, SIDE), Image.Resampling.BICUBIC), dtype=float)
        return Image.fromarray((total / 2.15).clip(0, 255).astype("uint8"))
    if how == "ramp":
        ends = drawn.integers(0, 256, (2, 2, 3), dtype="uint8")
        return Image.fromarray(ends).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    ground = tuple(int(v) for v in drawn.integers(120, 256, 3))
    image = Image.new("RGB", (SIDE, SIDE), ground)
    pen = ImageDraw.Draw(image)
    for _ in range(rng.randint(6, 18)):
        ink = tuple(int(v) for v in drawn.integers(0, 256, 3))
        places = [(rng.uniform(0, SIDE), rng.uniform(0, SIDE)) for _ in range(rng.randint(3, 7))]
        if how == "scribbles":
            pen.line(places, fill=ink, width=rng.randint(1, 9), joint="curve")
        else:
            pen.polygon(places, fill=ink)
    return image if how == "scribbles" else image.filter(ImageFilter.GaussianBlur(rng.uniform(24, 48)))


def blurred(image: Pictures.Image) -> Pictures.Image:
    """A photograph of which only a few soft spots of colour are left."""
    from PIL import Image

    return image.resize((6, 5), Image.Resampling.BOX).resize(image.size, Image.Resampling.BICUBIC)


def figures(samples: Sequence[dict[str, Any]]) -> str:
    """The table: how often it is not sure of either sort of images, and how often a name that it gives is right."""
    rows = []
    for kind, about in (("unsure", "nothing to name"), ("clear", "clear")):
        taken = [sample for sample in samples if sample["kind"] == kind]
        doubted = [bool(mentions(sample["answer"] or "", NOT_SURE)) for sample in taken]
        right = [
            kind == "clear" and bool(mentions(sample["answer"] or "", sample["references"]))
            for sample, doubt in zip(taken, doubted, strict=True)
            if not doubt
        ]
        rows.append((about, len(taken), _share(doubted), _share(right)))
    return markdown_table(("Images", "n", "not sure", "right, where it names"), rows)


def _share(marks: Sequence[bool]) -> str:
    if not marks:
        return "-"
    share = sum(marks) / len(marks)
    return f"{share:.1%} ({span(wilson(share, len(marks)))})"


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table of a file of answers."""
    parser = argparse.ArgumentParser(
        prog="python -m recipes.default.dataset.unsure", description=__doc__.split("\n")[0]
    )
    parser.add_argument("samples", type=Path, help="samples.jsonl of `polymodal eval` on unsure.json")
    args = parser.parse_args(argv)
    try:
        print(figures(_read(args.samples)))
    except PolymodalError as error:
        print(f"unsure: {error}", file=sys.stderr)
        return 2
    return 0


def _read(file: Path) -> list[dict[str, Any]]:
    try:
        samples = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise DataError(f"{file}: not a samples.jsonl of polymodal eval ({error})") from None
    if not any(isinstance(sample, dict) and sample.get("kind") in ("unsure", "clear") for sample in samples):
        raise DataError(f"{file}: no answer to unsure.json in it (no `kind` is unsure or clear)")
    return samples


if __name__ == "__main__":
    sys.exit(main())
