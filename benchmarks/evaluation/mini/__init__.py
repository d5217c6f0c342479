"""Small generated sets in each benchmark's official layout, for tests and demos; none of their data is copied.

python -m benchmarks.evaluation.mini mini            # mini/vqav2, mini/gqa, ... with 8 questions each
polymodal eval default --tasks gqa --data-root mini
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from PIL import Image as PILImage
from PIL import ImageDraw

COLORS = {"red": (214, 48, 49), "blue": (44, 90, 200), "green": (39, 150, 70), "yellow": (240, 200, 40)}
SHAPES = ("circle", "square", "triangle")
SIZE = 160


@dataclass(frozen=True)
class Scene:
    """A drawing of one to three shapes of one kind and color, and what can be asked about it."""

    image: PILImage.Image
    color: str
    shape: str
    count: int

    @property
    def caption(self) -> str:
        """What is to be seen."""
        return f"{('a', 'two', 'three')[self.count - 1]} {self.color} {self.shape}{'s' * (self.count > 1)}"


def scenes(number: int, seed: int = 0) -> list[Scene]:
    """Some scenes; the same for the same seed."""
    chance = random.Random(seed)
    return [_scene(chance) for _ in range(number)]


def _scene(chance: random.Random) -> Scene:
    color, shape, count = chance.choice(list(COLORS)), chance.choice(SHAPES), chance.randint(1, 3)
    image = PILImage.new("RGB", (SIZE, SIZE), (250, 250, 246))
    draw = ImageDraw.Draw(image)
    for place in range(count):
        x, y, r = 30 + 50 * place + chance.randint(-5, 5), chance.randint(40, 120), 18
        corners = {"circle": None, "square": [(x - r, y - r), (x + r, y - r), (x + r, y + r), (x - r, y + r)]}
        points = corners.get(shape, [(x, y - r), (x + r, y + r), (x - r, y + r)])
        if points is None:
            draw.ellipse((x - r, y - r, x + r, y + r), fill=COLORS[color])
        else:
            draw.polygon(points, fill=COLORS[color])
    return Scene(image, color, shape, count)
