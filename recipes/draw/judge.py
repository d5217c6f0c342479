"""Judge drawn shapes without a model or a network: which drawing of the finite vocabulary is nearest in pixel MSE?

python -m recipes.draw.judge FOLDER [--tokenizer DIR] [--grid grid.png]
python -m recipes.draw.judge data/draw/val_shapes.json --tokenizer DIR

FOLDER holds drawn images and `drawn.json`, a list of {file, prompt, plan, background}. A file of the dataset's own
rows in its place gives what does not depend on a drawer: chance, and how much of the plan a tokenizer keeps. The
verdicts are written to FOLDER/judged.json.

The search is exact: the objects of a scene never touch, so the error of each is a sum over its own pixels, and all
scenes of all layouts are compared by adding those sums up. Attributes are those of the nearest drawing with as many
objects as were asked for, each object matched with the one it agrees with most; `all` asks the nearest drawing of all,
whatever the number of its objects, to be the planned one. Chance is the true drawing of another prompt.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from polymodal.errors import ConfigError, DataError, PolymodalError
from polymodal.metrics.intervals import mean_interval
from polymodal.utils.files import write_text
from recipes.default.dataset.words import COLOURS, SHAPES
from recipes.draw.scenes import (
    ATTRIBUTES,
    CELLS,
    GROUNDS,
    LAYOUTS,
    SIDE,
    SIZES,
    Scene,
    Thing,
    clear,
    draw,
    masks,
    window,
)

MARKS = ("shape", "color", "size", "position", "background", "count", "all")
_SHIFTS = 20
"""With how many other prompts' drawings each prompt is judged for chance."""


@dataclass(frozen=True)
class Look:
    """The nearest drawings of an image: of all, and of those with each number of objects."""

    nearest: Scene
    by_count: dict[int, Scene]
    mse: float


def look(image: np.ndarray) -> Look:
    """Find the nearest drawings of an image, uint8 [side, side, 3]."""
    best: dict[int, tuple[float, Scene]] = {}
    for ground, colour in GROUNDS.items():
        difference = image.astype(np.float32) - np.array(colour, np.float32)
        base, added = float((difference**2).sum()), _best_things(difference, ground)
        for layout in LAYOUTS:
            error = base + sum(added[cell][0] for cell in layout)
            if len(layout) not in best or error < best[len(layout)][0]:
                best[len(layout)] = error, Scene(tuple(added[cell][1] for cell in layout), ground)
    error, nearest = min(best.values(), key=lambda found: found[0])
    return Look(nearest, {count: scene for count, (_, scene) in best.items()}, max(error, 0.0) / image.size)


def _best_things(difference: np.ndarray, ground: str) -> dict[str, tuple[float, Thing]]:
    """Cell -> how much the best object there adds to the squared error against the ground alone, and that object."""
    # |d - m(c-g)|² - |d|² = m²|c-g|² - 2 m (d . (c-g)), summed over the object's pixels; d is [side, side, 3].
    side = difference.shape[0]
    colors = [color for color in COLOURS if clear(color, ground)]
    steps = np.array([COLOURS[color] for color in colors], np.float32) - np.array(GROUNDS[ground], np.float32)
    best: dict[str, tuple[float, Thing]] = {}
    for size in SIZES:
        covers = masks(side)[size]
        flat = covers.reshape(len(SHAPES), -1)
        own = (flat**2).sum(1)[:, None] * (steps**2).sum(1)
        for cell in CELLS:
            pixels = difference[window(cell, covers.shape[1], side)].reshape(-1, 3)
            added = own - 2 * (flat @ pixels) @ steps.T  # [shapes, colors]
            shape, color = np.unravel_index(int(added.argmin()), added.shape)
            found = float(added[shape, color])
            if cell not in best or found < best[cell][0]:
                best[cell] = found, Thing(SHAPES[shape], colors[color], size, cell)
    return best


