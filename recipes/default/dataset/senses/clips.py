"""Short clips of moving cut-outs, planned first and drawn after, with questions that one frame cannot answer.

Eight frames evenly taken show it, at four by four cells a frame: things are large and go far. Which of the answers is
right is drawn before the question is worded, so that a model that does not look is at chance.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from recipes.default.dataset import scenes, words
from recipes.default.dataset.plan import Composer
from recipes.default.dataset.questions import QA, capital, named_as, the_thing
from recipes.default.dataset.scenes import Ground, Item, Picture
from recipes.default.dataset.senses.media import write_clip
from recipes.default.dataset.sources import Source

Place = tuple[float, float, float]  # centre and size, as shares of the side
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
_SAID = {"left": "to the left", "right": "to the right", "up": "up", "down": "down"}
_ANSWERS = {
    "left": ("left", "to the left", "leftwards"),
    "right": ("right", "to the right", "rightwards"),
    "up": ("up", "upwards", "to the top"),
    "down": ("down", "downwards", "to the bottom"),
}


@dataclass(frozen=True)
class Track:
    """One cut-out's way through a clip."""

    source: int
    start: Place
    end: Place
    first: float = 0.0  # seen from here, as a share of the clip
    last: float = 1.0
    flip: bool = False

    def at(self, time: float) -> Item | None:
        """Where it is; None where it is not there."""
        if not self.first <= time < (self.last if self.last < 1 else 2):
            return None
        share = (time - self.first) / max(1e-6, self.last - self.first)
        x, y, size = (a + (b - a) * share for a, b in zip(self.start, self.end, strict=True))
        return Item(self.source, x, y, size, self.flip)


@dataclass(frozen=True)
class Clip:
    """The plan of one clip, and what is asked about it; the first question is what the clip was made for."""

    file: str
    seed: int
    ground: Ground
    tracks: tuple[Track, ...]
    sources: tuple[Source, ...]
    frames: int
    rate: int
    asked: tuple[QA, ...]


def draw_clip(clip: Clip, thumbs: Path, root: Path) -> str:
    """Draw a clip's file; returns its SHA-256."""
    frames = []
    for number in range(clip.frames):
        items = [item for track in clip.tracks if (item := track.at(number / (clip.frames - 1)))]
        frames.append(scenes.draw(Picture(clip.file, clip.seed, clip.ground, items), thumbs))
    write_clip(root / clip.file, frames, clip.rate)
    return hashlib.sha256((root / clip.file).read_bytes()).hexdigest()


def compose_clip(make: Composer, kind: str, file: str) -> Clip:
    """Plan a clip of a kind of `KINDS`."""
    rng = make.rng
    tracks, asked = KINDS[kind](make)
    shown = tuple(make.sources[i] for i in dict.fromkeys(t.source for t in tracks))
    tracks = tuple(replace(t, flip=flip) for t, flip in zip(tracks, _flips(make, tracks), strict=True))
    ground = scenes.choose_ground(rng, list(shown), named=0.25)
    if ground.style == "blurred":  # patches look like things that might move
        ground = replace(ground, style="gradient")
    frames = rng.choice([8, 10, 12, 14])
    return Clip(file, rng.getrandbits(32), ground, tracks, shown, frames, rng.choice([3, 4, 5]), tuple(asked))


def _flips(make: Composer, tracks: tuple[Track, ...]) -> list[bool]:
    """The same thing is turned the same way throughout."""
    turned = {i: make.sources[i].flippable and make.rng.random() < 0.5 for i in dict.fromkeys(t.source for t in tracks)}
    return [turned[t.source] for t in tracks]


def _one(make: Composer) -> int:
    """A thing with a plain name, drawn shapes a third of the time."""
    return make.rng.choice(make.shapes if make.shapes and make.rng.random() < 0.35 else make.countable)


def _two(make: Composer, *, alike: bool = False) -> tuple[int, int]:
    """Two things that nobody mixes up; where `alike`, one shape in two colours."""
    for _ in range(500):
        first, second = (make.rng.choice(make.shapes) if alike else _one(make) for _ in range(2))
        one, two = make.sources[first], make.sources[second]
        if alike and one.noun == two.noun and one.colour != two.colour:
            return first, second
        if not alike and not words.related(one.noun or "", two.noun or "") and one.colour != two.colour:
            return first, second
    raise AssertionError("no two things to tell apart in the pool")


