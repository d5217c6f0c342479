"""Plan natural scenes: which cut-outs, where, how large, in what colour, and what may be said to be where."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from recipes.default.dataset import grounds, natural, words
from recipes.default.dataset.grounds import Back, Photo
from recipes.default.dataset.natural import Box, NaturalImage, Sheet, Thing
from recipes.default.dataset.sources import Source

_HUES = {"red": 357, "orange": 31, "yellow": 53, "green": 120, "blue": 222, "purple": 281}
_TURNED = ("red", "green", "blue", "purple")  # what a hue alone makes; orange and yellow need their brightness too
_NO_TINT = {"rainbow", "palette", "flag", "orange", "rose", "peach", "plum", "lime", "traffic light", "earth", "globe"}
CELLS = {
    "top left corner": (0.2, 0.2),
    "top": (0.5, 0.2),
    "top right corner": (0.8, 0.2),
    "left": (0.2, 0.5),
    "middle": (0.5, 0.5),
    "right": (0.8, 0.5),
    "bottom left corner": (0.2, 0.8),
    "bottom": (0.5, 0.8),
    "bottom right corner": (0.8, 0.8),
}


@dataclass(frozen=True)
class Look:
    """What a source is like: width over height, and whether it is a rectangle without a transparent ground."""

    aspect: float = 1.0
    whole: bool = False


@dataclass(frozen=True)
class Spot:
    """What is where in an image."""

    source: Source
    box: Box
    colour: str | None = None  # as drawn, where it is plain
    painted: bool = False  # the colour belongs to its name ("a red cup")

    @property
    def noun(self) -> str:
        """What it is called."""
        return self.source.noun or ""

    @property
    def phrase(self) -> str:
        """With its article, and its colour where that was chosen."""
        return words.phrase(self.noun, self.colour or "" if self.painted else "")

    @property
    def centre(self) -> tuple[float, float]:
        """Middle of its box."""
        x0, y0, x1, y1 = self.box
        return (x0 + x1) / 2, (y0 + y1) / 2

    @property
    def area(self) -> float:
        """Of its box, as a share of the image."""
        x0, y0, x1, y1 = self.box
        return (x1 - x0) * (y1 - y0)


@dataclass
class View:
    """A planned image and what is in it."""

    picture: NaturalImage
    spots: list[Spot]
    layout: str  # single | several | counted | placed | odd | text | unsure
    cell: str | None = None  # of a single placed thing
    kind: str | None = None  # the noun that is counted

    @property
    def objects(self) -> tuple[Source, ...]:
        """Everything shown, as records name it."""
        return tuple(s.source for s in self.spots)

    @property
    def sheet(self) -> Sheet | None:
        """The text, where there is one."""
        return self.picture.sheets[0] if self.picture.sheets else None


def looks(thumbs: Path, sources: Sequence[Source]) -> list[Look]:
    """Measure the cut-outs of the sources, `0.png` and so on."""
    from PIL import Image

    found: list[Look] = []
    for index, source in enumerate(sources):
        with Image.open(thumbs / f"{index}.png") as image:
            found.append(Look(round(image.width / image.height, 4), getattr(source, "rectangular", False)))
    return found


@dataclass
class Studio:
    """Draws scenes from the training sources and keeps the list of images."""

    rng: random.Random
    sources: list[Source]
    fonts: list[str]
    photos: list[Photo]
    looks: list[Look]
    prefix: str
    unwritten: frozenset[str] = frozenset()  # words that no image of text may show
    views: list[View] = field(default_factory=list)

    @property
    def pictures(self) -> list[NaturalImage]:
        """What is to be drawn."""
        return [view.picture for view in self.views]

    def __post_init__(self) -> None:
        self.pool = [i for i, s in enumerate(self.sources) if not s.heldout and s.noun]
        self.cuts = [i for i in self.pool if not self.looks[i].whole]
        self.shapes = [i for i in self.cuts if self.sources[i].origin == "shapes"]
        self.things = [i for i in self.cuts if self.sources[i].origin != "shapes"] or self.cuts
        self.real = [i for i in self.pool if self.sources[i].photo or self.looks[i].whole]
        self.countable = [i for i in self.cuts if _countable(self.sources[i])]
        self.alike: dict[str, list[int]] = {}  # those that can be counted, by noun
        for i in self.countable:
            self.alike.setdefault(self.sources[i].noun or "", []).append(i)
        self.by_colour: dict[str, list[int]] = {}
        for i in self.cuts:
            if (colour := self.sources[i].colour) is not None:
                self.by_colour.setdefault(colour, []).append(i)
        self.by_noun: dict[str, list[int]] = {}
        self.by_category: dict[str, list[int]] = {}
        for i in self.pool:
            self.by_noun.setdefault(self.sources[i].noun or "", []).append(i)
            self.by_category.setdefault(self.sources[i].category or "", []).append(i)

    def keep(
        self,
        back: Back,
        things: list[Thing],
        spots: list[Spot],
        layout: str,
        *,
        finish: natural.Finish | None = None,
        **more: str | None,
    ) -> View:
        """Give the plan its file and keep it."""
        true = back.name is not None or any(s.colour for s in spots)
        image = NaturalImage(
            f"images/{self.prefix}{len(self.views):05d}.jpg",
            self.rng.getrandbits(32),
            back,
            things,
            finish=finish or natural.any_finish(self.rng, true=true),
        )
        self.views.append(View(image, spots, layout, **more))
        return self.views[-1]

    def put(
        self, index: int, x: float, y: float, size: float, *, tint: str | None = None, tilt: float = 12.0
    ) -> tuple[Thing, Spot]:
        """A cut-out at a place, turned a little; in a colour where `tint` names one."""
        rng, source, look = self.rng, self.sources[index], self.looks[index]
        angle = round(rng.gauss(0, tilt / 2), 1) if rng.random() < 0.6 else 0.0
        lean = (0.0, 0.0)
        if rng.random() < 0.3:
            lean = (round(rng.uniform(-0.15, 0.22), 3), round(rng.uniform(-0.15, 0.22), 3))
        thing = Thing(
            index,
            natural.quad_of(x, y, size, look.aspect, angle=max(-tilt, min(tilt, angle)), lean=lean),
            source.flippable and rng.random() < 0.5,
            shadow=round(rng.uniform(0.25, 0.6), 2) if size < 0.9 and rng.random() < 0.55 else 0.0,
        )
        if tint and tint != source.colour:
            thing = self.paint(thing, tint)
        elif tint is None or source.origin == "shapes":
            tint = source.colour
        return thing, Spot(source, thing.box, tint, source.origin == "shapes" or tint != source.colour)

    def paint(self, thing: Thing, colour: str) -> Thing:
        """The thing in a colour: by hue where the drawing has one clear hue, in its shades otherwise."""
        own = self.sources[thing.source].colour
        if own in _HUES and colour in _TURNED and not self.sources[thing.source].photo and self.rng.random() < 0.6:
            return replace(thing, tint=None, turned=float((_HUES[colour] - _HUES[own]) % 360))
        return replace(thing, tint=colour, turned=0.0)

    def pick(self, pool: Sequence[int] | None = None) -> int:
        """A source; half of the time by category first, so that small categories are seen."""
        if pool is None and self.rng.random() < 0.4:
            return self.rng.choice(self.by_category[self.rng.choice(sorted(self.by_category))])
        return self.rng.choice(self.pool if pool is None else pool)

    def pick_apart(self, number: int, pool: Sequence[int]) -> list[int]:
        """So many sources of which none might be called by another's name."""
        for _ in range(300):
            chosen = [self.pick(pool) for _ in range(number)]
            names = [self.sources[i].noun or "" for i in chosen]
            if all(not related(a, b) for k, a in enumerate(names) for b in names[:k]):
                return chosen
        return chosen[:1]

    def back(self, indices: Sequence[int], colours: Sequence[str | None], *, soft: bool = False) -> Back:
        """A ground on which these things are seen."""
        lights = [
            grounds.light_of(words.COLOURS[c]) if c and c != self.sources[i].colour else self.sources[i].luminance
            for i, c in zip(indices, colours, strict=True)
        ]
        return grounds.choose(self.rng, self.photos, {*colours}, lights, soft=soft)

    def single(self, index: int | None = None, *, tint: str | None = None) -> View:
        """One thing: a photograph that fills the frame, or a cut-out of any size."""
        rng = self.rng
        if index is None:
            index = self.pick(self.real) if self.real and rng.random() < 0.5 else self.pick()
        source, look = self.sources[index], self.looks[index]
        if look.whole and (source.photo or 0.75 < look.aspect < 1.33):
            where = rng.uniform(0.25, 0.75), rng.uniform(0.25, 0.75)
            part = natural.cover(look.aspect, *where, rng.uniform(0.78 if source.photo else 0.9, 1.0))
            frame = ((0.0, 0.0), (1.0, 0.0), (1.0, 1.0), (0.0, 1.0))
            thing = Thing(index, frame, source.flippable and rng.random() < 0.5, part=part)
            return self.keep(Back("plain"), [thing], [Spot(source, thing.box, source.colour)], "single")
        fills = source.origin != "shapes" and rng.random() < (0.6 if source.photo else 0.2)
        # What is long is cut off less, and a head at the top less than feet.
        most = 1.3 if source.photo and 0.6 < look.aspect < 1.7 else 1.12
        size = rng.uniform(0.92, most) if fills and not look.whole else 0.15 + 0.8 * rng.random() ** 0.6
        room = 0.08 if size > 0.92 else (1 - size) / 2 + 0.06 * size
        x, y = 0.5 + rng.uniform(-room, room), 0.5 + rng.uniform(-room, room)
        y += max(0.0, size * min(1.0, 1 / look.aspect) - 1) * 0.25
        thing, spot = self.put(index, x, y, size, tint=tint)
        view = self.keep(self.back([index], [spot.colour], soft=fills), [thing], [spot], "single")
        if size > 0.5 and rng.random() < 0.07:
            view.picture.bars.append((_bar(rng), tuple(rng.randint(20, 230) for _ in range(3))))  # type: ignore[arg-type]
        return view

    def several(self, number: int, *, painted: bool = False, pool: Sequence[int] | None = None) -> View:
        """Different things, overlapping a little; all of plain, different colours where `painted`."""
        rng = self.rng
        colours: list[str | None] = [None] * number
        if painted:
            colours = list(rng.sample(list(words.COLOURS), number))
            indices = self._paintable(colours)
        else:
            indices = self.pick_apart(number, pool or self.cuts)
        sizes = sorted((rng.uniform(0.22, 1.0) * 1.15 / len(indices) ** 0.6 for _ in indices), reverse=True)
        if rng.random() < 0.5:
            rng.shuffle(sizes)
        things, spots = self.scatter(indices, sizes, colours[: len(indices)], overlap=0.15)
        return self.keep(self.back(indices, [s.colour for s in spots]), things, spots, "several")

    def _paintable(self, colours: list[str | None]) -> list[int]:
        """Unrelated sources for these colours: shapes and drawings of the colour, or what can be painted."""
        rng, chosen = self.rng, list[int]()
        for colour in colours:
            own = self.by_colour.get(colour or "", [])
            for _ in range(200):
                draw = rng.random()
                index = rng.choice(own) if own and draw < 0.4 else self.pick(self.things)
                source = self.sources[index]
                fits = source.colour == colour or (source.origin != "shapes" and source.noun not in _NO_TINT)
                if source.photo and source.colour != colour and rng.random() < 0.6:
                    continue
                if fits and all(not related(source.noun or "", self.sources[i].noun or "") for i in chosen):
                    chosen.append(index)
                    break
            else:
                break
        return chosen

    def scatter(
        self, indices: Sequence[int], sizes: Sequence[float], colours: Sequence[str | None], *, overlap: float
    ) -> tuple[list[Thing], list[Spot]]:
        """Places at which no two hide more than `overlap` of the smaller, and the frame cuts off little."""
        rng = self.rng
        shrink = 1.0
        while True:
            taken: list[tuple[float, float, float, float]] = []
            for index, size in zip(indices, sizes, strict=True):
                aspect = self.looks[index].aspect
                w, h = (min(1.0, aspect) * size * shrink, min(1.0, 1 / aspect) * size * shrink)
                for _ in range(30):
                    rx, ry = max(0.0, 0.5 - w * 0.46), max(0.0, 0.5 - h * 0.46)
                    x, y = 0.5 + rng.uniform(-rx, rx), 0.5 + rng.uniform(-ry, ry)
                    if all(_shared((x, y, w, h), other) <= overlap for other in taken):
                        taken.append((x, y, w, h))
                        break
                else:
                    break
            if len(taken) == len(indices):
                break
            shrink *= 0.93
        placed = [
            self.put(index, x, y, max(w, h), tint=colour)
            for index, colour, (x, y, w, h) in zip(indices, colours, taken, strict=True)
        ]
        return [t for t, _ in placed], [s for _, s in placed]

    def counted(self) -> View:
        """One to six of a kind in mixed sizes, often with one or two of another kind among them."""
        rng = self.rng
        count = rng.randint(1, 6)
        shaped = bool(self.shapes) and rng.random() < 0.25
        first, *rest = self.pick_apart(2, self.shapes if shaped else self.countable)
        alike = self.alike[self.sources[first].noun or ""]
        mixed = not shaped and len(alike) > 1 and rng.random() < 0.3
        indices = [rng.choice(alike) if mixed else first for _ in range(count)]
        others = [rest[0]] * rng.randint(1, max(1, 7 - count)) if rest and rng.random() < 0.45 else []
        tint = None
        if not shaped and not mixed and self.sources[first].noun not in _NO_TINT and rng.random() < 0.25:
            tint = rng.choice(list(words.COLOURS))
        total = count + len(others)
        base = rng.uniform(0.55, 0.95) / max(2, total) ** 0.55
        sizes = [base * rng.uniform(0.6, 1.0) for _ in range(total)]
        things, spots = self.scatter(
            [*indices, *others], sizes, [*[tint] * count, *[None] * len(others)], overlap=0.03 if count > 1 else 0.1
        )
        back = self.back([*indices, *others], [s.colour for s in spots])
        return self.keep(back, things, spots, "counted", kind=self.sources[first].noun)

    def placed(self) -> View:
        """One thing in one of nine places, or two or three in different ones."""
        rng = self.rng
        number = rng.choice([1, 1, 2, 2, 2, 3])
        indices = self.pick_apart(number, self.cuts)
        cells = rng.sample(list(CELLS), len(indices))
        things, spots = [], []
        for index, cell in zip(indices, cells, strict=True):
            x, y = CELLS[cell]
            size = rng.uniform(0.2, 0.36)
            thing, spot = self.put(index, x + rng.uniform(-0.04, 0.04), y + rng.uniform(-0.04, 0.04), size)
            things.append(thing)
            spots.append(spot)
        back = self.back(indices, [s.colour for s in spots])
        return self.keep(back, things, spots, "placed", cell=cells[0] if len(cells) == 1 else None)

    def odd(self) -> View:
        """Three to five of which one is another thing."""
        rng = self.rng
        pair = self.pick_apart(2, self.countable)
        first, other = pair[0], pair[-1]
        count = rng.randint(3, 5)
        indices = [other, *[first] * (count - 1)]
        sizes = [rng.uniform(0.2, 0.34) for _ in indices]
        things, spots = self.scatter(indices, sizes, [None] * count, overlap=0.02)
        return self.keep(self.back(indices, [s.colour for s in spots]), things, spots, "odd")

    def unsure(self) -> View:
        """Nothing that has a name: noise, colours, patterns, something far too near or far too blurred."""
        rng = self.rng
        draw = rng.random()
        level = rng.randint(30, 235)
        first, second = (tuple(min(255, max(0, level + rng.randint(-90, 90))) for _ in range(3)) for _ in range(2))
        if draw < 0.35:
            style = rng.choice(["gradient", "texture", "blurred", "cloth", "wall", "stone", "night"])
            finish = replace(natural.any_finish(rng), blur=rng.choice([0.0, 2.0, 6.0]))
            return self.keep(Back(style, first, second), [], [], "unsure", finish=finish)  # type: ignore[arg-type]
        if draw < 0.5:
            finish = natural.Finish(grain=rng.uniform(30, 90), contrast=rng.uniform(0.3, 1.0))
            return self.keep(Back("texture", first, second), [], [], "unsure", finish=finish)  # type: ignore[arg-type]
        if draw < 0.65 and self.photos:
            part = rng.uniform(0.04, 0.12)
            crop = (rng.random(), rng.random(), part)
            back = Back("photo", photo=rng.choice(self.photos).index, crop=crop, blur=rng.choice([0.0, 3.0]))
            return self.keep(back, [], [], "unsure")
        index = self.pick(self.cuts)
        if draw < 0.85:
            # So near that a few patches of colour are left.
            part = rng.uniform(0.06, 0.12)
            x, y = rng.uniform(0.3, 0.6), rng.uniform(0.3, 0.6)
            frame = ((0.0, 0.0), (1.0, 0.0), (1.0, 1.0), (0.0, 1.0))
            thing = Thing(index, frame, part=(x, y, x + part, y + part))
            return self.keep(Back("blurred", first, second), [thing], [], "unsure")  # type: ignore[arg-type]
        thing, _ = self.put(index, 0.5, 0.5, rng.uniform(0.4, 0.8))
        finish = natural.Finish(blur=rng.uniform(18, 30))
        return self.keep(Back("gradient", first, second), [thing], [], "unsure", finish=finish)  # type: ignore[arg-type]

    def again(self, view: View, things: list[Thing], spots: list[Spot]) -> View:
        """The same scene once more with other things in it."""
        true = view.picture.back.name is not None or any(s.colour for s in spots)
        image = replace(
            view.picture,
            file=f"images/{self.prefix}{len(self.views):05d}.jpg",
            things=things,
            finish=natural.any_finish(self.rng, true=true) if self.rng.random() < 0.3 else view.picture.finish,
        )
        self.views.append(View(image, spots, view.layout))
        return self.views[-1]


