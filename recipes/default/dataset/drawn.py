"""What charts and documents share: named colours, measured text, conversations and held-out questions about one image.

An image is planned first (`places` says what lies where, `lines` what can be read) and drawn later; its topics are
functions `(rng, image) -> QA | None`, where None says that the question does not suit it.
"""

from __future__ import annotations

import functools
import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from recipes.default.dataset import plan as planning
from recipes.default.dataset import questions, words
from recipes.default.dataset.questions import QA, Scene

SIDE = 224  # in which all images are planned, whatever size they are drawn in
Place = tuple[str, float, float, float, float]  # word or noun phrase, left, top, right, bottom in 0..1
Colour = tuple[int, int, int]

# Shades of a colour's name: for training, and the last one for held-out images alone.
SHADES: dict[str, list[Colour]] = {
    "red": [(214, 39, 40), (235, 20, 25), (178, 24, 43), (222, 60, 50)],
    "orange": [(255, 127, 14), (245, 145, 30), (230, 110, 10), (250, 140, 50)],
    "yellow": [(250, 220, 40), (255, 235, 60), (240, 200, 20), (245, 225, 90)],
    "green": [(44, 160, 44), (20, 130, 60), (100, 190, 70), (60, 145, 85)],
    "blue": [(31, 119, 180), (35, 80, 200), (60, 140, 230), (50, 95, 165)],
    "purple": [(148, 103, 189), (125, 45, 160), (100, 40, 130), (135, 75, 170)],
    "pink": [(247, 129, 191), (245, 140, 185), (255, 160, 200), (240, 120, 170)],
    "brown": [(140, 86, 75), (125, 75, 35), (160, 95, 45), (110, 70, 45)],
    "black": [(15, 15, 15), (30, 30, 30), (0, 0, 0), (22, 22, 22)],
    "gray": [(127, 127, 127), (150, 150, 150), (110, 115, 120), (135, 135, 130)],
}


class Drawn(Protocol):
    """A planned chart or document."""

    file: str
    heldout: bool
    places: tuple[Place, ...]
    lines: tuple[str, ...]

    def draw(self, thumbs: Any) -> Any:
        """Draw it."""
        ...


ZH_NUMBERS = {**words.ZH_NUMBERS, 1: "一", 5: "五"}
Topics = Mapping[str, Callable[[random.Random, Any], QA | None]]


def shade(rng: random.Random, name: str, heldout: bool) -> Colour:
    """A shade of the colour."""
    *known, kept = SHADES[name]
    r, g, b = kept if heldout else rng.choice(known)
    return min(255, max(0, r + rng.randint(-6, 6))), min(255, max(0, g + rng.randint(-6, 6))), b


def light(colour: Colour) -> float:
    """How bright a colour is, 0 to 255."""
    return 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2]


def ink_on(ground: Colour) -> Colour:
    """Black or white, whichever is read on the ground."""
    return (20, 20, 20) if light(ground) > 125 else (250, 250, 250)


def split(text: str, heldout: bool) -> list[str]:
    """The words for training, before the `|`, or those held out, after it; `_` stands for a space."""
    return [word.replace("_", " ") for word in text.split("|")[heldout].split()]


@functools.lru_cache(maxsize=64)
def _measure(font: str) -> Any:
    from PIL import ImageFont

    return ImageFont.truetype(font, 100)


@functools.lru_cache(maxsize=20000)
def width_of(text: str, font: str) -> float:
    """The width of a line at a size of one pixel."""
    return float(_measure(font).getlength(text)) / 100


def fit(texts: Sequence[str], font: str, width: float, most: float) -> float:
    """The largest size of letters, at most `most`, at which each text is no wider than `width`."""
    return min([most, *(width / max(0.01, width_of(text, font)) for text in texts)])


def real_font(font: str) -> str:
    """The file of a font; of matplotlib's own where none is named (the size `tiny`, which needs no packages)."""
    if font:
        return font
    import matplotlib

    return f"{matplotlib.get_data_path()}/fonts/ttf/DejaVuSans.ttf"


def text_place(text: str, x: float, y: float, size: float, font: str, align: str = "center") -> Place:
    """Where a line lies whose middle (or left or right end) is at (x, y), in pixels of SIDE."""
    width = width_of(text, font) * size
    left = x - {"center": width / 2, "left": 0.0, "right": width}[align]
    return box(text, left, y - size * 0.5, left + width, y + size * 0.5)


def box(text: str, left: float, top: float, right: float, bottom: float) -> Place:
    """A place from pixels of SIDE."""
    a, b, c, d = (round(min(max(v / SIDE, 0.0), 1.0), 3) for v in (left, top, right, bottom))
    return text, a, b, c, d


def each_word(place: Place, font: str) -> list[Place]:
    """A line's place as those of its words."""
    text, left, top, right, bottom = place
    whole = max(0.01, width_of(text, font))
    found, start = [], 0
    for word in text.split():
        start = text.index(word, start)
        before = width_of(text[:start], font) / whole
        after = width_of(text[: start + len(word)], font) / whole
        found.append(
            (word, round(left + before * (right - left), 3), top, round(left + after * (right - left), 3), bottom)
        )
        start += len(word)
    return found