def verdict(scene: Scene, seen: Look) -> dict[str, bool]:
    """Which attributes of a planned scene an image shows."""
    shown = seen.by_count[len(scene.things)]

    def agreement(order: Sequence[Thing]) -> list[list[bool]]:
        return [[getattr(a, name) == getattr(b, name) for name in ATTRIBUTES] for a, b in zip(scene.things, order)]

    matched = max(map(agreement, itertools.permutations(shown.things)), key=lambda rows: sum(map(sum, rows)))
    right = [all(column) for column in zip(*matched)] or [True] * len(ATTRIBUTES)
    same_count = len(seen.nearest.things) == len(scene.things)
    marks = (*right, shown.background == scene.background, same_count, seen.nearest == scene)
    return dict(zip(MARKS, marks))


def chance(scenes: Sequence[Scene], looks: Sequence[Look]) -> list[dict[str, bool]]:
    """Verdicts on the drawings of other prompts; the looks are those at the scenes' own drawings."""
    total = len(scenes)
    # Spread over the list, which may be sorted.
    shifts = sorted({round(total * k / (_SHIFTS + 1)) for k in range(1, _SHIFTS + 1)} - {0, total})
    return [verdict(scene, looks[(i + shift) % total]) for shift in shifts for i, scene in enumerate(scenes)]


def summary(verdicts: Sequence[dict[str, bool]]) -> dict[str, tuple[float, float, float]]:
    """Mark -> share right, with its 95% interval."""
    shares = {}
    for mark in MARKS:
        values = np.array([v[mark] for v in verdicts], float)
        shares[mark] = (float(values.mean()), *mean_interval(values))
    return shares


def table(rows: dict[str, Sequence[dict[str, bool]]]) -> str:
    """Markdown: a line for each list of verdicts, with 95% intervals; chance, whose trials overlap, has none."""
    lines = [f"| | images | {' | '.join(MARKS)} |", f"|---|--:|{'--:|' * len(MARKS)}"]
    for name, verdicts in rows.items():
        if not verdicts:
            continue
        cells = [
            f"{share:.1%}" if name == "chance" else f"{share:.1%} ({100 * low:.1f} to {100 * high:.1f})"
            for share, low, high in summary(verdicts).values()
        ]
        lines.append(f"| {name} | {len(verdicts)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def read_rows(path: Path) -> tuple[list[dict[str, Any]], list[Scene]]:
    """The rows of `drawn.json` in a folder, or of a file of the dataset, with their scenes."""
    file = path / "drawn.json" if path.is_dir() else path
    try:
        rows = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{file}: no JSON file can be read there ({error})") from error
    if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) for row in rows):
        raise DataError(f"{file}: must be a list of rows with `plan`, and holds none")
    return rows, [Scene.from_row(row, f"{file}: row {number}") for number, row in enumerate(rows)]


def read_image(folder: Path, row: dict[str, Any]) -> np.ndarray:
    """A drawn image, uint8 [side, side, 3]."""
    file = folder / str(row.get("file"))
    try:
        with Image.open(file) as image:
            pixels = np.asarray(image.convert("RGB"))
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"{file}: cannot be read as an image ({error})") from error
    if pixels.shape[0] != pixels.shape[1] or pixels.shape[0] < 32 or pixels.shape[0] % 4:
        raise DataError(
            f"{file}: {pixels.shape[1]}x{pixels.shape[0]} pixels; the judge takes squares of 32, 36, 40, ..."
        )
    return pixels


def through_tokenizer(tokenizer: Any, images: Sequence[np.ndarray], batch: int = 64) -> Iterator[np.ndarray]:
    """Images as a tokenizer gives them back, uint8 [side, side, 3]."""
    import torch

    side = tokenizer.image_size
    if any(image.shape[0] != side for image in images):
        raise ConfigError(f"the tokenizer takes images of {side} pixels, the drawings have {images[0].shape[0]}")
    with torch.inference_mode():
        for start in range(0, len(images), batch):
            pixels = torch.from_numpy(np.stack(images[start : start + batch])).permute(0, 3, 1, 2).float() / 255
            decoded = tokenizer.decode(tokenizer.encode(pixels)).clamp(0, 1)
            yield from (decoded * 255).round().byte().permute(0, 2, 3, 1).numpy()