def _names(source: Source) -> tuple[str, ...]:
    whole = named_as(source).split(" ", 1)[-1]
    return tuple(dict.fromkeys([*words.accepted(source.noun or ""), whole]))


def _name(kind: str, question: str, source: Source) -> QA:
    return QA(
        kind, question, words.sentence(named_as(source)), capital(words.proper(source.noun or "")), _names(source)
    )


def _or(rng: random.Random, first: str, second: str) -> str:
    return " or ".join(rng.sample([first, second], 2))


def _extra(make: Composer, source: Source) -> list[QA]:
    """What is asked of any clip of one thing: its name, its colour, whether something is there."""
    rng = make.rng
    asked = [_name("name", rng.choice(["What is in the video?", "What does the video show?", "What is this?"]), source)]
    if source.colour:
        long = words.sentence(f"{the_thing(source)} is {source.colour}")
        accepted = (source.colour, *words.COLOUR_SYNONYMS.get(source.colour, []))
        bare = f"the {words.proper(source.noun or '')}"
        asked.append(QA("color", f"What color is {bare}?", long.replace(f"{source.colour} ", "", 1)
                        if source.origin == "shapes" else long, capital(source.colour), accepted))  # fmt: skip
    yes = rng.random() < 0.5
    other = source.noun or ""
    while not yes and words.related(other, source.noun or ""):
        other = make.sources[_one(make)].noun or ""
    question = f"Is there {words.phrase(other)} in the video?"
    long = "Yes, there is." if yes else "No, there is not."
    asked.append(QA("exists", question, long, "Yes" if yes else "No", ("yes",) if yes else ("no",)))
    return asked


def _straight(rng: random.Random, direction: str) -> tuple[Place, Place]:
    dx, dy = DIRECTIONS[direction]
    size, across, far = rng.uniform(0.3, 0.44), rng.uniform(0.35, 0.65), rng.uniform(0.26, 0.31)
    ends = [(0.5 + s * far * dx + abs(dy) * (across - 0.5), 0.5 + s * far * dy + abs(dx) * (across - 0.5), size)
            for s in (-1, 1)]  # fmt: skip
    return ends[0], ends[1]


def _rest(rng: random.Random) -> Place:
    return rng.uniform(0.32, 0.68), rng.uniform(0.32, 0.68), rng.uniform(0.34, 0.6)


Made = tuple[tuple[Track, ...], list[QA]]


def _direction(make: Composer) -> Made:
    rng, index = make.rng, _one(make)
    source, way = make.sources[index], make.rng.choice(list(DIRECTIONS))
    start, end = _straight(rng, way)
    it = rng.choice([the_thing(source), "it"])
    pair = _or(rng, *(("left", "right") if way in ("left", "right") else ("up", "down")))
    question = rng.choice([f"Which way does {it} move?", f"In which direction does {it} move?",
                           f"Where does {it} move to?", f"Does {it} move {pair}?"])  # fmt: skip
    long = words.sentence(f"{rng.choice([the_thing(source), 'it'])} moves {_SAID[way]}")
    asked = [QA("direction", question, long, capital(way), _ANSWERS[way])]
    asked += [_described(rng, f"{named_as(source)} moves {_SAID[way]}"), _moving(rng, source, True)]
    return (Track(index, start, end),), asked + _extra(make, source)


def _described(rng: random.Random, text: str) -> QA:
    question = rng.choice(["Describe the video.", "What happens in the video?", "What happens?"])
    return QA("caption", question, words.sentence(text), words.sentence(text), (text,))


def _moving(rng: random.Random, source: Source, moves: bool) -> QA:
    it = rng.choice([the_thing(source), "it"])
    if rng.random() < 0.5:
        question = rng.choice([f"Does {it} move or stand still?", f"Does {it} stand still or move?"])
        long = f"{it} moves" if moves else f"{it} stands still"
        good = ("moves", "move", "it moves", "moving") if moves else ("stands still", "stand still", "still")
        return QA("moving", question, words.sentence(long), "Moves" if moves else "Stands still", good)
    question = rng.choice([f"Does {it} move?", f"Is {it} moving?"])
    long = f"Yes, {it} moves." if moves else f"No, {it} stands still."
    return QA("moving", question, long, "Yes" if moves else "No", ("yes",) if moves else ("no",))


