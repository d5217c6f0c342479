"""Plan and draw the pictures: cut-outs on backgrounds, several objects, counted objects, words on cards.

Planning and drawing are apart. A `Picture` says everything (which cut-outs, where, how large, on what ground), so the
questions are answered from the plan and never from pixels, and drawing one picture depends on nothing else: any number
of processes draw the same bytes. Pictures are JPEG at quality 90, 224 pixels square, as the vision encoder takes them.
"""

from __future__ import annotations

import functools
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from recipes.default.dataset import words
from recipes.default.dataset.sources import Source

if TYPE_CHECKING:
    from PIL import Image as Pictures
    from PIL.ImageFont import FreeTypeFont, ImageFont

SIDE = 224


@dataclass(frozen=True)
class Item:
    """One cut-out in a picture; centre and size as shares of the side."""

    source: int
    x: float
    y: float
    size: float
    flip: bool = False


@dataclass(frozen=True)
class Card:
    """A word on a card or straight on the ground."""

    text: str
    font: str  # file, or "" for Pillow's own
    height: float  # of the letters, as a share of the side
    ink: tuple[int, int, int]
    paper: tuple[int, int, int] | None
    angle: float
    x: float = 0.5
    y: float = 0.5


@dataclass(frozen=True)
class Ground:
    """What lies behind: plain, gradient or textured."""

    style: str  # plain | gradient | texture | blurred
    first: tuple[int, int, int]
    second: tuple[int, int, int]
    name: str | None  # the colour's name where it is a plain, clear colour


@dataclass
class Picture:
    """The plan of one picture."""

    file: str
    seed: int
    ground: Ground
    items: list[Item] = field(default_factory=list)
    card: Card | None = None


def _jitter(colour: tuple[int, int, int], rng: random.Random, by: int = 8) -> tuple[int, int, int]:
    r, g, b = (min(255, max(0, c + rng.randint(-by, by))) for c in colour)
    return r, g, b


def choose_ground(rng: random.Random, sources: list[Source], *, named: float = 0.35, white: float = 0.3) -> Ground:
    """A background that the objects can be seen on.

    Args:
        rng: Draws it.
        sources: The objects that will lie on it.
        named: Share of plain grounds in a clear colour that questions may ask about.
        white: Share of plain white grounds.

    Returns:
        The ground.
    """
    colours = {s.colour for s in sources}
    bright = max((s.luminance for s in sources), default=128.0)
    dark = min((s.luminance for s in sources), default=128.0)
    for _ in range(30):
        draw = rng.random()
        if draw < white:
            ground = Ground("plain", (255, 255, 255), (255, 255, 255), "white")
        elif draw < white + named:
            name = rng.choice(list(words.COLOURS))
            colour = (255, 255, 255) if name == "white" else _jitter(words.COLOURS[name], rng)
            ground = Ground("plain", colour, colour, name)
        else:
            level = rng.randint(150, 235)
            first = _jitter((level, level, level), rng, 45)
            second = _jitter(first, rng, 60)
            style = rng.choice(["plain", "gradient", "texture", "blurred"])
            ground = Ground(style, first, second, None)
        luminance = sum(w * c for w, c in zip((0.299, 0.587, 0.114), ground.first, strict=True))
        if ground.name in colours or (ground.name is None and colours & {"gray", "white"}):
            continue
        if (bright > 215 and luminance > 200) or (dark < 45 and luminance < 70):
            continue
        return ground
    light = (205, 225, 245) if dark < 128 else (70, 75, 90)
    return Ground("plain", light, light, None)


def single(
    file: str, rng: random.Random, index: int, source: Source, *, side: str | None = None, close: float = 0.0
) -> Picture:
    """One object on a ground.

    Args:
        file: Path of the picture inside the data set.
        rng: Draws the view.
        index: The source's position in the list of sources.
        source: The source.
        side: Put it clearly into this half: left, right, top or bottom; None near the middle.
        close: Share of photographs taken from so near that the frame cuts them off.

    Returns:
        The plan.
    """
    size = rng.uniform(0.34, 0.46) if side else rng.uniform(0.5, 0.95)
    if source.photo and not side and rng.random() < close:
        size = rng.uniform(1.05, 1.5)
    room = abs(1 - size) / 2
    x, y = 0.5 + rng.uniform(-room, room) * 0.6, 0.5 + rng.uniform(-room, room) * 0.6
    if side in ("left", "right"):
        x = rng.uniform(0.22, 0.27) if side == "left" else rng.uniform(0.73, 0.78)
    elif side:
        y = rng.uniform(0.22, 0.27) if side == "top" else rng.uniform(0.73, 0.78)
    flip = source.flippable and rng.random() < 0.5
    item = Item(index, round(x, 3), round(y, 3), round(size, 3), flip)
    return Picture(file, rng.getrandbits(32), choose_ground(rng, [source]), [item])


