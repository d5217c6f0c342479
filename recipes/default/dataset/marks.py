"""What documents are made of: text, rules, boxes, ticks, scribbles, bar codes, shapes of signs, small drawings."""

from __future__ import annotations

import functools
import math
import random
from dataclasses import dataclass
from typing import Any

from recipes.default.dataset.drawn import Colour


@dataclass(frozen=True)
class Mark:
    """One thing on a document."""

    what: str  # text, rule, dashes, box, round, tick, scribble, bars, a sign's shape or a small drawing
    x: float  # of text the middle, left or right end; of the others the left
    y: float  # of text the middle; of the others the top
    wide: float = 0.0
    high: float = 0.0
    colour: Colour = (20, 20, 20)
    text: str = ""
    size: float = 0.0
    align: str = "center"
    font: str = ""
    fill: Colour | None = None
    thick: int = 2


@functools.lru_cache(maxsize=400)
def _font(path: str, size: int) -> Any:
    from PIL import ImageFont

    return ImageFont.truetype(path, size)


_ANCHORS = {"center": "mm", "left": "lm", "right": "rm"}


def paint(pen: Any, m: Mark, scale: float, noise: random.Random) -> None:
    """Paint a mark; `noise` draws what the plan leaves open."""
    x, y, right, bottom = (v * scale for v in (m.x, m.y, m.x + m.wide, m.y + m.high))
    wide, high = right - x, bottom - y
    line = max(1, round(m.thick * scale))
    if m.what == "text":
        font = _font(m.font, max(8, round(m.size * scale)))
        pen.text((x, y), m.text, font=font, fill=m.colour, anchor=_ANCHORS[m.align])
    elif m.what == "rule":
        pen.line((x, y, right, bottom), fill=m.colour, width=line)
    elif m.what == "dashes":
        steps = max(2, round(max(wide, high) / (9 * scale)))
        for k in range(steps):
            a, b = k / steps, (k + 0.55) / steps
            pen.line((x + a * wide, y + a * high, x + b * wide, y + b * high), fill=m.colour, width=line)
    elif m.what == "box":
        pen.rectangle((x, y, right, bottom), fill=m.fill, outline=m.colour, width=line)
    elif m.what == "round":
        pen.ellipse((x, y, right, bottom), fill=m.fill, outline=m.colour, width=line)
    elif m.what == "tick":
        pen.line((x, y + high * 0.5, x + wide * 0.35, bottom, right, y), fill=m.colour, width=line, joint="curve")
    elif m.what == "bars":
        at = y
        while at < bottom:
            thick = noise.choice([2, 3, 5]) * scale
            pen.rectangle((x, at, right, min(at + thick, bottom)), fill=m.colour)
            at += thick + noise.choice([2, 3, 4]) * scale
    elif m.what == "scribble":
        loops, points = noise.uniform(2.5, 4.5), []
        phase, tall = noise.uniform(0, 6), [noise.uniform(0.4, 1) for _ in range(6)]
        for k in range(61):
            t = k / 60
            swing = tall[int(t * 5.99)] * math.sin(t * loops * 2 * math.pi + phase)
            points.append(
                (x + wide * (t * 0.9 + 0.1 + 0.06 * math.cos(t * loops * 2 * math.pi)), y + high * (0.5 + 0.5 * swing))
            )
        pen.line(points, fill=m.colour, width=line, joint="curve")
    else:
        _drawing(pen, m.what, x, y, wide, high, m.fill or m.colour, m.colour, line)


def _drawing(
    pen: Any, what: str, x: float, y: float, wide: float, high: float, fill: Colour, edge: Colour, line: int
) -> None:
    """A small drawing, or a sign's shape, in its box."""

    def at(*points: tuple[float, float]) -> list[tuple[float, float]]:
        return [(x + a * wide, y + b * high) for a, b in points]

    def turned(corners: int, inner: float, start: float) -> list[tuple[float, float]]:
        steps = corners * (2 if inner < 1 else 1)
        return at(
            *(
                (
                    0.5 + 0.5 * r * math.cos(start + 2 * math.pi * k / steps),
                    0.5 + 0.5 * r * math.sin(start + 2 * math.pi * k / steps),
                )
                for k in range(steps)
                for r in [inner if inner < 1 and k % 2 else 1.0]
            )
        )

    def disc(a: float, b: float, c: float, d: float) -> None:
        pen.ellipse((*at((a, b))[0], *at((c, d))[0]), fill=fill)

    if what == "octagon":
        pen.polygon(turned(8, 1, math.pi / 8), fill=fill, outline=edge, width=line)
    elif what == "diamond":
        pen.polygon(turned(4, 1, 0), fill=fill, outline=edge, width=line)
    elif what == "triangle":
        pen.polygon(at((0.5, 0), (1, 0.9), (0, 0.9)), fill=fill, outline=edge, width=line)
    elif what == "star":
        pen.polygon(turned(5, 0.42, -math.pi / 2), fill=fill)
    elif what == "heart":
        disc(0.02, 0.08, 0.52, 0.58)
        disc(0.48, 0.08, 0.98, 0.58)
        pen.polygon(at((0.06, 0.45), (0.94, 0.45), (0.5, 0.98)), fill=fill)
    elif what == "sun":
        for k in range(8):
            a, b = 0.5 * math.cos(k * math.pi / 4), 0.5 * math.sin(k * math.pi / 4)
            pen.line(
                at((0.5 + a * 0.72, 0.5 + b * 0.72), (0.5 + a, 0.5 + b)), fill=fill, width=max(2, round(wide / 14))
            )
        disc(0.24, 0.24, 0.76, 0.76)
    elif what == "balloon":
        disc(0.2, 0, 0.8, 0.68)
        pen.line(at((0.5, 0.66), (0.45, 0.82), (0.52, 1)), fill=fill, width=line)
    elif what == "flower":
        for k in range(5):
            a, b = 0.5 + 0.26 * math.cos(2.1 + k * 1.2566), 0.38 + 0.26 * math.sin(2.1 + k * 1.2566)
            disc(a - 0.19, b - 0.19, a + 0.19, b + 0.19)
        pen.ellipse((*at((0.39, 0.27))[0], *at((0.61, 0.49))[0]), fill=(255, 235, 120))
        pen.line(at((0.5, 0.6), (0.5, 1)), fill=fill, width=line)
    elif what == "house":
        pen.polygon(at((0.5, 0), (1, 0.48), (0, 0.48)), fill=fill)
        pen.rectangle((*at((0.14, 0.48))[0], *at((0.86, 1))[0]), fill=fill)
        pen.rectangle((*at((0.42, 0.66))[0], *at((0.6, 1))[0]), fill=(255, 255, 255))
