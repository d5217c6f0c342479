"""Draw scenes that look more like photographs: for training only, beside the plain ones of `scenes`.

As there, a plan says everything and drawing depends on nothing else. Cut-outs are turned, tilted, tinted, shadowed and
cut off by the frame, on photographs, on drawn natural grounds, or on what lies out of focus; then the whole image is
exposed, blurred, grained and saved badly, as photographs are.
"""

from __future__ import annotations

import functools
import io
import math
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from recipes.default.dataset import grounds, scenes, words
from recipes.default.dataset.grounds import Back
from recipes.default.dataset.scenes import SIDE

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image as Images

Quad = tuple[tuple[float, float], ...]  # top left, top right, bottom right, bottom left, as shares of the side
Box = tuple[float, float, float, float]  # x0, y0, x1, y1 in 0..1


@dataclass(frozen=True)
class Thing:
    """One cut-out: which, in what quadrilateral, in what colour, with how dark a shadow."""

    source: int
    quad: Quad
    flip: bool = False
    tint: str | None = None  # a name of words.COLOURS: the cut-out in shades of it
    turned: float = 0.0  # degrees of hue, where a drawing keeps its own shades
    shadow: float = 0.0
    part: Box | None = None  # only this part of the cut-out

    @property
    def box(self) -> Box:
        """What of the frame it takes."""
        xs, ys = zip(*self.quad, strict=True)
        return tuple(round(min(1.0, max(0.0, v)), 3) for v in (min(xs), min(ys), max(xs), max(ys)))  # type: ignore[return-value]


@dataclass(frozen=True)
class Sheet:
    """Lines of text on a card, on a sign or straight on the ground."""

    lines: tuple[str, ...]
    font: str  # file, or "" for Pillow's own
    ink: tuple[int, int, int]
    paper: tuple[int, int, int] | None
    shape: str  # card | plate | octagon | none
    x: float
    y: float
    width: float  # of the sheet, at most; its height is at most `height`
    height: float
    angle: float
    lean: tuple[float, float]  # perspective: how much the right and the lower edge are shorter


@dataclass(frozen=True)
class Finish:
    """What the camera does to the whole image."""

    light: float = 1.0
    contrast: float = 1.0
    hue: float = 0.0  # degrees
    blur: float = 0.0  # pixels
    grain: float = 0.0  # standard deviation, in levels
    jpeg: int = 0  # quality, or 0


@dataclass
class NaturalImage:
    """The plan of one image."""

    file: str
    seed: int
    back: Back
    things: list[Thing] = field(default_factory=list)
    sheets: list[Sheet] = field(default_factory=list)
    bars: list[tuple[Quad, tuple[int, int, int]]] = field(default_factory=list)  # in front of everything
    finish: Finish = Finish()

    def draw(self, thumbs: Path) -> Images.Image:
        """Draw it as RGB of SIDE pixels; `thumbs` holds the cut-outs and the shrunk photographs."""
        from PIL import ImageDraw

        canvas = grounds.draw(self.back, self.seed, thumbs)
        for thing in self.things:
            _draw_thing(canvas, thing, thumbs)
        for sheet in self.sheets:
            draw_sheet(canvas, sheet)
        for quad, colour in self.bars:
            ImageDraw.Draw(canvas).polygon([(x * SIDE, y * SIDE) for x, y in quad], fill=colour)
        return _finished(canvas, self.finish, self.seed)


def quad_of(
    x: float, y: float, size: float, aspect: float, *, angle: float = 0.0, lean: tuple[float, float] = (0.0, 0.0)
) -> Quad:
    """Corners of a cut-out of which the longer side is `size` and width over height `aspect`, turned by degrees."""
    w, h = (size, size / aspect) if aspect >= 1 else (size * aspect, size)
    right, below = 1 - lean[0], 1 - lean[1]
    corners = [(-w / 2, -h / 2), (w / 2, -h / 2 * right), (w / 2 * below, h / 2 * right), (-w / 2 * below, h / 2)]
    cos, sin = math.cos(math.radians(angle)), math.sin(math.radians(angle))
    return tuple((round(x + cx * cos - cy * sin, 4), round(y + cx * sin + cy * cos, 4)) for cx, cy in corners)


def cover(aspect: float, x: float, y: float, part: float) -> Box:
    """The part of an image of this aspect that fills the frame; `x`, `y` in 0..1 say where, `part` how much of it."""
    w, h = (part / aspect, part) if aspect >= 1 else (part, part * aspect)
    left, top = (1 - w) * x, (1 - h) * y
    return left, top, left + w, top + h


def any_finish(rng: random.Random, *, true: bool = False) -> Finish:
    """A camera's mood; where colours are asked about (`true`), one that leaves them alone."""
    wide = 0.5 if true else 1.0
    return Finish(
        round(1 + wide * rng.uniform(-0.25, 0.25), 3),
        round(1 + wide * rng.uniform(-0.3, 0.25), 3),
        0.0 if true else round(rng.gauss(0, 5), 1),
        round(rng.uniform(0.5, 1.4), 2) if rng.random() < 0.2 else 0.0,
        round(rng.uniform(2, 9), 1) if rng.random() < 0.3 else 0.0,
        rng.randint(25, 75) if rng.random() < 0.35 else 0,
    )


