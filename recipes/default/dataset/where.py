"""Questions about where things are in a natural scene, beside, above and between what, and which is bigger."""

from __future__ import annotations

import random

from recipes.default.dataset import words
from recipes.default.dataset.questions import QA, World, capital
from recipes.default.dataset.studio import Spot, View

_OPPOSITE = {"left": "right", "right": "left", "top": "bottom", "bottom": "top"}
RELATION = {"left": "to the left of", "right": "to the right of", "top": "above", "bottom": "below"}


def the_thing(spot: Spot) -> str:
    return f"the {spot.colour} {spot.noun}" if spot.source.origin == "shapes" else f"the {words.proper(spot.noun)}"


def are(spot: Spot) -> str:
    return "are" if spot.phrase.startswith(("some ", "a pair")) else "is"


def place_phrase(cell: str) -> str:
    """How a place is said: "on the left", "in the top left corner"."""
    return {"left": "on the left", "right": "on the right", "top": "at the top", "bottom": "at the bottom"}.get(
        cell, f"in the {cell}"
    )


def thing_qa(kind: str, spot: Spot, question: str) -> QA:
    accepted = tuple(words.accepted(spot.noun))
    return QA(kind, question, words.sentence(the_thing(spot)), capital(words.proper(spot.noun)), accepted)


def relation(first: Spot, second: Spot) -> str | None:
    """On which side of the second the first clearly is."""
    (ax, ay), (bx, by) = first.centre, second.centre
    dx, dy = ax - bx, ay - by
    if abs(dx) >= 0.2 and abs(dx) > 1.6 * abs(dy):
        return "left" if dx < 0 else "right"
    if abs(dy) >= 0.2 and abs(dy) > 1.6 * abs(dx):
        return "top" if dy < 0 else "bottom"
    return None


def ask_position(rng: random.Random, view: View, world: World) -> QA | None:
    """Where something is, what is somewhere, what is beside something, which is bigger."""
    spots = view.spots
    if len({s.noun for s in spots}) != len(spots) or not spots:
        return None
    if len(spots) == 1:
        return _one_place(rng, view, spots[0])
    makers = [_beside, _beside, _side_of, _corner, _far, _bigger, _between]
    rng.shuffle(makers)
    return next((qa for make in makers if (qa := make(rng, spots)) is not None), None)


def _one_place(rng: random.Random, view: View, spot: Spot) -> QA | None:
    cell = view.cell
    if cell is None:
        return None
    thing, verb = the_thing(spot), are(spot)
    where = place_phrase(cell)
    if rng.random() < 0.5 and cell != "middle":
        across = "left" if "left" in cell else "right" if "right" in cell else ""
        along = "top" if "top" in cell else "bottom" if "bottom" in cell else ""
        side = rng.choice([s for s in (across, along) if s])
        first, second = rng.sample([side, _OPPOSITE[side]], 2)
        at = "on" if side in ("left", "right") else "at"
        question = f"{capital(verb)} {thing} {at} the {first} or the {second}{rng.choice(['', ' of the picture'])}?"
        long = f"{thing} {verb} {at} the {side}"
        return QA("position", question, words.sentence(long), capital(side), (side, f"{at} the {side}"))
    question = rng.choice([f"Where {verb} {thing}?", f"Where in the picture {verb} {thing}?"])
    short = cell.removesuffix(" corner")
    accepted = (short, cell, where)
    return QA("position", question, words.sentence(f"{thing} {verb} {where}"), capital(short), accepted)


def _beside(rng: random.Random, spots: list[Spot]) -> QA | None:
    """Ask "What is to the left of the cup?" of the only thing there; or is it left or right of it."""
    pairs = [(a, b) for a in spots for b in spots if a is not b and relation(a, b)]
    if not pairs:
        return None
    target, other = rng.choice(pairs)
    side = relation(target, other) or ""
    if rng.random() < 0.6:
        axis = 0 if side in ("left", "right") else 1
        sign = -1 if side in ("left", "top") else 1
        there = [s for s in spots if s is not other and (s.centre[axis] - other.centre[axis]) * sign > 0.08]
        if len(there) == 1:
            thing = the_thing(other)
            asked = [f"What is {RELATION[side]} {thing}?"]
            if len(spots) == 2 and axis == 0:
                asked.append(f"What is next to {thing}?")
            return thing_qa("position", target, rng.choice(asked))
    first, second = rng.sample([side, _OPPOSITE[side]], 2)
    thing, verb = the_thing(target), are(target)
    sides = f"{RELATION[first]} or {RELATION[second]}"
    if side in ("left", "right"):
        sides = f"to the {first} or to the {second} of"
    question = f"{capital(verb)} {thing} {sides} {the_thing(other)}?"
    short = RELATION[side] if side in ("top", "bottom") else side
    long = f"{thing} {verb} {RELATION[side]} {the_thing(other)}"
    return QA("position", question, words.sentence(long), capital(short), (short, RELATION[side]))


