"""Things with names: emoji and Open Clip Art, on white, each in several views that leave its name true.

The sources, their nouns and what is held out of them are the default dataset's; the stamps, which are GPL, stay out.
To its emoji, whose names are nouns, come all others that the PyPI package `emoji` names and the font draws. Two things
are held out besides: of some nouns that both a drawing and an emoji show, one of the two, and of the other emoji one
in ten, with its likes ("man singer", "woman singer"). Held-out names are asked for in words that say the style.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image, ImageEnhance, ImageFont, features

from polymodal.errors import DataError
from recipes.default.dataset import scenes, sources, words
from recipes.default.dataset.generate import Packages, gather, over_processes
from recipes.default.dataset.plan import SIZES
from recipes.default.dataset.sources import Source

_UNFIT = re.compile(r"button|keycap|\(|arrow|medium-small")
_LIKES = re.compile(r"\b(wo)?m[ae]n'?s?\b|\b(person|people|boy|girl|facing|right|left|front|sign)\b|[^a-z]")
_SKIN_TONES = range(0x1F3FB, 0x1F400)
_SHAPE_WORDS = {*words.COLOURS, *words.SHAPES, "large", "small"}  # "red circle" is what the scenes draw
_CLIPART = ("{} as clip art", "{} in clip art style")
_EMOJI = ("{} as an emoji", "{} in emoji style")
_NAMED = ("the {} emoji", "the emoji called {}", "the {} emoji on white")


@dataclass(frozen=True)
class Drawn:
    """A source, under the number of its cut-out, and what it is held out as."""

    number: int
    source: Source
    heldout: str = ""  # "", "drawing": of a name that is known in this style, "style" or "name"

    @property
    def name(self) -> str:
        """What it shows, as a noun of the table or as the emoji's name."""
        return self.source.noun or _phrase(self.source)

    def words(self, rng: random.Random, *, style: bool = False) -> str:
        """What a request calls it; with its style where `style` or where a drawn shape has the same name."""
        said = _phrase(self.source)
        if self.source.noun is None:
            return rng.choice(_NAMED).format(said)
        plain = self.source.origin == "openclipart" and said == words.phrase(self.source.noun)
        if self.source.colour and plain and rng.random() < 0.25:
            said = words.phrase(self.source.noun, self.source.colour)
        styled = rng.choice(_CLIPART if self.source.origin == "openclipart" else _EMOJI).format(said)
        return styled if style or self.name in words.SHAPES or rng.random() < 0.6 else said


@dataclass(frozen=True)
class View:
    """One image of a source: its place, and factors of its saturation and brightness."""

    file: str
    picture: scenes.Picture
    saturation: float = 1.0
    brightness: float = 1.0


def _phrase(source: Source) -> str:
    """The caption inside a sentence: "a pair of scissors", "grinning face"."""
    caption = source.caption.rstrip(".")
    return caption if source.noun is None else caption[0].lower() + caption[1:]


def named_emoji() -> dict[str, str]:
    """Emoji -> its name, by the package `emoji`; without skin tones."""
    try:
        import emoji
    except ImportError:
        raise DataError("the names of the emoji come from a package: pip install emoji") from None
    if not features.check("raqm"):
        raise DataError("this Pillow was built without Raqm, which joined emoji need: pip install --upgrade pillow")
    return {
        char: about["en"].strip(":").replace("_", " ").replace("’", "'")
        for char, about in sorted(emoji.EMOJI_DATA.items())
        if about["status"] == emoji.STATUS["fully_qualified"] and not any(ord(c) in _SKIN_TONES for c in char)
    }


def read_named_emoji(font: Path, known: set[str]) -> list[Source]:
    """Emoji that the colour font draws, but those already known, signs with words on them, and plain shapes."""
    face = ImageFont.truetype(str(font), 109)
    blank, width = bytes(face.getmask("\U000f0000")), face.getlength("\U0001f600")
    found = []
    for char, name in named_emoji().items():
        flag = 0x1F1E6 <= ord(char[0]) <= 0x1F1FF or (len(char) > 5 and char[0] == "\U0001f3f4")
        if flag:
            name = "flag of " + name.replace(" & ", " and ")
        bare = char.replace("\ufe0f", "")
        if bare in known or _UNFIT.search(name) or {*name.split()} <= _SHAPE_WORDS:
            continue
        # A joined emoji that the font does not have is drawn as its pieces, side by side.
        if face.getlength(char) > width * 1.2 or bytes(face.getmask(char)) in (b"", blank):
            continue
        alike = "flags" if flag else re.sub(r"\s+", " ", _LIKES.sub(" ", name)).strip() or name
        key = "-".join(f"{ord(c):x}" for c in bare)
        found.append(Source(f"emoji:{key}", "emoji", char, name, None, None, f"named:{alike}", flippable=False))
    return found


