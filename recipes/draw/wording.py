"""How a scene is asked for and told: every wording says exactly what is drawn.

What a wording leaves out has one value: a size is medium, a place the center, a background white.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from recipes.default.dataset import words
from recipes.draw.scenes import SIDE_BY_SIDE, STACKED, TRIPLES, Scene, Thing

_SIZES = {"small": ("small", "little", "tiny"), "medium": ("", "", "medium-sized"), "large": ("large", "big", "huge")}
_PLACES = {
    "center": ("", "in the center", "in the middle"),
    "left": ("on the left", "on the left side", "at the left edge"),
    "right": ("on the right", "on the right side", "at the right edge"),
    "top": ("at the top", "at the top edge"),
    "bottom": ("at the bottom", "at the bottom edge"),
    **{
        f"{row} {side}": (f"in the {row} {side} corner", f"at the {row} {side}", f"in the {other} {side} corner")
        for row, other in (("top", "upper"), ("bottom", "lower"))
        for side in ("left", "right")
    },
}
_BESIDE = (
    *("{a} left of {b}", "{a} to the left of {b}", "{b} right of {a}", "{b} to the right of {a}"),
    *("{a} on the left and {b} on the right", "{b} on the right and {a} on the left", "{a} with {b} to its right"),
)
_ABOVE = (
    *("{a} above {b}", "{a} over {b}", "{b} below {a}", "{b} under {a}", "{b} beneath {a}"),
    *("{a} at the top and {b} at the bottom", "{b} at the bottom and {a} at the top"),
)
_TWO_ABOVE = ("{a} and {b} above {c}", "{a} left of {b}, both above {c}", "{c} below {a} and {b}")
_TWO_BELOW = ("{a} above {b} and {c}", "{b} left of {c}, both below {a}", "{b} and {c} below {a}")
REQUESTS = (
    *("Draw {}.", "Draw {}.", "Please draw {}.", "Can you draw {}?", "Show me {}.", "Make a drawing of {}."),
    *("Create an image of {}.", "I would like to see {}.", "{}."),
)
QUESTIONS = ("What is drawn?", "What is in this image?", "Describe the drawing.", "What does the image show?")


def _pick(options: Sequence[str], rng: random.Random | None) -> str:
    return rng.choice(options) if rng else options[0]


def _colour(name: str, rng: random.Random | None) -> str:
    return _pick(("gray", "grey"), rng) if name == "gray" else name


def thing_phrase(thing: Thing, rng: random.Random | None = None) -> str:
    """An object without its place: "a small red circle"."""
    adjectives = f"{_pick(_SIZES[thing.size], rng)} {_colour(thing.color, rng)}".strip()
    return f"{words.article(adjectives)} {adjectives} {thing.shape}"


def scene_phrase(scene: Scene, rng: random.Random | None = None) -> str:
    """A scene in words, lower case, without a full stop; always the same words without `rng`."""
    ground = scene.background
    if ground == "white":
        ground = _pick(("", "", "on a white background"), rng)
    else:
        prefix = _pick(("on", "against", "with"), rng)
        ground = f"{prefix} a {_colour(ground, rng)} background"
    if len(scene.things) == 1:
        said, place = thing_phrase(scene.things[0], rng), _pick(_PLACES[scene.things[0].cell], rng)
        if rng and ground and place and rng.random() < 0.2:
            return f"{said} {ground}, {place}"
        return " ".join(filter(None, (said, place, ground)))
    return f"{_arrangement(scene.things, rng)} {ground}".strip()


def _arrangement(things: Sequence[Thing], rng: random.Random | None) -> str:
    named = dict(zip("abc", (thing_phrase(thing, rng) for thing in things)))
    cells = tuple(thing.cell for thing in things)
    by_relation = {SIDE_BY_SIDE: _BESIDE, STACKED: _ABOVE, TRIPLES[0]: _TWO_ABOVE, TRIPLES[1]: _TWO_BELOW}
    relations = by_relation.get(cells, ())
    if relations and (len(things) == 2 or not rng or rng.random() < 0.7):
        return _pick(relations, rng).format(**named)
    placed = [f"{said} {_pick(_PLACES[cell], rng)}" for said, cell in zip(named.values(), cells)]
    if rng:
        rng.shuffle(placed)
    return f"{', '.join(placed[:-1])} and {placed[-1]}"


def request(phrase: str, rng: random.Random | None = None) -> str:
    """Ask for a drawing of what a phrase says."""
    asked = _pick(REQUESTS, rng).format(phrase)
    return asked[0].upper() + asked[1:]


def follow_up(scene: Scene, rng: random.Random) -> tuple[str, str]:
    """A question about a drawing that was just made, with its answer."""
    thing = rng.choice(scene.things)
    options = [("What color is the background?", scene.background)]
    if sum(other.shape == thing.shape for other in scene.things) == 1:
        place = "in the center" if thing.cell == "center" else _PLACES[thing.cell][0]
        options += [(f"What color is the {thing.shape}?", thing.color), (f"Where is the {thing.shape}?", place)]
    if sum(other.color == thing.color for other in scene.things) == 1:
        options.append((f"Which shape is {thing.color}?", f"the {thing.shape}"))
    question, answer = rng.choice(options)
    return question, words.sentence(answer)
