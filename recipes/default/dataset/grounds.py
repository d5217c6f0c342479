"""What lies behind a natural scene: photographs, grass, sand, water, wood, tiles, and what is out of focus."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from recipes.default.dataset import scenes, words
from recipes.default.dataset.scenes import SIDE, Ground

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image as Images

Colour = tuple[int, int, int]


@dataclass(frozen=True)
class Back:
    """The ground of one image."""

    style: str  # plain | gradient | texture | blurred | photo | a name of DRAWN
    first: Colour = (200, 200, 200)
    second: Colour = (200, 200, 200)
    name: str | None = None  # the colour's name where it is plain and clear
    photo: int = 0
    crop: tuple[float, float, float] = (0.5, 0.5, 1.0)  # where in the photograph, and how much of its shorter side
    blur: float = 0.0


@dataclass(frozen=True)
class Photo:
    """A photograph to put things on, shrunk into the thumbs as `back_<index>.jpg`."""

    index: int
    light: float  # mean luminance
    colours: tuple[str, ...] = ()  # that cover much of it


STORED = 448
PHRASES = {
    "grass": "on grass",
    "sand": "on sand",
    "water": "in front of water",
    "sky": "in front of the sky",
    "wood": "on wood",
    "snow": "on snow",
    "tiles": "on tiles",
    "bricks": "in front of a brick wall",
    "leaves": "in front of leaves",
    "beach": "on a beach",
    "meadow": "on a meadow",
}
_LIGHTS = {
    **{"grass": 120.0, "sand": 195.0, "water": 135.0, "sky": 190.0, "wood": 105.0, "bricks": 115.0, "leaves": 75.0},
    **{"stone": 130.0, "snow": 235.0, "night": 35.0, "meadow": 150.0, "beach": 175.0, "tiles": 165.0, "cloth": 150.0},
    **{"wall": 175.0, "room": 150.0},
}
# Colours that a thing would be lost in, and nouns that such a ground might be said to show.
SHADES = {
    "grass": {"green"},
    "leaves": {"green", "black"},
    "meadow": {"green"},
    "sand": {"yellow", "orange", "brown"},
    "beach": {"yellow"},
    "water": {"blue"},
    "sky": {"blue", "white"},
    "wood": {"brown", "orange", "red"},
    "bricks": {"red", "brown", "orange"},
    "snow": {"white"},
    "stone": {"gray"},
    "night": {"black", "purple", "blue"},
}
_OUTDOORS = (
    "tree leaf plant flower rose bush grass mountain volcano island cloud sun moon star sunset rock feather rainbow "
    "wall fence house bridge boat ship bird snowflake planet earth window door road river building tower castle church "
    "sunflower daisy tulip mushroom cactus fern comet explosion fire table girl boy woman man person wood stone"
)
OUTDOORS = frozenset({*_OUTDOORS.split(), "palm tree", "pine tree", "christmas tree", "water lily", "ice cube"})


def shrink(paths: Iterable[Path], thumbs: Path) -> list[Photo]:
    """Put photographs for backgrounds beside the cut-outs, small; what cannot be read is left out."""
    from PIL import Image, ImageStat

    kept: list[Photo] = []
    for path in sorted(paths):
        try:
            with Image.open(path) as opened:
                opened.draft("RGB", (STORED * 2, STORED * 2))
                image = opened.convert("RGB")
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
            continue
        if min(image.size) < SIDE or max(image.size) > 5 * min(image.size):
            continue
        scale = STORED / min(image.size)
        if scale < 1:
            size = round(image.width * scale), round(image.height * scale)
            image = image.resize(size, Image.Resampling.LANCZOS, reducing_gap=2.0)
        image.save(thumbs / f"back_{len(kept)}.jpg", quality=92)
        light = round(ImageStat.Stat(image.convert("L")).mean[0], 1)
        kept.append(Photo(len(kept), light, _much_of(image.resize((24, 24), Image.Resampling.BOX))))
    return kept


def _much_of(image: Images.Image) -> tuple[str, ...]:
    """The colours that more than a fifth of the pixels are nearest to."""
    import numpy as np

    table = np.array(list(words.COLOURS.values()), dtype=np.float32)
    pixels = np.asarray(image, dtype=np.float32).reshape(-1, 1, 3)
    nearest = ((pixels - table) ** 2).sum(-1).argmin(1)
    counts = np.bincount(nearest, minlength=len(table)) / len(nearest)
    return tuple(name for name, share in zip(words.COLOURS, counts, strict=True) if share > 0.2)


def choose(
    rng: random.Random,
    photos: list[Photo],
    colours: set[str | None],
    lights: Sequence[float] = (),
    *,
    soft: bool = False,
    named: float = 0.12,
) -> Back:
    """A ground that things of these colours and luminances are seen on; out of focus where `soft`."""
    for _ in range(40):
        draw = rng.random()
        if draw < named:
            name = rng.choice(list(words.COLOURS))
            colour = (252, 252, 252) if name == "white" else scenes._jitter(words.COLOURS[name], rng)
            back = Back("plain", colour, colour, name)
        elif draw < named + 0.18:
            level = rng.randint(30, 235)
            first = scenes._jitter((level, level, level), rng, 50)
            style = rng.choice(["gradient", "texture", "blurred"])
            back = Back(style, first, scenes._jitter(first, rng, 60))
        elif photos and draw < named + 0.18 + 0.38:
            photo = rng.choice(photos)
            part = rng.uniform(0.35, 1.0)
            blur = rng.choice([2.0, 4.0, 7.0, 12.0]) if soft or rng.random() < 0.5 else 0.0
            place = (round(rng.random(), 3), round(rng.random(), 3), round(part, 3))
            back = Back("photo", photo=photo.index, crop=place, blur=blur)
        else:
            style = rng.choice(list(DRAWN))
            blur = round(rng.uniform(1, 6), 1) if soft or rng.random() < 0.35 else 0.0
            back = Back(style, blur=blur)
        seen = {back.name} if back.name else SHADES.get(back.style, set())
        if back.style == "photo":
            seen = {*photo.colours}
        level = photo.light if back.style == "photo" else _LIGHTS.get(back.style) or light_of(back.first)
        if any(abs(level - light) < (45 if min(level, light) < 70 else 25) for light in lights):
            continue
        if not seen & colours and not (back.style in ("gradient", "texture", "blurred") and colours & {"gray"}):
            return back
    return Back("plain", (205, 225, 245), (205, 225, 245))


def light_of(colour: Colour) -> float:
    """Its luminance, of 255."""
    return sum(w * c for w, c in zip((0.299, 0.587, 0.114), colour, strict=True))


def outdoors(back: Back) -> bool:
    """Whether the ground may itself show things of the outdoors."""
    return back.style == "photo" or back.style in DRAWN


@functools.lru_cache(maxsize=100)
def _photo(path: str) -> Images.Image:
    from PIL import Image

    with Image.open(path) as opened:
        return opened.convert("RGB")


def draw(back: Back, seed: int, thumbs: Path) -> Images.Image:
    """Draw the ground as RGB of SIDE pixels."""
    import numpy as np
    from PIL import Image

    if back.style in ("plain", "gradient", "texture", "blurred"):
        image = scenes._draw_ground(Ground(back.style, back.first, back.second, back.name), seed)
    elif back.style == "photo":
        photo = _photo(str(thumbs / f"back_{back.photo}.jpg"))
        x, y, part = back.crop
        side = min(photo.size) * part
        left, top = (photo.width - side) * x, (photo.height - side) * y
        image = photo.resize((SIDE, SIDE), Image.Resampling.BILINEAR, (left, top, left + side, top + side))
    else:
        image = DRAWN[back.style](np.random.default_rng(seed))
    return _blurred(image, back.blur) if back.blur else image


def _blurred(image: Images.Image, radius: float) -> Images.Image:
    """Gaussian blur; a strong one on a smaller copy."""
    from PIL import Image, ImageFilter

    if radius < 3:
        return image.filter(ImageFilter.GaussianBlur(radius))
    small = image.resize((SIDE // 4, SIDE // 4), Image.Resampling.BOX).filter(ImageFilter.GaussianBlur(radius / 4))
    return small.resize((SIDE, SIDE), Image.Resampling.BICUBIC)


def _cells(noise: np.random.Generator, rows: int, columns: int) -> np.ndarray:
    """Random cells, smoothed over the frame: [SIDE, SIDE] in 0..1."""
    import numpy as np
    from PIL import Image

    coarse = Image.fromarray((noise.random((rows, columns)) * 255).astype(np.uint8))
    return np.asarray(coarse.resize((SIDE, SIDE), Image.Resampling.BICUBIC), dtype=np.float32) / 255


def _rough(noise: np.random.Generator, *sizes: tuple[int, int]) -> np.ndarray:
    """Cells of several sizes, each half as strong as the one before: [SIDE, SIDE] in 0..1."""
    total = sum(_cells(noise, *size) * 0.5**k for k, size in enumerate(sizes))
    return total / sum(0.5**k for k in range(len(sizes)))


def _between(noise: np.random.Generator, dark: Colour, light: Colour, share: np.ndarray) -> np.ndarray:
    """Mix two colours, each a little off: [SIDE, SIDE, 3] floats."""
    import numpy as np

    first, second = (np.array(c, dtype=np.float32) + noise.normal(0, 10, 3).astype(np.float32) for c in (dark, light))
    return first + (second - first) * share[..., None]


def _image(pixels: np.ndarray) -> Images.Image:
    import numpy as np
    from PIL import Image

    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def _grass(noise: np.random.Generator) -> np.ndarray:
    fine = 0.5 * _rough(noise, (5, 5), (40, 60)) + 0.5 * _cells(noise, 56, 160)
    return _between(noise, (25, 70, 20), (130, 185, 70), fine)


def _sand(noise: np.random.Generator) -> np.ndarray:
    fine = 0.5 * _rough(noise, (4, 4), (14, 6)) + 0.5 * _cells(noise, 180, 180)
    return _between(noise, (180, 150, 105), (240, 220, 175), fine)


def _water(noise: np.random.Generator) -> np.ndarray:
    return _between(noise, (20, 70, 120), (130, 195, 220), _rough(noise, (20, 4), (60, 9), (110, 30)) ** 1.3)


def _sky(noise: np.random.Generator) -> np.ndarray:
    import numpy as np

    down = np.linspace(0, 1, SIDE, dtype=np.float32)[:, None]
    clouds = np.clip(_rough(noise, (4, 3), (9, 7), (20, 16)) * 2.6 - noise.uniform(0.9, 1.7), 0, 1)
    blue = _between(noise, (60, 120, 205), (180, 210, 240), np.broadcast_to(down, (SIDE, SIDE)))
    return blue + (np.float32(248) - blue) * clouds[..., None]


def _wood(noise: np.random.Generator) -> np.ndarray:
    pixels = _between(noise, (95, 60, 30), (190, 140, 90), _rough(noise, (50, 3), (110, 5), (14, 2)))
    planks = int(noise.integers(3, 7))
    for k in range(1, planks):
        at = k * SIDE // planks
        pixels[at : at + 2] *= 0.55
        pixels[at : at + SIDE // planks] *= noise.uniform(0.9, 1.1)
    return pixels if noise.random() < 0.5 else pixels.transpose(1, 0, 2)


def _tiles(noise: np.random.Generator) -> np.ndarray:
    import numpy as np

    count = int(noise.integers(3, 8))
    rows = np.arange(SIDE) * count // SIDE
    checker = (rows[:, None] + rows[None]) % 2 if noise.random() < 0.5 else noise.random((count, count))[rows][:, rows]
    light = int(noise.integers(150, 235))
    first = tuple(int(c) for c in light + noise.normal(0, 20, 3))
    second = tuple(int(c * noise.uniform(0.55, 0.9)) for c in first)
    pixels = _between(noise, second, first, checker.astype(np.float32))  # type: ignore[arg-type]
    pixels += (_cells(noise, 60, 60)[..., None] - 0.5) * 14
    joint = np.arange(SIDE) % (SIDE // count) < 2
    pixels[joint] *= 0.75
    pixels[:, joint] *= 0.75
    return pixels


def _bricks(noise: np.random.Generator) -> np.ndarray:
    import numpy as np

    high, wide = int(noise.integers(14, 26)), int(noise.integers(36, 60))
    rows, columns = np.mgrid[0:SIDE, 0:SIDE]
    shifted = columns + (rows // high % 2) * (wide // 2)
    each = noise.random((SIDE // high + 2, SIDE // wide + 3)).astype(np.float32)[rows // high, shifted // wide]
    pixels = _between(noise, (120, 50, 35), (190, 100, 75), 0.6 * each + 0.4 * _cells(noise, 90, 90))
    pixels[(rows % high < 2) | (shifted % wide < 2)] = 190 + noise.normal(0, 12)
    return pixels


def _cloth(noise: np.random.Generator) -> np.ndarray:
    import numpy as np

    step = int(noise.integers(12, 44))
    line = (np.arange(SIDE) // step % 2).astype(np.float32)
    grid = np.broadcast_to(line, (SIDE, SIDE)) if noise.random() < 0.5 else (line[:, None] + line[None]) / 2
    first, second = (tuple(int(v) for v in noise.integers(60, 245, 3)) for _ in range(2))
    return _between(noise, first, second, grid) + (_cells(noise, 160, 160)[..., None] - 0.5) * 22  # type: ignore[arg-type]


def _leaves(noise: np.random.Generator) -> np.ndarray:
    return _between(noise, (10, 40, 10), (120, 175, 60), _rough(noise, (12, 12), (26, 26), (60, 60)) ** 1.6)


def _stone(noise: np.random.Generator) -> np.ndarray:
    return _between(noise, (80, 80, 82), (180, 178, 172), _rough(noise, (6, 6), (30, 30), (120, 120)))


def _snow(noise: np.random.Generator) -> np.ndarray:
    return _between(noise, (200, 212, 230), (252, 253, 255), _rough(noise, (5, 4), (20, 14), (100, 100)))


def _wall(noise: np.random.Generator) -> np.ndarray:
    import numpy as np

    light = noise.integers(110, 240) + noise.normal(0, 18, 3)
    across = np.broadcast_to(np.linspace(-14, 14, SIDE, dtype=np.float32), (SIDE, SIDE))
    return light.astype(np.float32) + across[..., None] + (_rough(noise, (4, 4), (90, 90))[..., None] - 0.5) * 16


def _night(noise: np.random.Generator) -> np.ndarray:
    """Lights out of focus in the dark."""
    import numpy as np
    from PIL import Image, ImageDraw

    image = Image.fromarray(_between(noise, (12, 12, 25), (50, 40, 60), _cells(noise, 4, 4)).clip(0, 255).astype("u1"))
    pen = ImageDraw.Draw(image, "RGBA")
    for _ in range(int(noise.integers(10, 30))):
        x, y = noise.integers(0, SIDE, 2)
        r = int(noise.integers(4, 18))
        warm = (255, int(noise.integers(120, 255)), int(noise.integers(40, 255)), int(noise.integers(60, 150)))
        pen.ellipse((x - r, y - r, x + r, y + r), fill=warm)
    return np.asarray(image)


def _over(noise: np.random.Generator, above: np.ndarray, below: np.ndarray) -> np.ndarray:
    """One above the other, with a horizon between."""
    import numpy as np

    at = int(noise.uniform(0.35, 0.65) * SIDE)
    return np.concatenate([above[:at], below[at:]])


def _meadow(noise: np.random.Generator) -> np.ndarray:
    return _over(noise, _sky(noise), _grass(noise))


def _beach(noise: np.random.Generator) -> np.ndarray:
    import numpy as np

    low = int(noise.uniform(0.6, 0.75) * SIDE)
    upper = _over(noise, _sky(noise), _water(noise))
    return np.concatenate([upper[:low], _sand(noise)[low:]])


def _room(noise: np.random.Generator) -> np.ndarray:
    floor = (_wood, _tiles, _cloth)[int(noise.integers(3))]
    return _over(noise, _wall(noise), floor(noise))


def _drawn(make: Callable[[np.random.Generator], np.ndarray]) -> Callable[[np.random.Generator], Images.Image]:
    return lambda noise: _image(make(noise))


DRAWN: dict[str, Callable[[np.random.Generator], Images.Image]] = {
    make.__name__.strip("_"): _drawn(make)
    for make in (
        *(_grass, _sand, _water, _sky, _wood, _tiles, _bricks, _cloth, _leaves, _stone, _snow, _wall, _night),
        *(_meadow, _beach, _room),
    )
}