def _side_of(rng: random.Random, spots: list[Spot]) -> QA | None:
    """In which half something is."""
    clear = [(s, k) for s in spots for k in (0, 1) if abs(s.centre[k] - 0.5) > 0.16]
    if not clear:
        return None
    spot, axis = rng.choice(clear)
    side = (("left", "right"), ("top", "bottom"))[axis][spot.centre[axis] > 0.5]
    first, second = rng.sample([side, _OPPOSITE[side]], 2)
    at = "on" if axis == 0 else "at"
    thing, verb = the_thing(spot), are(spot)
    question = f"{capital(verb)} {thing} {at} the {first} or {at} the {second}{rng.choice(['', ' of the picture'])}?"
    long = words.sentence(f"{thing} {verb} {at} the {side}")
    return QA("position", question, long, capital(side), (side, f"{at} the {side}"))


def _corner(rng: random.Random, spots: list[Spot]) -> QA | None:
    """What is in a corner or in the middle, or where something is, where only that is there."""
    found: list[tuple[Spot, str]] = []
    for spot in spots:
        x, y = spot.centre
        others = [s.centre for s in spots if s is not spot]
        if abs(x - 0.5) < 0.12 and abs(y - 0.5) < 0.12:
            if all(max(abs(ox - 0.5), abs(oy - 0.5)) > 0.22 for ox, oy in others):
                found.append((spot, "middle"))
        elif abs(x - 0.5) > 0.17 and abs(y - 0.5) > 0.17:
            alone = all((ox > 0.5) != (x > 0.5) or (oy > 0.5) != (y > 0.5) for ox, oy in others)
            if alone:
                cell = f"{'bottom' if y > 0.5 else 'top'} {'right' if x > 0.5 else 'left'} corner"
                found.append((spot, cell))
    if not found:
        return None
    spot, cell = rng.choice(found)
    if rng.random() < 0.5:
        return thing_qa("position", spot, f"What is in the {cell}{rng.choice(['', ' of the picture'])}?")
    short, verb = cell.removesuffix(" corner"), are(spot)
    long = words.sentence(f"{the_thing(spot)} {verb} in the {cell}")
    return QA("position", f"Where {verb} {the_thing(spot)}?", long, capital(short), (short, cell, f"in the {cell}"))


def _far(rng: random.Random, spots: list[Spot]) -> QA | None:
    """What is leftmost, rightmost, highest or lowest."""
    sides = [("left", 0, 1), ("right", 0, -1), ("top", 1, 1), ("bottom", 1, -1)]
    rng.shuffle(sides)
    for side, axis, sign in sides:
        order = sorted(spots, key=lambda s, a=axis, b=sign: s.centre[a] * b)  # type: ignore[misc]
        if abs(order[0].centre[axis] - order[1].centre[axis]) >= 0.15:
            at = f"on the {'far ' if len(spots) > 2 else ''}{side}" if axis == 0 else f"at the {side}"
            return thing_qa("position", order[0], f"What is {at}{rng.choice(['', ' of the picture'])}?")
    return None


def _bigger(rng: random.Random, spots: list[Spot]) -> QA | None:
    """Which is bigger in the image, of two or of all."""
    small, large = rng.sample(spots, 2)
    if small.area > large.area:
        small, large = large, small
    if large.area < 1.7 * small.area:
        return None
    big = rng.random() < 0.5
    target = large if big else small
    a, b = rng.sample([the_thing(small), the_thing(large)], 2)
    word = "bigger" if big else "smaller"
    return thing_qa(
        "position",
        target,
        rng.choice([f"Which is {word} in the picture, {a} or {b}?", f"Which is {word}, {a} or {b}?"]),
    )


def _between(rng: random.Random, spots: list[Spot]) -> QA | None:
    """What is between two others."""
    if len(spots) != 3:
        return None
    for axis in (0, 1):
        a, b, c = sorted(spots, key=lambda s, k=axis: s.centre[k])  # type: ignore[misc]
        gaps = b.centre[axis] - a.centre[axis], c.centre[axis] - b.centre[axis]
        across = [s.centre[1 - axis] for s in spots]
        if min(gaps) > 0.15 and max(across) - min(across) < 0.25:
            first, second = rng.sample([the_thing(a), the_thing(c)], 2)
            return thing_qa("position", b, f"What is between {first} and {second}?")
    return None