def listed(names: Sequence[str]) -> str:
    """Names as a sentence lists them (apple, pear and plum)."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def yes_no(kind: str, question: str, yes: bool, why: str = "") -> QA:
    """A question answered by yes or no; `why` ends the long answer ("it is")."""
    long = ("Yes" if yes else "No") + (f", {why}{'' if yes else ' not'}." if why else ".")
    return QA(kind, question, long, "Yes" if yes else "No", ("yes",) if yes else ("no",))


def number_qa(kind: str, question: str, count: int, thing: str) -> QA:
    """A question answered by a number word."""
    word = words.NUMBERS[count]
    verb, end = ("is", "") if count == 1 else ("are", "s")
    return QA(kind, question, f"There {verb} {word} {thing}{end}.", questions.capital(word), (word, str(count)))


def color_qa(kind: str, question: str, thing: str, colour: str) -> QA:
    """A question answered by a colour."""
    accepted = (colour, *words.COLOUR_SYNONYMS.get(colour, []))
    return QA(kind, question, words.sentence(f"{thing} is {colour}"), questions.capital(colour), accepted)


def record(
    source: str, number: str, image: Drawn, turns: list[tuple[str, str]], kinds: list[str], **more: Any
) -> planning.Record:
    """A record about one drawn image; its source is what it is (chart, document), for the losses by source."""
    scene = Scene(image, (), source)  # type: ignore[arg-type]
    return {**planning.record_of(number, [scene], turns, kinds, **more), "source": source}


def conversations(
    rng: random.Random, make: Callable[[str], Any], topics: Topics, number: int, prefix: str
) -> tuple[list[Any], list[planning.Record]]:
    """Images with three to five questions about each, on different topics."""
    images, records = [], []
    for place in range(number):
        image = make(f"images/{prefix}_{place:05d}.jpg")
        names = list(topics)
        rng.shuffle(names)
        turns: list[tuple[str, str]] = []
        kinds: list[str] = []
        wanted = rng.randint(3, 5)
        for name in names:
            qa = topics[name](rng, image)
            if qa is not None and len(turns) < wanted:
                turns.append(questions.turn(rng, qa))
                kinds.append(qa.kind)
        images.append(image)
        records.append(record(prefix, f"{prefix}-{place:05d}", image, turns, kinds, kind=prefix))
    return images, records


def captions(
    rng: random.Random, make: Callable[[str], Any], say: Callable[[random.Random, Any], str], number: int, prefix: str
) -> tuple[list[Any], list[planning.Record]]:
    """Images with a caption each, for the stage that aligns."""
    images = [make(f"images/{prefix}_c{place:05d}.jpg") for place in range(number)]
    records = [
        record(prefix, f"{prefix}-c{place:05d}", image, [("", say(rng, image))], ["caption"], kind="caption")
        for place, image in enumerate(images)
    ]
    return images, records


def heldout_questions(
    rng: random.Random, make: Callable[[str], Any], topics: Topics, number: int, prefix: str
) -> tuple[list[Any], list[planning.Record]]:
    """Questions on every topic in turn, one an image; no answer is given to more than a tenth of all."""
    images: list[Any] = []
    records: list[planning.Record] = []
    taken: Counter[tuple[str, str]] = Counter()
    overall: Counter[str] = Counter()
    asked: set[tuple[str, str]] = set()
    names = list(topics)
    share = -(-number // len(names))
    for _ in range(number * 500):
        if len(records) == number:
            break
        topic = names[len(records) % len(names)]
        image = make(f"images/val_{prefix}_{len(images):05d}.jpg")
        qa = topics[topic](rng, image)
        if qa is None:
            continue
        if qa.short in ("Yes", "No"):
            other = "No" if qa.short == "Yes" else "Yes"
            # As often in each topic; where that is so, as often in all.
            ahead = (taken[topic, qa.short] - taken[topic, other]) or (overall[qa.short] - overall[other])
            full = ahead > 0
        else:
            few = 2 if topic in ("trend", "place", "upright") else 4
            full = taken[topic, qa.short] >= -(-share // few) or overall[qa.short] >= max(2, number // 10)
        if full or (qa.question, qa.short) in asked:
            continue
        taken[topic, qa.short] += 1
        overall[qa.short] += 1
        asked.add((qa.question, qa.short))
        prompt = f"{qa.question}\n{words.SHORT}"
        more = {"kind": prefix, "topic": topic, "prompt": prompt, "answers": list(qa.accepted)}
        name = f"val-{prefix}-{len(records):03d}"
        records.append(record(prefix, name, image, [(prompt, qa.short)], [prefix], **more))
        images.append(image)
    if len(records) < number:
        raise AssertionError(f"{prefix}: {len(records)} of {number} held-out questions")
    return images, records


@dataclass(frozen=True)
class Paper:
    """A sort of drawn image and what is asked about it: conversations, captions, and questions to judge by."""

    kind: str
    plan: Callable[[str, random.Random, list[str], bool], Any]  # file, rng, fonts, whether held out
    topics: Topics
    taught: Topics  # asked in training alone
    say: Callable[[random.Random, Any], str]  # a caption

    def _maker(self, rng: random.Random, fonts: list[str], heldout: bool) -> Callable[[str], Any]:
        return lambda file: self.plan(file, rng, fonts, heldout)

    def compose(self, rng: random.Random, fonts: list[str], number: int) -> tuple[list[Any], list[planning.Record]]:
        """Training conversations of three to five questions, one image each."""
        topics = {**self.topics, **self.taught}
        return conversations(rng, self._maker(rng, fonts, heldout=False), topics, number, self.kind)

    def captions(self, rng: random.Random, fonts: list[str], number: int) -> tuple[list[Any], list[planning.Record]]:
        """Training images with a caption each."""
        return captions(rng, self._maker(rng, fonts, heldout=False), self.say, number, self.kind)

    def heldout(
        self, rng: random.Random, fonts: list[str], number: int = 100
    ) -> tuple[list[Any], list[planning.Record]]:
        """A question an image, of words, shades and fonts that training never draws."""
        return heldout_questions(rng, self._maker(rng, fonts, heldout=True), self.topics, number, self.kind)
