"""Where the pictures come from: stamps, drawings, emoji and drawn shapes, each with a name that can be trusted.

A source is one cut-out picture and what it shows. Sources are read from three Debian packages
(tuxpaint-stamps-default, openclipart-png, fonts-noto-color-emoji) or, for the shapes, drawn with Pillow. Names are
cleaned hard: a file whose name holds no noun of the table is dropped. Sources are held out whole, together with their
near duplicates (the same file under a number, the same drawing in black and white), so that no held-out picture appears
in training in any view.
"""

from __future__ import annotations

import hashlib
import math
import random
import re
import unicodedata
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from polymodal.errors import DataError
from recipes.default.dataset import words

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image as Pictures

STAMPS = Path("/usr/share/tuxpaint/stamps")
OPENCLIPART = Path("/usr/share/openclipart/png")
EMOJI_FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
FONTS = Path("/usr/share/fonts/truetype")
THUMB = 256
PHOTO_THUMB = 448  # of what fills its frame, so that crops of it are sharp

_SKIP_STAMPS = re.compile(
    r"^(symbols/(alphabets|math|money|music|faces|recycle)|town/roadsigns/(?!stop$|stoplight|traffic_cone)|"
    r"military/final|naturalforces/explosion|animals/insects/cartoon/(wings|spider_)|animals/birds/cartoon|"
    r"household/toilet|vehicles/emergency/sedan_police|town/flags/)"
)
_DRAWN = re.compile(r"cartoon|^seasonal/easter/|^clothes/button$")  # drawings; the others are measured
_SKIP_CLIPART = re.compile(
    r"icons|logos|buttons|special|cards|roadsigns|aiga|shapes|hazard|semaphore|map_symbols|led\b|folders|diagrams|"
    r"stickmen|smilies|religion|pantyhose|geography|duplicates|awards|signs_and_symbols(?!/(weather|clocks))|connectors|"
    r"decorations|recreation/sports|network|boating"
)
_SAY_ADJECTIVES = {*words.COLOURS, "small", "big", "large", "little", "old", "open", "closed", "wooden", "happy"}
_ADJECTIVES = {*_SAY_ADJECTIVES, "baby", "fancy", "simple", "plain", "cartoon", "round", "square", "stylized", "young"}
_PACKED = {"icons", "flags", "photos", "cards"}  # entries of a package's files, which `more` opens
_IN_COMPUTER = {"mouse": "computer mouse", "notebook": "laptop"}


@dataclass(frozen=True)
class Source:
    """One cut-out picture and what may be said about it."""

    key: str
    origin: str  # stamps | openclipart | emoji | shapes, and those that `more.py` lists
    path: str  # file, or file#entry, or the character of an emoji, or "shape/colour"
    caption: str
    noun: str | None
    category: str | None
    group: str
    flippable: bool = True
    zh: str | None = None
    colour: str | None = None
    luminance: float = 128.0
    photo: bool = False
    pixels: int = 0  # longer side of the cut-out
    heldout: bool = False
    rectangular: bool = False  # fills its frame: a photograph, or a drawing on an opaque sheet
    zh_noun: str | None = None  # the noun in Chinese


def missing(path: Path, package: str) -> DataError:
    """The error for a picture package that is not installed, with both ways to get it.

    Args:
        path: Where it was looked for.
        package: The Debian package.

    Returns:
        The error, ready to be raised.
    """
    return DataError(
        f"{path} not found: install it with `sudo apt-get install {package}`, or without root "
        f"`apt-get download {package} && dpkg-deb -x {package}_*.deb DIR` and name the folder in DIR"
    )


def _clean(text: str) -> str:
    table = {"“": '"', "”": '"', "’": "'", "‘": "'", "—": ", ", "–": "-", "…": "...", "\u00a0": " "}
    text = "".join(table.get(c, c) for c in text).strip()
    text = re.sub(r"\s*\([^)]*\)", "", text)  # "A peacock (a male peafowl)." -> "A peacock."
    return re.sub(r"\s+", " ", text).strip()


