"""Images with prompts for a model that draws: composed shapes, whose plan a judge can check, and things with names.

python -m recipes.draw.dataset --output data/draw

`train.json`: rows that ask for a drawing (the assistant's turn is `<image>`), that ask what an image shows, and that
ask for a drawing and then about it. `val_shapes.json`: prompts for scenes that no training row draws.
`val_names.json`: names whose other style training shows (the drawing where the emoji is asked for, or the reverse);
`val_names_new.json`: emoji and drawings whose name it never says. `val_tell.json`: the same images and other unseen
drawings of known names, asked about; `heldout` says which. `train_text.json`: with --text, so many rows without an
image. `build.json`: what was used, counts, hashes. Everything
follows from the seed; the number of processes changes nothing.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from PIL import Image

from polymodal.errors import ConfigError, PolymodalError, unknown_name
from recipes.default.dataset import smalltalk, words
from recipes.default.dataset.generate import Packages, new_data_set, over_processes, package_versions
from recipes.draw import names, wording
from recipes.draw.scenes import SIDE, Scene, draw, masks, random_scene

Row = dict[str, Any]


@dataclass(frozen=True)
class Size:
    """How much of everything; `val` are the held-out scenes of one, two and three objects."""

    draw: int
    tell: int
    ask: int
    val: tuple[int, int, int]
    views: int = 0  # of each thing with a name; 0 needs no package
    emoji: int | None = None  # at most so many beyond the default dataset's; None for all


SIZES = {
    "full": Size(42_000, 15_000, 3_000, (500, 500, 200), views=4),
    "small": Size(1_500, 500, 100, (40, 40, 20), views=2, emoji=60),
    "tiny": Size(120, 40, 16, (12, 12, 6)),
}
_COUNTS = (45, 43, 12)
"""Shares of scenes with one, two and three objects."""


class Images:
    """The images of a dataset: a scene has one file, however often it is asked for."""

    def __init__(self) -> None:
        self.scenes: dict[Scene, str] = {}
        self.views: list[names.View] = []

    def file(self, scene: Scene) -> str:
        """Where a scene's drawing is, or will be."""
        return self.scenes.setdefault(scene, f"images/shapes/{len(self.scenes):05d}.png")


def _turns(*said: str) -> list[dict[str, str]]:
    return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(said)]


def _tell(image: str, caption: str, rng: random.Random) -> Row:
    return {"image": image, "conversations": _turns(f"<image>\n{rng.choice(wording.QUESTIONS)}", caption)}


def shape_row(kind: str, scene: Scene, images: Images, rng: random.Random) -> Row:
    """One row of a scene: draw_shapes, tell_shapes or draw_ask."""
    image = images.file(scene)
    planned = {"kind": kind, "plan": scene.plan(), "background": scene.background}
    if kind == "tell_shapes":
        return {**_tell(image, words.sentence(wording.scene_phrase(scene)), rng), **planned}
    turns = (wording.request(wording.scene_phrase(scene, rng), rng), "<image>")
    if kind == "draw_ask":
        turns += wording.follow_up(scene, rng)
    return {"image": image, "conversations": _turns(*turns), **planned}


def name_rows(drawn: names.Drawn, count: int, images: Images, rng: random.Random) -> tuple[list[Row], list[Row]]:
    """The rows that ask for a thing, one a view, and one row that asks what it is; a held-out thing has one view."""
    about = {"name": drawn.name, "source": drawn.source.key, **({"heldout": drawn.heldout} if drawn.heldout else {})}
    views = list(names.views(drawn, 1 if drawn.heldout else count, rng))
    images.views += views
    wanted: list[Row] = []
    for view in views:
        asked = wording.request(drawn.words(rng, style=bool(drawn.heldout)), rng)
        wanted.append({"image": view.file, "conversations": _turns(asked, "<image>"), "kind": "draw_name", **about})
    told = _tell(rng.choice(views).file, words.sentence(drawn.source.caption), rng)
    return wanted, [{**told, "kind": "tell_name", **about}]


def compose(things: Sequence[names.Drawn], wanted: Size, seed: int, text: int) -> tuple[dict[str, list[Row]], Images]:
    """Plan all rows, file -> rows, and their images."""
    images = Images()
    rng = random.Random(f"{seed}/draw")
    train: list[Row] = []
    for kind, count in (("draw_shapes", wanted.draw), ("tell_shapes", wanted.tell), ("draw_ask", wanted.ask)):
        for objects in rng.choices((1, 2, 3), _COUNTS, k=count):
            train.append(shape_row(kind, random_scene(rng, objects, heldout=False), images, rng))
    rng = random.Random(f"{seed}/draw/val")
    val: list[Scene] = []
    for objects, count in enumerate(wanted.val, 1):
        unseen: dict[Scene, None] = {}
        while len(unseen) < count:
            unseen.setdefault(random_scene(rng, objects, heldout=True))
        val += unseen
    files: dict[str, list[Row]] = {
        "val_shapes.json": [shape_row("draw_shapes", scene, images, rng) for scene in val],
        "val_tell.json": [{**shape_row("tell_shapes", scene, images, rng), "heldout": "scene"} for scene in val],
    }
    lists: dict[str, list[Row]] = {"style": [], "name": [], "drawing": []}
    asked: set[tuple[str, str]] = set()
    rng = random.Random(f"{seed}/draw/names")
    for drawn in things:
        drawing, telling = name_rows(drawn, wanted.views, images, rng)
        if drawn.heldout:
            # A name is asked for once in a style, however many drawings of it are held out.
            if (drawn.name, drawn.source.origin) not in asked:
                lists[drawn.heldout] += drawing
            asked.add((drawn.name, drawn.source.origin))
            files["val_tell.json"] += telling
        else:
            train += drawing + telling
    if things:
        files |= {"val_names.json": lists["style"], "val_names_new.json": lists["name"]}
    rng = random.Random(f"{seed}/draw/text")
    for _ in range(text):
        said = [line for turn in smalltalk.conversation(rng) for line in turn]
        files.setdefault("train_text.json", []).append({"conversations": _turns(*said), "kind": "text"})
    random.Random(f"{seed}/draw/order").shuffle(train)
    files = {"train.json": train, **files}
    for name, rows in files.items():
        stem = name.removesuffix(".json")
        files[name] = [{"id": f"{stem}-{number:05d}", **row} for number, row in enumerate(rows)]
    return files, images