def _coefficients(source: Quad, target: list[tuple[float, float]]) -> list[float]:
    """Of the projective map from `target` (pixels of the output) to `source` (pixels of the input)."""
    import numpy as np

    rows, values = [], []
    for (u, v), (x, y) in zip(source, target, strict=True):
        rows += [[x, y, 1, 0, 0, 0, -u * x, -u * y], [0, 0, 0, x, y, 1, -v * x, -v * y]]
        values += [u, v]
    return np.linalg.solve(np.array(rows, dtype=np.float64), np.array(values, dtype=np.float64)).tolist()


def _warp(cut: Images.Image, quad: Quad) -> tuple[Images.Image, int, int]:
    """The image in a quadrilateral of the frame: (RGBA image, left, top) in pixels."""
    from PIL import Image

    points = [(x * SIDE, y * SIDE) for x, y in quad]
    wide = max(math.dist(points[0], points[1]), math.dist(points[3], points[2]))
    high = max(math.dist(points[0], points[3]), math.dist(points[1], points[2]))
    size = max(2, round(wide)), max(2, round(high))
    left, top = math.floor(min(x for x, _ in points)), math.floor(min(y for _, y in points))
    cut = cut.resize(size, Image.Resampling.BICUBIC)
    if abs(points[0][1] - points[1][1]) < 0.5 and abs(points[0][0] - points[3][0]) < 0.5 and size[0] - wide < 0.51:
        straight = abs(points[1][0] - points[2][0]) < 0.5 and abs(points[2][1] - points[3][1]) < 0.5
        if straight:
            return cut, left, top
    # Only what lies in the frame is computed.
    x0, y0 = max(left, 0), max(top, 0)
    x1 = min(math.ceil(max(x for x, _ in points)), SIDE)
    y1 = min(math.ceil(max(y for _, y in points)), SIDE)
    corners = ((0, 0), (size[0], 0), (size[0], size[1]), (0, size[1]))
    data = _coefficients(corners, [(x - x0, y - y0) for x, y in points])
    shape = max(1, x1 - x0), max(1, y1 - y0)
    return cut.transform(shape, Image.Transform.PERSPECTIVE, data, Image.Resampling.BILINEAR), x0, y0


@functools.lru_cache(maxsize=256)
def _tint_table(colour: str, middle: int) -> list[int]:
    """Brightness -> shades of a colour, for the three channels; `middle` is the brightness that becomes it."""
    base = words.COLOURS[colour]
    dark, light = {"black": (0.0, 0.3), "white": (0.72, 1.0)}.get(colour, (0.45, 0.45))
    table = []
    for c in base:
        for level in range(256):
            if level < middle:
                share = level / middle
                table.append(round(c * (dark + (1 - dark) * share)))
            else:
                share = (level - middle) / max(1, 255 - middle)
                table.append(round(min(255, c + (255 - c) * light * share)))
    return table


@functools.lru_cache(maxsize=400)
def _middle(path: str) -> int:
    """The brightness that half of a cut-out's pixels are above."""
    import numpy as np

    cut = scenes._thumb(path)
    grey, alpha = np.asarray(cut.convert("L")), np.asarray(cut.getchannel("A"))
    return int(min(200, max(60, np.median(grey[alpha > 128]) if (alpha > 128).any() else 128))) // 10 * 10


def _coloured(cut: Images.Image, thing: Thing, path: str) -> Images.Image:
    from PIL import Image

    alpha = cut.getchannel("A")
    if thing.tint:
        grey = cut.convert("L")
        table = _tint_table(thing.tint, _middle(path))
        made = Image.merge("RGB", [grey.point(table[k * 256 : k * 256 + 256]) for k in range(3)])
    else:
        hue, saturation, value = cut.convert("RGB").convert("HSV").split()
        by = round(thing.turned / 360 * 256)
        hue = hue.point([(level + by) % 256 for level in range(256)])
        made = Image.merge("HSV", (hue, saturation, value)).convert("RGB")
    made.putalpha(alpha)
    return made


