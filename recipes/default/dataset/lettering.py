"""Images of words, numbers and short lines: on cards, on signs, on plain grounds and on photographs."""

from __future__ import annotations

import functools
import random
from pathlib import Path

from recipes.default.dataset import grounds, words
from recipes.default.dataset.grounds import Back
from recipes.default.dataset.natural import Sheet
from recipes.default.dataset.studio import Studio, View

LONGEST = 8


@functools.cache
def _lists() -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(words, signs): nouns, colours, the words of the plain images and the list beside this file."""
    text = Path(__file__).with_name("lettering.txt").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    at = lines.index("[signs]")
    common = " ".join(lines[1:at]).split()
    nouns = [name for name in words.lexicon() if name.isascii() and name.isalpha()]
    every = dict.fromkeys([*common, *nouns, *words.COLOURS, *words.fixes()["written words"]])
    return tuple(w for w in every if len(w) <= LONGEST), tuple("|".join(lines[at + 1 :]).split("|"))


@functools.lru_cache(maxsize=4)
def vocabulary(unwritten: frozenset[str] = frozenset()) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The single words and the signs that are written, without those kept for judging."""
    singles, signs = _lists()
    kept = tuple(sign for sign in signs if not unwritten & set(sign.lower().split()))
    return tuple(word for word in singles if word.lower() not in unwritten), kept


def _cased(rng: random.Random, text: str) -> str:
    return rng.choice([text.upper(), text.upper(), text.lower(), text.title()])


def some_text(rng: random.Random, unwritten: frozenset[str] = frozenset()) -> tuple[str, ...]:
    """Lines: mostly one word or number, sometimes a sign or two to four words."""
    draw = rng.random()
    singles, signs = vocabulary(unwritten)
    if draw < 0.5:
        return (_cased(rng, rng.choice(singles)),)
    if draw < 0.7:
        return (str(rng.randint(0, 10 ** rng.randint(1, 3) - 1)),)
    if draw < 0.82:
        sign = rng.choice(signs)
        parts = (sign if rng.random() < 0.7 else _cased(rng, sign)).split(" ")
        return tuple(parts) if rng.random() < 0.5 or len(sign) > 12 else (" ".join(parts),)
    number = rng.choice([2, 2, 2, 3, 4])
    parts = [rng.choice(singles) for _ in range(number)]
    if rng.random() < 0.2:
        parts[-1] = str(rng.randint(1, 99))
    text = _cased(rng, " ".join(parts)).split(" ")
    if number == 2 and rng.random() < 0.5:
        return (" ".join(text),)
    return tuple(text) if number < 4 else (" ".join(text[:2]), " ".join(text[2:]))


def written(studio: Studio, lines: tuple[str, ...] | None = None) -> View:
    """An image of text that can be read."""
    rng = studio.rng
    lines = lines or some_text(rng, studio.unwritten)
    colours = list(words.COLOURS.values())
    draw = rng.random()
    paper = rng.choice([*colours, (252, 252, 252), (252, 252, 252)]) if draw < 0.7 else None
    shape = rng.choice(["card", "card", "plate"]) if paper else "none"
    if lines == ("STOP",) and rng.random() < 0.7:
        paper, shape = words.COLOURS["red"], "octagon"
    if paper:
        back = grounds.choose(rng, studio.photos, set(), named=0.1)
    else:
        # Without paper the ground must be calm.
        back = grounds.choose(rng, [], set(), named=0.45)
        while back.style in grounds.DRAWN or back.style == "texture":
            back = grounds.choose(rng, [], set(), named=0.45)
        if studio.photos and rng.random() < 0.35:
            back = Back("photo", photo=rng.choice(studio.photos).index, crop=(rng.random(), rng.random(), 0.6), blur=12)
    under = paper or back.first
    if paper is None and back.style == "photo":
        under = (studio.photos[back.photo].light,) * 3  # type: ignore[assignment]
    inks = [
        c
        for c in colours
        if abs(grounds.light_of(c) - grounds.light_of(under)) > (95 if back.style != "photo" or paper else 110)
    ]
    ink = rng.choice(inks or [(0, 0, 0) if grounds.light_of(under) > 128 else (255, 255, 255)])
    if shape == "octagon":
        ink = words.COLOURS["white"]
    widest = max(len(line) for line in lines)
    least = min(0.9, 0.14 + 0.075 * widest)
    width = rng.uniform(least, 0.95)
    height = min(0.9, rng.uniform(0.24, 0.6) * (1 + 0.5 * (len(lines) - 1)))
    free = (1 - width) / 2
    view = studio.keep(back, [], [], "text")
    view.picture.sheets.append(
        Sheet(
            lines,
            rng.choice(studio.fonts),
            ink,
            paper,
            shape,
            round(0.5 + rng.uniform(-free, free), 3),
            round(0.5 + rng.uniform(-0.2, 0.2) * (0 if height > 0.55 else 1), 3),
            round(width, 3),
            round(height, 3),
            round(rng.gauss(0, 5), 1) if rng.random() < 0.6 else 0.0,
            (round(rng.uniform(-0.1, 0.18), 3), round(rng.uniform(-0.1, 0.18), 3))
            if rng.random() < 0.4
            else (0.0, 0.0),
        )
    )
    return view