_QUANTITY = re.compile(
    r"^(?:an?|the|some|two|our)?\s*(?:pair|bunch|cluster|head|couple|string|quarter|plant|baby) of (?:an? )?"
)
_CUT = re.compile(
    r"\s(?:with|of|in|for|on|to|from|at|by|that|used|worn|covered|called|is|has|means|lets|playing)\b|[,:;]"
)


def caption_noun(caption: str) -> str | None:
    """The noun of the table that a caption is about.

    Args:
        caption: An English phrase or sentence.

    Returns:
        The noun, or None.
    """
    text = _clean(caption).lower().replace('"', "").replace("'s ", " ")
    text = _CUT.split(_QUANTITY.sub("", text))[0]
    found = words.find_noun(re.findall(r"[a-z']+", text))
    return found[0] if found else None


def read_stamps(folder: Path) -> list[Source]:
    """Tux Paint stamps that have a bitmap and a caption that names a thing.

    Args:
        folder: The package's `stamps` folder.

    Returns:
        One source per stamp, in name order.

    Raises:
        DataError: When the folder is not there or empty.
    """
    files = sorted(folder.rglob("*.txt")) if folder.is_dir() else []
    if not files:
        raise missing(folder, "tuxpaint-stamps-default")
    fixes = words.fixes()
    found: list[Source] = []
    for file in files:
        name = file.relative_to(folder).with_suffix("").as_posix()
        picture = file.with_suffix(".png")
        if not picture.is_file() or _SKIP_STAMPS.search(name):
            continue
        lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
        caption = fixes["captions"].get(name, _clean(lines[0]) if lines else "")
        noun = fixes["nouns"].get(name) or caption_noun(caption)
        noun = None if noun == "-" else noun
        simple = re.fullmatch(r"(?:An?|Two|Some|The|Our) [\w'\" -]{2,40}\.?", caption)
        if not simple:
            if noun is None:
                continue
            caption = words.phrase(noun)
        zh = next((ln.split("=", 1)[1].strip() for ln in lines if re.match(r"zh_CN(\.utf8)?=", ln)), None)
        if zh and not re.fullmatch(r"[\u4e00-\u9fff]{1,12}。?", zh):
            zh = None
        group = "stamps:" + re.sub(r"[-_]?(\d+|[a-z])?$", "", re.split(r"[-_]", name)[0])
        category = words.lexicon()[noun].category if noun else None
        found.append(
            Source(
                key=f"stamps:{name}",
                origin="stamps",
                path=str(picture),
                caption=words.sentence(caption),
                noun=noun,
                category=category,
                group=group,
                zh=zh,
                flippable=not name.startswith(("symbols", "town/roadsigns")),
                photo=not _DRAWN.search(name),
            )
        )
    return found