def _draw_thing(canvas: Images.Image, thing: Thing, thumbs: Path) -> None:
    from PIL import Image, ImageFilter

    path = str(thumbs / f"{thing.source}.png")
    cut = scenes._thumb(path)
    if thing.part:
        x0, y0, x1, y1 = thing.part
        cut = cut.crop((round(x0 * cut.width), round(y0 * cut.height), round(x1 * cut.width), round(y1 * cut.height)))
    if thing.tint or thing.turned:
        cut = _coloured(cut, thing, path)
    if thing.flip:
        cut = cut.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    cut, left, top = _warp(cut, thing.quad)
    if thing.shadow:
        margin, reach = 3, max(2, cut.height // 16)
        small = cut.getchannel("A").resize((max(1, cut.width // 4), max(1, cut.height // 4)), Image.Resampling.BOX)
        wide = Image.new("L", (small.width + 2 * margin, small.height + 2 * margin))
        wide.paste(small, (margin, margin))
        wide = wide.filter(ImageFilter.GaussianBlur(1.6)).point([round(a * thing.shadow) for a in range(256)])
        wide = wide.resize((wide.width * 4, wide.height * 4), Image.Resampling.BILINEAR)
        at = (left - margin * 4 + reach // 2, top - margin * 4 + reach)
        canvas.paste((0, 0, 0), (*at, at[0] + wide.width, at[1] + wide.height), wide)
    canvas.paste(cut, (left, top), cut)


def draw_sheet(canvas: Images.Image, sheet: Sheet) -> None:
    """Write on the canvas."""
    drawn, quad = _sheet(sheet)
    cut, left, top = _warp(drawn, quad)
    canvas.paste(cut, (left, top), cut)


def sheet_box(sheet: Sheet) -> Box:
    """What of the frame the sheet takes."""
    return Thing(0, _sheet(sheet)[1]).box


@functools.lru_cache(maxsize=8)
def _sheet(sheet: Sheet) -> tuple[Images.Image, Quad]:
    """The sheet seen from the front, and its place."""
    from PIL import Image, ImageDraw

    size = 64
    font = scenes._font(sheet.font, size)
    boxes = [font.getbbox(line) for line in sheet.lines]
    wide = max(b[2] - b[0] for b in boxes)
    step = round(size * 1.15)
    high = boxes[-1][3] - boxes[0][1] + step * (len(boxes) - 1)
    margin = 8 if sheet.shape == "none" else 20
    w, h = round(wide + 2 * margin), round(high + 2 * margin)
    if sheet.shape == "octagon":
        w = h = round(max(w, h) * 1.12)
    image = Image.new("RGBA", (w, h), (*sheet.ink, 0))
    pen = ImageDraw.Draw(image)
    if sheet.paper:
        fill, line = (*sheet.paper, 255), (*sheet.ink, 255)
        if sheet.shape == "octagon":
            cut = w * 0.29
            points = [(cut, 0), (w - cut, 0), (w - 1, cut), (w - 1, h - cut), (w - cut, h - 1), (cut, h - 1)]
            pen.polygon([*points, (0, h - cut), (0, cut)], fill=fill, outline=line, width=4)
        elif sheet.shape == "card":
            pen.rounded_rectangle((0, 0, w - 1, h - 1), radius=14, fill=fill, outline=line, width=4)
        else:
            pen.rectangle((0, 0, w - 1, h - 1), fill=fill)
    top = (h - high) / 2 - boxes[0][1]
    for k, (line, box) in enumerate(zip(sheet.lines, boxes, strict=True)):
        left = (w - (box[2] - box[0])) / 2 - box[0]
        pen.text((left, top + k * step), line, font=font, fill=(*sheet.ink, 255))
    scale = min(sheet.width / w, sheet.height / h)
    side = max(w, h) * scale
    return image, quad_of(sheet.x, sheet.y, side, w / h, angle=sheet.angle, lean=sheet.lean)


@functools.cache
def _hue_matrix(degrees: float) -> tuple[float, ...]:
    """Turns hues about the grey axis, brightness kept."""
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    a, b = (1 - cos) / 3, math.sqrt(1 / 3) * sin
    return (cos + a, a - b, a + b, 0, a + b, cos + a, a - b, 0, a - b, a + b, cos + a, 0)


@functools.cache
def _grain() -> np.ndarray:
    """One tile of grain for all, of which each image takes another part."""
    import numpy as np

    return np.random.default_rng(0).normal(0, 1, (2 * SIDE, 2 * SIDE, 3)).astype(np.float32)


def _finished(canvas: Images.Image, finish: Finish, seed: int) -> Images.Image:
    import numpy as np
    from PIL import Image, ImageFilter

    if finish.hue:
        canvas = canvas.convert("RGB", _hue_matrix(finish.hue))
    if finish.light != 1 or finish.contrast != 1:
        table = [
            min(255, max(0, round(((level / 255 - 0.5) * finish.contrast + 0.5) * 255 * finish.light)))
            for level in range(256)
        ]
        canvas = canvas.point(table * 3)
    if finish.blur:
        canvas = canvas.filter(ImageFilter.GaussianBlur(finish.blur))
    if finish.grain:
        x, y = seed % SIDE, seed // SIDE % SIDE
        grained = np.asarray(canvas, dtype=np.float32) + finish.grain * _grain()[y : y + SIDE, x : x + SIDE]
        canvas = Image.fromarray(grained.clip(0, 255).astype(np.uint8))
    if finish.jpeg:
        buffer = io.BytesIO()
        canvas.save(buffer, "JPEG", quality=finish.jpeg)
        with Image.open(buffer) as opened:
            canvas = opened.convert("RGB")
    return canvas
