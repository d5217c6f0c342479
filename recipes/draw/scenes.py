"""Scenes of one to three drawn shapes: a finite vocabulary, so that any image can be compared with every drawing of it.

A scene is a background and objects, each a shape in a colour and a size at one of nine cells. Nothing is drawn by
chance: a scene has exactly one drawing. Cells lie a quarter of the side apart and objects are smaller than half of it,
so that the objects of a scene, whose cells are two columns or two rows apart, never touch.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from PIL import Image

from polymodal.errors import ConfigError, DataError
from recipes.default.dataset.sources import draw_shape
from recipes.default.dataset.words import COLOURS, SHAPES

SIDE = 64
SIZES = {"small": 16 / 64, "medium": 22 / 64, "large": 30 / 64}
_GRAYS = {name: COLOURS[name] for name in ("gray", "black")}
GROUNDS = {"white": (255, 255, 255), **_GRAYS, "light blue": (185, 215, 245)}
CELLS = {
    **{"top left": (0, 0), "top": (0, 1), "top right": (0, 2), "left": (1, 0), "center": (1, 1), "right": (1, 2)},
    **{"bottom left": (2, 0), "bottom": (2, 1), "bottom right": (2, 2)},
}
SIDE_BY_SIDE, STACKED = ("left", "right"), ("top", "bottom")
PAIRS = [
    (a, b)
    for a, b in itertools.combinations(CELLS, 2)
    if 2 in (abs(CELLS[a][0] - CELLS[b][0]), abs(CELLS[a][1] - CELLS[b][1]))
]
TRIPLES = [
    ("top left", "top right", "bottom"),
    ("top", "bottom left", "bottom right"),
    ("top right", "left", "bottom right"),
    ("top left", "right", "bottom left"),
]
LAYOUTS: list[tuple[str, ...]] = [(), *((cell,) for cell in CELLS), *PAIRS, *TRIPLES]
ATTRIBUTES = ("shape", "color", "size", "cell")
_HELD_OUT = 10
"""One combination in so many is held out."""


@dataclass(frozen=True)
class Thing:
    """One object of a scene."""

    shape: str
    color: str
    size: str
    cell: str


@dataclass(frozen=True)
class Scene:
    """What is drawn; the things in reading order of their cells."""

    things: tuple[Thing, ...]
    background: str = "white"

    def plan(self) -> list[dict[str, str]]:
        """The things as a row keeps them."""
        return [asdict(thing) for thing in self.things]

    @classmethod
    def from_row(cls, row: Mapping[str, Any], where: str) -> Scene:
        """The scene of a row with `plan` and perhaps `background`."""
        known = {"shape": SHAPES, "color": COLOURS, "size": SIZES, "cell": CELLS}
        plan, background = row.get("plan"), row.get("background", "white")
        if not isinstance(plan, list) or not all(isinstance(thing, dict) for thing in plan):
            raise DataError(f"{where}: `plan` must be a list of objects with {', '.join(ATTRIBUTES)}")
        for thing in plan:
            for name in ATTRIBUTES:
                if thing.get(name) not in list(known[name]):
                    raise DataError(f"{where}: {name} {thing.get(name)!r} is none of {', '.join(known[name])}")
        if background not in list(GROUNDS):
            raise DataError(f"{where}: background {background!r} is none of {', '.join(GROUNDS)}")
        things = [Thing(**{name: thing[name] for name in ATTRIBUTES}) for thing in plan]
        things.sort(key=lambda thing: CELLS[thing.cell])
        if tuple(thing.cell for thing in things) not in LAYOUTS:
            raise DataError(f"{where}: no layout has its objects at {', '.join(t.cell for t in things)}")
        return cls(tuple(things), background)


def clear(color: str, background: str) -> bool:
    """Whether an object of the colour can be told from the background."""
    return float(np.linalg.norm(np.subtract(COLOURS[color], GROUNDS[background]))) > 90


@functools.cache
def masks(side: int) -> dict[str, np.ndarray]:
    """Size -> how much of each pixel each shape covers, [shapes, n, n] from 0 to 1."""
    if side < 32 or side % 4:
        raise ConfigError(f"images of {side} pixels: the side must be a multiple of 4 from 32 on")
    whole = {shape: draw_shape(shape, "black").getchannel("A") for shape in SHAPES}
    made = {}
    for size, share in SIZES.items():
        n = 2 * round(side * share / 2)  # even, so that every centre lies between two pixels
        small = [np.asarray(whole[shape].resize((n, n), Image.Resampling.BOX)) for shape in SHAPES]
        made[size] = np.stack(small).astype(np.float32) / 255
    return made


def window(cell: str, n: int, side: int) -> tuple[slice, slice]:
    """Rows and columns of an object of n pixels at a cell."""
    top, left = ((place + 1) * side // 4 - n // 2 for place in CELLS[cell])
    return slice(top, top + n), slice(left, left + n)


def draw(scene: Scene, side: int = SIDE) -> np.ndarray:
    """The one drawing of a scene, uint8 [side, side, 3]."""
    ground = np.array(GROUNDS[scene.background], np.float32)
    image = np.tile(ground, (side, side, 1))
    for thing in scene.things:
        mask = masks(side)[thing.size][SHAPES.index(thing.shape), :, :, None]
        place = window(thing.cell, mask.shape[0], side)
        image[place] += mask * (np.array(COLOURS[thing.color], np.float32) - image[place])
    return image.round().astype(np.uint8)


def held_out(scene: Scene) -> bool:
    """Whether training never draws it: one in ten combinations, by hash, whatever the seed and the background.

    Of one object its four attributes together; of more, any two of them by shape and colour, in whatever sizes, places
    and order.
    """
    if len(scene.things) == 1:
        combinations = ["/".join(scene.plan()[0].values())]
    else:
        looks = sorted(f"{thing.color} {thing.shape}" for thing in scene.things)
        combinations = ["/".join(two) for two in itertools.combinations(looks, 2)]
    return any(hashlib.sha256(text.encode()).digest()[0] * _HELD_OUT < 256 for text in combinations)


def random_scene(rng: random.Random, count: int, *, heldout: bool) -> Scene:
    """A scene of so many objects, held out or not; what need not be said (medium, center, white) comes most often."""
    while True:
        background = "white" if rng.random() < 0.5 else rng.choice(list(GROUNDS))
        colors = [color for color in COLOURS if clear(color, background)]
        things = tuple(
            Thing(rng.choice(SHAPES), rng.choice(colors), rng.choices(list(SIZES), (3, 4, 3))[0], cell)
            for cell in _layout(rng, count)
        )
        scene = Scene(things, background)
        if len({(thing.shape, thing.color) for thing in things}) == count and held_out(scene) == heldout:
            return scene


def _layout(rng: random.Random, count: int) -> Sequence[str]:
    if count == 1:
        return ("center",) if rng.random() < 0.2 else (rng.choice(list(CELLS)),)
    if count == 2 and rng.random() < 0.7:
        return rng.choice((SIDE_BY_SIDE, STACKED))
    return rng.choice(PAIRS if count == 2 else TRIPLES)