def pair(file: str, rng: random.Random, indices: list[int], sources: list[Source], *, vertical: bool) -> Picture:
    """Two or three different objects beside (left to right) or above (top to bottom) each other.

    Args:
        file: Path of the picture inside the data set.
        rng: Draws the view.
        indices: Positions of the sources, in reading order.
        sources: The sources, in the same order.
        vertical: Above instead of beside each other.

    Returns:
        The plan.
    """
    count = len(indices)
    items = []
    for place, (index, source) in enumerate(zip(indices, sources, strict=True)):
        along = (place + 0.5) / count + rng.uniform(-0.02, 0.02)
        across = 0.5 + rng.uniform(-0.15, 0.15)
        size = rng.uniform(0.8, 0.96) / count if count == 2 else rng.uniform(0.3, 0.34)
        x, y = (across, along) if vertical else (along, across)
        flip = source.flippable and rng.random() < 0.5
        items.append(Item(index, round(x, 3), round(y, 3), round(size, 3), flip))
    return Picture(file, rng.getrandbits(32), choose_ground(rng, sources, named=0.25), items)


def counted(file: str, rng: random.Random, index: int, source: Source, count: int) -> Picture:
    """The same object one to four times, apart from each other.

    Args:
        file: Path of the picture inside the data set.
        rng: Draws the view.
        index: Position of the source.
        source: The source.
        count: How many.

    Returns:
        The plan.
    """
    cells = [(0.27, 0.27), (0.73, 0.27), (0.27, 0.73), (0.73, 0.73)]
    rng.shuffle(cells)
    size = rng.uniform(0.3, 0.44)
    items = [
        Item(
            index,
            round(x + rng.uniform(-0.04, 0.04), 3),
            round(y + rng.uniform(-0.04, 0.04), 3),
            round(size * rng.uniform(0.9, 1.0), 3),
            source.flippable and rng.random() < 0.5,
        )
        for x, y in cells[:count]
    ]
    return Picture(file, rng.getrandbits(32), choose_ground(rng, [source], named=0.25), items)


def lettered(file: str, rng: random.Random, text: str, font: str) -> Picture:
    """A word or number in big letters on a card.

    Args:
        file: Path of the picture inside the data set.
        rng: Draws the view.
        text: What is written.
        font: Font file, or "" for Pillow's own.

    Returns:
        The plan.
    """
    colours = words.COLOURS
    paper: tuple[int, int, int] | None = None
    ground = choose_ground(rng, [], named=0.3, white=0.4)
    base = ground.first
    if rng.random() < 0.6:
        paper = _jitter(colours[rng.choice(list(colours))], rng)
        base = paper

    def light(colour: tuple[int, int, int]) -> float:
        return sum(w * c for w, c in zip((0.299, 0.587, 0.114), colour, strict=True))

    inks = [c for c in colours.values() if abs(light(c) - light(base)) > 95]
    ink = rng.choice(inks) if inks else ((0, 0, 0) if light(base) > 128 else (255, 255, 255))
    card = Card(text, font, round(rng.uniform(0.3, 0.5), 3), ink, paper, round(rng.uniform(-8, 8), 1))
    return Picture(file, rng.getrandbits(32), ground, [], card)


@functools.lru_cache(maxsize=400)
def _thumb(path: str) -> Pictures.Image:
    from PIL import Image

    with Image.open(path) as opened:
        return opened.convert("RGBA")


@functools.lru_cache(maxsize=400)
def _font(path: str, size: int) -> FreeTypeFont | ImageFont:
    from PIL import ImageFont as Fonts

    return Fonts.truetype(path, size) if path else Fonts.load_default(size)