def _still(make: Composer) -> Made:
    rng, index = make.rng, _one(make)
    source, moves = make.sources[index], make.rng.random() < 0.5
    start = end = _rest(rng)
    text = f"{named_as(source)} stands still"
    if moves:
        way = rng.choice(list(DIRECTIONS))
        start, end = _straight(rng, way)
        text = f"{named_as(source)} moves {_SAID[way]}"
    return (Track(index, start, end),), [_moving(rng, source, moves), _described(rng, text), *_extra(make, source)]


def _growth(make: Composer) -> Made:
    rng, index = make.rng, _one(make)
    source, grows = make.sources[index], make.rng.random() < 0.5
    x, y = rng.uniform(0.45, 0.55), rng.uniform(0.45, 0.55)
    small, big = (x, y, rng.uniform(0.16, 0.24)), (x, y, rng.uniform(0.75, 0.95))
    start, end = (small, big) if grows else (big, small)
    it = rng.choice([the_thing(source), "it"])
    words_of = {True: ("grows", "bigger", "larger"), False: ("shrinks", "smaller", "littler")}[grows]
    question = rng.choice(
        [f"Does {it} {_or(rng, 'grow', 'shrink')}?", f"Does {it} get {_or(rng, 'bigger', 'smaller')}?"]
    )
    short = words_of[0] if "grow" in question else words_of[1]
    long = f"{it} {words_of[0]}" if "grow" in question else f"{it} gets {words_of[1]}"
    accepted = (
        *words_of,
        words_of[0].rstrip("s"),
        f"it {words_of[0]}",
        f"gets {words_of[1]}",
        f"it gets {words_of[1]}",
    )
    asked = [QA("growth", question, words.sentence(long), capital(short), accepted)]
    asked.append(_described(rng, f"{named_as(source)} gets {words_of[1]}"))
    return (Track(index, start, end),), asked + _extra(make, source)


def _order(make: Composer) -> Made:
    rng = make.rng
    pair = _two(make)
    one, two = (make.sources[i] for i in pair)
    tracks = tuple(
        Track(index, (place := _rest(rng)), place, first, first + 0.5)
        for index, first in zip(pair, (0.0, 0.5), strict=True)
    )
    target, when = rng.choice([(one, "first"), (two, "last")])
    question = rng.choice([f"What comes {when}?", f"What do you see {when}?",
                           f"What comes {when}, {_or(rng, the_thing(one), the_thing(two))}?"])  # fmt: skip
    asked = [_name("order", question, target)]
    asked.append(_described(rng, f"first {named_as(one)}, then {named_as(two)}"))
    about, before = rng.choice([(one, True), (two, False)])
    other = two if about is one else one
    question = f"Does {the_thing(about)} come {_or(rng, 'before', 'after')} {the_thing(other)}?"
    relation = "before" if before else "after"
    long = words.sentence(f"{the_thing(about)} comes {relation} {the_thing(other)}")
    asked.append(QA("order", question, long, capital(relation), (relation, f"{relation} {the_thing(other)}")))
    asked.append(_name("order", f"What comes after {the_thing(one)}?", two))
    return tracks, asked


def _which(make: Composer) -> Made:
    rng = make.rng
    pair = _two(make)
    mover = rng.randrange(2)
    tracks = []
    for place, index in enumerate(pair):
        x, size = 0.25 + 0.5 * place, rng.uniform(0.34, 0.44)
        ends = [(x, 0.22, size), (x, 0.78, size)]
        if place != mover:
            ends = [(x, rng.uniform(0.3, 0.7), size)] * 2
        elif rng.random() < 0.5:
            ends.reverse()
        tracks.append(Track(index, ends[0], ends[1]))
    one, two = (make.sources[i] for i in pair)
    moving, resting = (one, two) if mover == 0 else (two, one)
    target, verb = rng.choice([(moving, "moves"), (resting, "stands still")])
    question = rng.choice([f"What {verb}?", f"Which one {verb}, {_or(rng, the_thing(one), the_thing(two))}?"])
    asked = [_name("which", question, target)]
    asked.append(_described(rng, f"{named_as(moving)} moves, and {named_as(resting)} stands still"))
    side = ("left", "right")[mover]
    long = f"The thing on the {side} moves."
    asked.append(
        QA("which", f"Which side moves, {_or(rng, 'left', 'right')}?", long, capital(side), (side, f"the {side}"))
    )
    return tuple(tracks), asked