def grid(
    drawings: Sequence[np.ndarray], prompts: Sequence[str], right: Sequence[bool], columns: int = 6
) -> Image.Image:
    """Drawings with their prompts below, framed green where all is right and red elsewhere."""
    cell, gap, text = 128, 8, 86
    rows = -(-len(drawings) // columns)
    sheet = Image.new("RGB", (columns * (cell + gap) + gap, rows * (cell + gap + text) + gap), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(11)
    for number, (drawing, prompt, good) in enumerate(zip(drawings, prompts, right)):
        x, y = gap + number % columns * (cell + gap), gap + number // columns * (cell + gap + text)
        frame = (40, 150, 60) if good else (210, 40, 40)
        pen.rectangle((x - 3, y - 3, x + cell + 2, y + cell + 2), fill=frame)
        sheet.paste(Image.fromarray(drawing).resize((cell, cell), Image.Resampling.NEAREST), (x, y))
        lines = textwrap.wrap(prompt, 22)[:6]
        pen.multiline_text((x, y + cell + 5), "\n".join(lines), font=font, fill="black", spacing=1)
    return sheet


def _prompt(row: dict[str, Any]) -> str:
    return str(row["prompt"] if "prompt" in row else row.get("conversations", [{"value": ""}])[0]["value"])


def judge(path: Path, tokenizer: Any = None, side: int = SIDE, save_grid: Path | None = None, cells: int = 24) -> str:
    """Judge a folder of drawings, or measure chance and a tokenizer on a file of rows; the table."""
    rows, scenes = read_rows(path)
    drawings = [read_image(path, row) for row in rows] if path.is_dir() else []
    side = drawings[0].shape[0] if drawings else side
    true = [draw(scene, side) for scene in scenes]
    own = [look(image) for image in true]
    kept = through_tokenizer(tokenizer, true) if tokenizer else ()
    results: dict[str, Sequence[dict[str, bool]]] = {}
    judged = [verdict(scene, look(image)) for scene, image in zip(scenes, drawings)]
    ceiling = [verdict(scene, look(image)) for scene, image in zip(scenes, kept)]
    main: tuple[tuple[str, list[dict[str, bool]]], ...] = (("drawn", judged), ("tokenizer's ceiling", ceiling))
    for name, verdicts in main:
        results[name] = verdicts
        counts = sorted({len(scene.things) for scene in scenes}) if verdicts else []
        for count in counts if len(counts) > 1 else []:
            of_count = [v for v, scene in zip(verdicts, scenes) if len(scene.things) == count]
            results[f"{name}, {count} object{'s' * (count > 1)}"] = of_count
    results["true drawings"] = [verdict(scene, seen) for scene, seen in zip(scenes, own)]
    results["chance"] = chance(scenes, own)
    if path.is_dir():
        lines = [json.dumps({**row, "right": marks}, ensure_ascii=False) for row, marks in zip(rows, judged)]
        write_text(path / "judged.json", "[\n" + ",\n".join(lines) + "\n]\n")
    if save_grid:
        marks = judged or results["true drawings"]
        shown = grid((drawings or true)[:cells], [_prompt(row) for row in rows], [m["all"] for m in marks])
        shown.save(save_grid)
    return table(results)


def main(argv: Sequence[str] | None = None) -> int:
    """Judge what the command line names; 2 and one line where that cannot be."""
    parser = argparse.ArgumentParser(
        prog="python -m recipes.draw.judge", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("path", type=Path, metavar="FOLDER", help="a folder with drawn.json, or a file of rows")
    parser.add_argument("--tokenizer", type=Path, metavar="DIR", help="an image tokenizer, for its ceiling")
    parser.add_argument("--grid", type=Path, metavar="PNG", help="save prompts and drawings as an image")
    parser.add_argument("--cells", type=int, default=24, metavar="N", help="drawings in the grid; default: %(default)s")
    args = parser.parse_args(argv)
    try:
        tokenizer = None
        if args.tokenizer:
            from polymodal.modeling.tokenizers import load_image_tokenizer

            tokenizer = load_image_tokenizer(args.tokenizer)
        side = tokenizer.image_size if tokenizer else SIDE
        print(judge(args.path, tokenizer, side, args.grid, args.cells))
    except PolymodalError as error:
        print(f"judge: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