def read_openclipart(folder: Path) -> list[Source]:
    """Open Clip Art drawings whose file name starts with a noun of the table.

    The names look like `tennis_racket_01` or `cavallo_architetto_franc_05` (noun, author, number; no description file
    is shipped), so the noun must come first, after at most two adjectives, and must not be followed by a word that
    makes it another thing ("dog house").

    Args:
        folder: The package's `png` folder.

    Returns:
        One source per distinct file, in name order.

    Raises:
        DataError: When the folder is not there or empty.
    """
    files = sorted(folder.rglob("*.png")) if folder.is_dir() else []
    if not files:
        raise missing(folder, "openclipart-png")
    found: list[Source] = []
    seen: set[bytes] = set()
    others = words.fixes()["other things"]
    for file in files:
        name = file.relative_to(folder).with_suffix("").as_posix()
        parent, _, stem = name.rpartition("/")
        if _SKIP_CLIPART.search(parent):
            continue
        parts = [p for p in re.split(r"[^a-z]+", stem.lower()) if p]
        lead = 0
        while lead < len(parts) and parts[lead] in _ADJECTIVES and lead < 2:
            lead += 1
        match = words.find_noun(parts[lead : lead + 4], last=False)
        if match is None or match[1] != 0:  # the adjective may itself be the noun ("orange", "square table")
            match = words.find_noun(parts[:4], last=False)
            if match is None or match[1] != 0:
                continue
            lead = 0
        noun, _, end = match
        noun = _IN_COMPUTER.get(noun, noun) if parent.startswith("computer") else noun
        rest = parts[lead + end :]
        if rest and (rest[0] in others or words.find_noun(rest[:1]) is not None):
            continue
        if file.stat().st_size > 1_500_000:
            continue
        digest = hashlib.sha256(file.read_bytes()).digest()
        if digest in seen:  # the package files the same drawing under several folders
            continue
        seen.add(digest)
        adjectives = [p for p in parts[:lead] if p in _SAY_ADJECTIVES][:1]
        group = "openclipart:" + re.sub(r"(_?bw|_?[rsn]|[-_]?\d+|_)+$", "", re.sub(r"_bw|\d+", "", stem.lower()))
        found.append(
            Source(
                key=f"openclipart:{name}",
                origin="openclipart",
                path=str(file),
                caption=words.sentence(words.phrase(noun, " ".join(adjectives))),
                noun=noun,
                category=words.lexicon()[noun].category,
                group=group,
            )
        )
    return found


def read_emoji(font: Path) -> list[Source]:
    """Emoji of the colour font whose Unicode name is a noun of the table.

    Args:
        font: NotoColorEmoji.ttf with 109-pixel bitmaps.

    Returns:
        One source per character, in code order.

    Raises:
        DataError: When the font is not there.
    """
    if not font.is_file():
        raise missing(font, "fonts-noto-color-emoji")
    from PIL import ImageFont

    face = ImageFont.truetype(str(font), 109)
    blank = bytes(face.getmask("\U000f0000"))  # what the font draws for a character it does not have
    found: list[Source] = []
    for start, end in (
        (0x2600, 0x27C0),
        (0x1F300, 0x1F650),
        (0x1F680, 0x1F700),
        (0x1F900, 0x1FA00),
        (0x1FA70, 0x1FB00),
    ):
        for code in range(start, end):
            char = chr(code)
            name = re.sub(r"[^a-z ]+", " ", unicodedata.name(char, "").lower()).strip()
            parts = name.split()
            if len(parts) == 2 and parts[1] == "face":
                parts = parts[:1]
            match = words.find_noun(parts)
            if match is None or match[2] - match[1] != len(parts):
                continue
            mask = face.getmask(char)
            if mask.size[0] < 100 or bytes(mask) == blank:
                continue
            noun = match[0]
            found.append(
                Source(
                    key=f"emoji:{code:x}",
                    origin="emoji",
                    path=char,
                    caption=words.sentence(words.phrase(noun)),
                    noun=noun,
                    category=words.lexicon()[noun].category,
                    group=f"emoji:{code:x}",
                )
            )
    return found


def drawn_shapes() -> list[Source]:
    """Every shape in every colour, drawn by us: plain colours, plain names.

    Returns:
        One source per shape and colour.
    """
    return [
        Source(
            key=f"shapes:{shape}/{colour}",
            origin="shapes",
            path=f"{shape}/{colour}",
            noun=shape,
            category="shape",
            caption=words.sentence(words.phrase(shape, colour)),
            group=f"shapes:{shape}/{colour}",
            colour=colour,
            zh=f"一个{words.ZH_COLOURS[colour]}的{words.ZH_SHAPES[shape]}。",
        )
        for shape in words.SHAPES
        for colour in words.COLOURS
    ]