def build_draw(
    output: Path,
    *,
    seed: int = 0,
    size: str = "full",
    side: int = SIDE,
    text: int = 0,
    packages: Packages | None = None,
    workers: int = 2,
    progress: bool = True,
    force: bool = False,
) -> str:
    """Build the dataset into a new folder; a line of counts."""
    if size not in SIZES:
        raise unknown_name("size", size, SIZES)
    if text < 0:
        raise ConfigError(f"text must be 0 or more rows, got {text}")
    masks(side)  # says what is wrong with a side before anything is made
    wanted, packages = SIZES[size], packages or Packages()
    with new_data_set(output, workers=workers, force=force) as (thumbs, root):
        things: list[names.Drawn] = []
        if wanted.views:
            things = names.gather_named(thumbs, size, seed, packages, workers, progress, wanted.emoji)
        files, images = compose(things, wanted, seed, text)
        (root / "images/shapes").mkdir()
        hashes = over_processes(
            partial(_save_scene, root=root, side=side), list(images.scenes.items()), workers, "drawing shapes", progress
        )
        if images.views:
            (root / "images/names").mkdir()
            work = partial(_save_view, root=root, thumbs=thumbs, side=side)
            hashes += over_processes(work, images.views, workers, "drawing things", progress)
        digests = {"images": hashlib.sha256("".join(hashes).encode()).hexdigest()}
        for name, rows in files.items():
            lines = ",\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
            written = f"[\n{lines}\n]\n".encode()
            (root / name).write_bytes(written)
            digests[name] = hashlib.sha256(written).hexdigest()
        about = {
            "seed": seed,
            "size": size,
            "side": side,
            "records": {name: len(rows) for name, rows in files.items()},
            "kinds": {name: _counts(row["kind"] for row in rows) for name, rows in files.items()},
            "images": len(hashes),
            "scenes": _counts(f"{len(scene.things)} objects" for scene in images.scenes),
            "sources": _counts(f"{d.source.origin}, {d.heldout or 'train'}" for d in things),
            "packages": _packages() if things else {},
            "heldout_sources": sorted(d.source.key for d in things if d.heldout),
            "sha256": digests,
        }
        (root / "build.json").write_text(json.dumps(about, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    counts = ", ".join(f"{len(rows)} {name.removesuffix('.json')}" for name, rows in files.items())
    return f"{output}: {len(hashes)} images, {counts} (seed {seed}, size {size})"


def _counts(names: Iterable[str]) -> dict[str, int]:
    return dict(sorted(Counter(names).items()))


def _packages() -> dict[str, dict[str, str]]:
    try:
        installed = version("emoji")
    except PackageNotFoundError:
        installed = "unknown"
    found = package_versions(["openclipart-png", "fonts-noto-color-emoji"])
    return {**found, "emoji": {"version": installed, "licence": "BSD-3-Clause"}}


def _save_scene(job: tuple[Scene, str], root: Path, side: int) -> str:
    return _save(Image.fromarray(draw(job[0], side)), root / job[1])


def _save_view(view: names.View, root: Path, thumbs: Path, side: int) -> str:
    return _save(Image.fromarray(names.draw_view(view, thumbs, side)), root / view.file)


def _save(image: Image.Image, target: Path) -> str:
    image.save(target)
    return hashlib.sha256(target.read_bytes()).hexdigest()


def main(argv: Sequence[str] | None = None) -> int:
    """Build what the command line asks for; 2 and one line where that cannot be."""
    parser = argparse.ArgumentParser(
        prog="python -m recipes.draw.dataset", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="a folder that is new or empty")
    parser.add_argument("--size", default="full", help="full, small (a smoke run) or tiny (shapes, needs no packages)")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--side", type=int, default=SIDE, metavar="PIXELS", help="of the images; default: %(default)s")
    parser.add_argument("--text", type=int, default=0, metavar="N", help="write so many rows of text alone too")
    parser.add_argument("--workers", type=int, default=2, metavar="N", help="processes; default: %(default)s")
    parser.add_argument("--packages", type=Path, metavar="ROOT", help="where the Debian packages were unpacked")
    parser.add_argument("--force", action="store_true", help="replace a folder that is not empty")
    args = vars(parser.parse_args(argv))
    try:
        print(build_draw(args.pop("output"), packages=Packages.under(args.pop("packages") or Path("/")), **args))
    except PolymodalError as error:
        print(f"dataset: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