def gather_named(
    thumbs: Path, size: str, seed: int, packages: Packages, workers: int, progress: bool, some: int | None = None
) -> list[Drawn]:
    """Read, cut out and split everything with a name; of the emoji that the default dataset lacks, `some`."""
    named_emoji()  # what is missing is said before the reading begins
    made = gather(thumbs, SIZES[size], seed, packages, workers, progress).sources
    kept = [(i, s) for i, s in enumerate(made) if s.origin in ("openclipart", "emoji") and s.noun]
    more = read_named_emoji(packages.emoji_font, {s.path for _, s in kept if s.origin == "emoji"})
    random.Random(f"{seed}/more").shuffle(more)
    work = partial(_measure, thumbs=thumbs, emoji_font=packages.emoji_font)
    jobs = list(enumerate(more[:some], len(made)))
    measured = over_processes(work, jobs, workers, "reading emoji", progress)
    return split(kept + [(i, s) for (i, _), s in zip(jobs, measured) if s is not None])


def _measure(job: tuple[int, Source], thumbs: Path, emoji_font: Path) -> Source | None:
    return sources.measure(job[1], thumbs / f"{job[0]}.png", emoji_font)


def _one_in(count: int, text: str) -> bool:
    return hashlib.sha256(text.encode()).digest()[0] * count < 256


def split(kept: list[tuple[int, Source]]) -> list[Drawn]:
    """Say of each source whether it is held out, and as what."""
    origins: dict[str, set[str]] = defaultdict(set)  # noun -> styles that training could show
    for _, source in kept:
        if source.noun and not source.heldout:
            origins[source.noun].add(source.origin)
    away = {
        (noun, "emoji" if _one_in(2, f"{noun}/which") else "openclipart")
        for noun, styles in origins.items()
        if len(styles) == 2 and _one_in(5, noun)
    }
    drawn = []
    for number, source in kept:
        noun = source.noun
        if noun is None:
            names = "name" if source.group != "named:flags" and _one_in(10, source.group) else ""
            drawn.append(Drawn(number, source, names))
            continue
        shown = {style for style in origins[noun] if (noun, style) not in away}
        if not source.heldout and source.origin in shown:
            drawn.append(Drawn(number, source))
        else:
            drawn.append(Drawn(number, source, "drawing" if source.origin in shown else "style" if shown else "name"))
    known = {d.name for d in drawn if not d.heldout}
    # A held-out emoji may bear the very name of something known; then its name is not new.
    return [d for d in drawn if d.heldout != "name" or d.name not in known]


def views(drawn: Drawn, count: int, rng: random.Random) -> Iterator[View]:
    """The source as it is, then smaller, shifted, mirrored where that keeps its name, and a little recoloured."""
    white = scenes.Ground("plain", (255, 255, 255), (255, 255, 255), "white")
    for view in range(count):
        first = view == 0
        size = 0.92 if first else round(rng.uniform(0.62, 0.92), 3)
        x, y = (0.5, 0.5) if first else (round(0.5 + rng.uniform(-0.5, 0.5) * (1 - size), 3) for _ in "xy")
        flip = not first and drawn.source.flippable and rng.random() < 0.5
        picture = scenes.Picture("", 0, white, [scenes.Item(drawn.number, x, y, size, flip)])
        tint = (1.0, 1.0) if first else (round(rng.uniform(0.85, 1.15), 2), round(rng.uniform(0.9, 1.08), 2))
        yield View(f"images/names/{drawn.number:05d}_{view}.png", picture, *tint)


def draw_view(view: View, thumbs: Path, side: int) -> np.ndarray:
    """Draw a view, uint8 [side, side, 3]; its ground stays white."""
    image = scenes.draw(view.picture, thumbs).resize((side, side), Image.Resampling.LANCZOS)
    if (view.saturation, view.brightness) == (1.0, 1.0):
        return np.asarray(image)
    tinted = ImageEnhance.Brightness(ImageEnhance.Color(image).enhance(view.saturation)).enhance(view.brightness)
    pixels = np.asarray(image)
    return np.where((pixels > 250).all(-1, keepdims=True), pixels, np.asarray(tinted))