def hold_out(sources: list[Source], share: float, rng: random.Random) -> list[Source]:
    """Mark a share of the groups of each origin as held out.

    Args:
        sources: All sources.
        share: Between 0 and 1.
        rng: Draws the groups.

    Returns:
        The sources, in the same order.
    """
    chosen: set[str] = set()
    for origin in ("stamps", "openclipart", "emoji", "shapes"):
        groups = sorted({s.group for s in sources if s.origin == origin})
        rng.shuffle(groups)
        chosen |= set(groups[: round(len(groups) * share)])
    return [replace(s, heldout=s.group in chosen) for s in sources]


def draw_shape(shape: str, colour: str) -> Pictures.Image:
    """Draw one shape, filling a square with a transparent ground.

    Args:
        shape: A name of `words.SHAPES`.
        colour: A name of `words.COLOURS`.

    Returns:
        An RGBA picture of THUMB pixels.
    """
    from PIL import Image, ImageDraw

    size = THUMB * 2
    image = Image.new("RGBA", (size, size), (0, 0, 0, 0))
    draw = ImageDraw.Draw(image)
    fill = (*words.COLOURS[colour], 255)
    low, high, mid = size * 0.04, size * 0.96, size / 2
    if shape == "circle":
        draw.ellipse((low, low, high, high), fill=fill)
    elif shape == "ring":
        draw.ellipse((low, low, high, high), outline=fill, width=size // 6)
    elif shape == "square":
        draw.rectangle((low, low, high, high), fill=fill)
    elif shape == "cross":
        draw.rectangle((mid * 0.68, low, mid * 1.32, high), fill=fill)
        draw.rectangle((low, mid * 0.68, high, mid * 1.32), fill=fill)
    else:
        if shape == "triangle":
            points = [(mid, low), (high, high), (low, high)]
        elif shape == "diamond":
            points = [(mid, low), (high * 0.9, mid), (mid, high), (size - high * 0.9, mid)]
        elif shape == "star":
            points = [
                (
                    mid + mid * 0.95 * r * math.sin(k * math.pi / 5),
                    mid * 1.04 - mid * 0.95 * r * math.cos(k * math.pi / 5),
                )
                for k in range(10)
                for r in ((1.0, 0.42)[k % 2],)
            ]
        else:  # heart
            points = [
                (
                    mid + mid * 0.95 * math.sin(t) ** 3,
                    mid * 0.92
                    - mid * 0.058 * (13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)),
                )
                for t in (k * math.pi / 60 for k in range(120))
            ]
        draw.polygon(points, fill=fill)
    return image.resize((THUMB, THUMB), Image.Resampling.LANCZOS)


MAX_SOURCE_PIXELS = 24_000_000
"""Larger pictures are left out: a few posters of 600 megapixels take more memory than a laptop has."""

MEASURE_SIDE = 1024