def _draw_ground(ground: Ground, seed: int) -> Pictures.Image:
    import numpy as np
    from PIL import Image

    if ground.style == "plain":
        return Image.new("RGB", (SIDE, SIDE), ground.first)
    noise = np.random.default_rng(seed)
    if ground.style == "blurred":
        # What lies out of focus behind a photograph: patches of any colour around the ground's own.
        patches = np.array(ground.first) + noise.normal(0, 55, (5, 5, 3))
        small = Image.fromarray(patches.clip(0, 255).astype(np.uint8))
        return small.resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    if ground.style == "gradient":
        angle = noise.uniform(0, 2 * np.pi)
        rows, columns = np.mgrid[0:SIDE, 0:SIDE] / (SIDE - 1) - 0.5
        share = np.clip(rows * np.sin(angle) + columns * np.cos(angle) + 0.5, 0, 1)
    else:
        coarse = Image.fromarray((noise.random((9, 9)) * 255).astype(np.uint8))
        share = np.asarray(coarse.resize((SIDE, SIDE), Image.Resampling.BICUBIC), dtype=np.float64) / 255
        share = np.clip(share + noise.normal(0, 0.05, share.shape), 0, 1)
    first, second = np.array(ground.first), np.array(ground.second)
    mixed = first + (second - first) * share[..., None]
    return Image.fromarray(mixed.round().astype(np.uint8))


def draw(picture: Picture, thumbs: Path) -> Pictures.Image:
    """Draw a planned picture.

    Args:
        picture: The plan.
        thumbs: Folder with the measured cut-outs, `<index>.png`.

    Returns:
        An RGB picture of SIDE pixels.
    """
    from PIL import Image

    canvas = _draw_ground(picture.ground, picture.seed)
    for item in picture.items:
        cut = _thumb(str(thumbs / f"{item.source}.png"))
        scale = item.size * SIDE / max(cut.size)
        size = (max(2, round(cut.width * scale)), max(2, round(cut.height * scale)))
        cut = cut.resize(size, Image.Resampling.BICUBIC)
        if item.flip:
            cut = cut.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        x = round(item.x * SIDE - cut.width / 2)
        y = round(item.y * SIDE - cut.height / 2)
        # Inside the frame; what is larger than the frame covers it.
        x = min(max(x, min(0, SIDE - cut.width)), max(0, SIDE - cut.width))
        y = min(max(y, min(0, SIDE - cut.height)), max(0, SIDE - cut.height))
        canvas.paste(cut, (x, y), cut)
    if picture.card:
        _draw_card(canvas, picture.card)
    return canvas


def _draw_card(canvas: Pictures.Image, card: Card) -> None:
    from PIL import Image, ImageDraw

    size = max(12, round(card.height * SIDE))
    box = (0.0, 0.0, 1.0, 1.0)
    while size > 10:
        font = _font(card.font, size)
        box = font.getbbox(card.text)
        if box[2] - box[0] <= SIDE * 0.84:
            break
        size -= 4
    width, height = box[2] - box[0], box[3] - box[1]
    margin = 0.22 * size
    sheet = Image.new("RGBA", (round(width + 2 * margin), round(height + 2 * margin)), (0, 0, 0, 0))
    pen = ImageDraw.Draw(sheet)
    if card.paper:
        edge = (sheet.width - 1, sheet.height - 1)
        pen.rounded_rectangle(
            (0, 0, *edge), radius=margin * 0.6, fill=(*card.paper, 255), outline=(*card.ink, 255), width=2
        )
    pen.text((margin - box[0], margin - box[1]), card.text, font=_font(card.font, size), fill=(*card.ink, 255))
    sheet = sheet.rotate(card.angle, resample=Image.Resampling.BICUBIC, expand=True)
    if max(sheet.size) > SIDE:
        scale = SIDE / max(sheet.size)
        sheet = sheet.resize((round(sheet.width * scale), round(sheet.height * scale)), Image.Resampling.LANCZOS)
    x = round(card.x * SIDE - sheet.width / 2)
    y = round(card.y * SIDE - sheet.height / 2)
    canvas.paste(sheet, (x, y), sheet)