def related(first: str, second: str) -> bool:
    """As `words.related`, and a ring is a circle, though there are rings to wear."""
    return words.related(first, second) or {first, second} == {"ring", "circle"}


def _bar(rng: random.Random) -> natural.Quad:
    """A post or a rail in front of everything, about a twelfth of the frame wide."""
    wide, at, slant = rng.uniform(0.05, 0.11), rng.uniform(0.1, 0.9), rng.uniform(-0.15, 0.15)
    quad = ((at, 0.0), (at + wide, 0.0), (at + wide + slant, 1.0), (at + slant, 1.0))
    return quad if rng.random() < 0.6 else tuple((y, x) for x, y in quad)


def _countable(source: Source) -> bool:
    noun = words.lexicon().get(source.noun or "")
    single = not source.caption.startswith(("Two ", "Some ")) and " of " not in source.caption
    return source.origin == "shapes" or ((noun is None or noun.article == "a") and single)


def _shared(first: Box, second: Box) -> float:
    """How much of the smaller of two (centre x, centre y, width, height) the other hides."""
    (ax, ay, aw, ah), (bx, by, bw, bh) = first, second
    wide = min(ax + aw / 2, bx + bw / 2) - max(ax - aw / 2, bx - bw / 2)
    high = min(ay + ah / 2, by + bh / 2) - max(ay - ah / 2, by - bh / 2)
    return max(0.0, wide) * max(0.0, high) / max(1e-6, min(aw * ah, bw * bh))