def measure(source: Source, target: Path, emoji_font: Path | None) -> Source | None:
    """Load a source, store its cut-out at most THUMB pixels large, and measure colour, brightness and photo-likeness.

    Args:
        source: What to load.
        target: PNG file to write.
        emoji_font: The emoji font, for emoji.

    Returns:
        The source with the measures, or None when the picture cannot be used (empty, tiny, unreadable).
    """
    import numpy as np
    from PIL import Image, ImageDraw, ImageFont

    if source.origin == "shapes":
        image = draw_shape(*source.path.split("/"))
    elif source.origin in _PACKED:
        from recipes.default.dataset import more

        image = more.load(source)
    elif source.origin == "emoji":
        font = ImageFont.truetype(str(emoji_font), 109)
        image = Image.new("RGBA", (160, 160), (0, 0, 0, 0))
        ImageDraw.Draw(image).text((12, 12), source.path, font=font, embedded_color=True)
    else:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the size is looked at below
                opened = Image.open(source.path)
            with opened:
                if opened.width * opened.height > MAX_SOURCE_PIXELS:
                    return None
                image = opened.convert("RGBA")
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
            return None
    box = image.getchannel("A").point(lambda a: 255 if a > 24 else 0).getbbox()
    if box is None:
        return None
    image = image.crop(box)
    if min(image.size) < 18 or max(image.size) / min(image.size) > 6:
        return None
    opaque = int(np.asarray(image.getchannel("A")).min()) > 128
    if source.origin == "openclipart" and opaque:
        return None  # a drawing on an opaque sheet is no cut-out
    longest = max(image.size)
    if longest > MEASURE_SIDE:  # colours do not need more, and some drawings are huge
        image.thumbnail((MEASURE_SIDE, MEASURE_SIDE))
    most = PHOTO_THUMB if source.rectangular else THUMB
    if max(image.size) > most:
        scale = most / max(image.size)
        image = image.resize(
            (max(1, round(image.width * scale)), max(1, round(image.height * scale))), Image.Resampling.LANCZOS
        )
    full = np.asarray(image)
    solid = full[..., 3] > 128
    pixels = full[solid][:, :3].astype(np.int32)
    if len(pixels) < 200:
        return None
    coarse = pixels >> 3
    distinct = len(np.unique(coarse[:, 0] * 1024 + coarse[:, 1] * 32 + coarse[:, 2]))
    photo = source.photo and source.origin == "stamps" and distinct / min(len(pixels), 20000) > 0.03 and distinct > 250
    if source.origin == "photos":
        photo, colour = True, None
    elif source.origin == "shapes":
        colour = source.colour
    else:
        colour = dominant_colour(pixels)
    image.save(target, "PNG", compress_level=1)
    luminance = float((pixels @ np.array([299, 587, 114]) / 1000).mean())
    return replace(
        source,
        colour=colour,
        luminance=round(luminance, 1),
        photo=photo,
        pixels=longest,
        rectangular=source.rectangular or (source.origin == "openclipart2" and opaque),
    )


def dominant_colour(pixels: np.ndarray) -> str | None:
    """The plain colour name of a cut-out, where one colour clearly dominates.

    Args:
        pixels: [n, 3] integers, opaque pixels.

    Returns:
        A name of `words.COLOURS`, or None when no colour covers 60 % and three times the next.
    """
    import numpy as np

    rgb = pixels / 255.0
    high, low = rgb.max(1), rgb.min(1)
    spread = high - low
    safe = np.where(spread == 0, 1, spread)
    red, green, blue = rgb[:, 0], rgb[:, 1], rgb[:, 2]
    hue = (
        np.where(
            high == red,
            (green - blue) / safe % 6,
            np.where(high == green, (blue - red) / safe + 2, (red - green) / safe + 4),
        )
        * 60
    )
    saturation = np.where(high == 0, 0, spread / np.where(high == 0, 1, high))
    names = np.full(len(rgb), "none", dtype="<U8")
    plain = saturation < 0.15
    names[plain & (high > 0.88)] = "white"
    names[plain & (high <= 0.75) & (high > 0.3)] = "gray"
    names[high < 0.18] = "black"
    lively = (saturation > 0.38) & (high > 0.3)
    for name, start, end in (
        ("orange", 22, 42),
        ("yellow", 46, 64),
        ("green", 80, 160),
        ("blue", 195, 250),
        ("purple", 262, 300),
    ):
        names[lively & (hue >= start) & (hue < end)] = name
    names[lively & ((hue < 14) | (hue >= 345)) & (high > 0.4)] = "red"
    names[(saturation > 0.2) & (high > 0.7) & (hue >= 305) & (hue < 352)] = "pink"
    names[(saturation > 0.3) & (hue >= 12) & (hue < 44) & (high < 0.62) & (high > 0.15)] = "brown"
    kinds, counts = np.unique(names, return_counts=True)
    order = np.argsort(-counts)
    best = str(kinds[order[0]])
    share = counts[order[0]] / len(rgb)
    second = counts[order[1]] / len(rgb) if len(order) > 1 else 0.0
    return best if best != "none" and share > 0.6 and share > 3 * second else None