def _count(make: Composer) -> Made:
    rng, index = make.rng, _one(make)
    source, number = make.sources[index], make.rng.randint(1, 4)
    cells = rng.sample([(0.27, 0.27), (0.73, 0.27), (0.27, 0.73), (0.73, 0.73)], number)
    size = rng.uniform(0.32, 0.44)
    tracks = tuple(Track(index, (x, y, size), (x, y, size), 0.8 * k / number) for k, (x, y) in enumerate(cells))
    many, said = words.proper(words.plural(source.noun or "")), words.NUMBERS[number]
    question = rng.choice([f"How many {many} come in?", f"How many {many} are there at the end?",
                           f"How many {many} do you see at the end?"])  # fmt: skip
    long = words.sentence(words.number_phrase(number, source.noun or "")) if number > 1 else f"One {source.noun}."
    asked = [QA("count", question, long, capital(said), (said, str(number)))]
    asked.append(_described(rng, f"{words.number_phrase(number, source.noun or '')} come in one after the other")
                 if number > 1 else _described(rng, f"{named_as(source)} stands still"))  # fmt: skip
    return tracks, asked + _extra(make, source)


def _change(make: Composer) -> Made:
    rng = make.rng
    pair = _two(make, alike=True)
    one, two = (make.sources[i] for i in pair)
    place = _rest(rng)
    tracks = (Track(pair[0], place, place, 0.0, 0.5), Track(pair[1], place, place, 0.5, 1.0))
    noun = f"the {one.noun}"
    target, forms = rng.choice(
        [
            (one, [f"What color is {noun} at the start?", f"What color is {noun} first?"]),
            (two, [f"What color is {noun} at the end?", f"What color does {noun} turn?"]),
        ]
    )
    colour = target.colour or ""
    long = words.sentence(f"{noun} {'is' if target is one else 'turns'} {colour}")
    accepted = (colour, *words.COLOUR_SYNONYMS.get(colour, []))
    asked = [QA("change", rng.choice(forms), long, capital(colour), accepted)]
    asked.append(_described(rng, f"{named_as(one)} turns {two.colour}"))
    return tracks, [*asked, _name("name", "What is in the video?", replace(one, origin="clip"))]


def _coming(make: Composer) -> Made:
    rng, index = make.rng, _one(make)
    source, comes = make.sources[index], make.rng.random() < 0.5
    place = _rest(rng)
    track = Track(index, place, place, *((0.5, 1.0) if comes else (0.0, 0.5)))
    it = rng.choice([the_thing(source), "it"])
    question = rng.choice(
        [f"Does {it} {_or(rng, 'appear', 'disappear')}?", f"Does {it} {_or(rng, 'come', 'go away')}?"]
    )
    verb = ("appears" if comes else "disappears") if "appear" in question else ("comes" if comes else "goes away")
    good = (
        ("appears", "comes", "appear", "come") if comes else ("disappears", "goes away", "disappear", "go away", "goes")
    )
    asked = [QA("coming", question, words.sentence(f"{it} {verb}"), capital(verb), (*good, *(f"it {w}" for w in good)))]
    asked.append(_described(rng, f"{named_as(source)} {verb}"))
    return (track,), asked + _extra(make, source)


KINDS: dict[str, Callable[[Composer], Made]] = {
    "direction": _direction,
    "moving": _still,
    "growth": _growth,
    "order": _order,
    "which": _which,
    "count": _count,
    "change": _change,
    "coming": _coming,
}
SHARES = {"direction": 0.3, "moving": 0.1, "growth": 0.12, "order": 0.14, "which": 0.1, "count": 0.08, "change": 0.08,
          "coming": 0.08}  # fmt: skip
