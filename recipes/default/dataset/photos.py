"""Photographs and cards of GCompris, and photographs of desktop backgrounds, read from Debian's packages.

Photographs (`photos`) fill their frame; cards (`cards`) are drawn cut-outs: words, instruments, planets. Names stand
in `names_more.txt`, Chinese ones come from the package where it has them. The activity `erase` is read for judging
only: `erase_photos` gives it to whoever judges, and nothing here trains on it.
"""

from __future__ import annotations

import functools
import io
import json
import random
import re
from pathlib import Path
from typing import TYPE_CHECKING

from recipes.default.dataset import words
from recipes.default.dataset.senses.rcc import read_rcc
from recipes.default.dataset.sources import Source, missing

if TYPE_CHECKING:
    from PIL import Image as Pictures

GCOMPRIS = Path("/usr/share/gcompris-qt/rcc")
_PHOTOS = (
    "categorization",
    "explore_monuments",
    "explore_world_animals",
    "explore_farm_animals",
    "explore_world_music",
    "details",
)
_CARDS = ("lang", "instruments", "babymatch", "explore_farm_animals", "solar_system")
_ENTRY = re.compile(r"/resource/(?!board/)(?:[\w-]+/)*([^/]+)\.(?:webp|svg)$")
_BACKGROUNDS = ("wallpapers", "backgrounds/mate/nature", "backgrounds/gnome")
_PLAIN = re.compile(  # drawings with letters or figures, and what is one colour
    r"^(vnc-|symbolic-|pixels-|screenshot|FlyingKonqui|SafeLanding|Kokkini$|Elarun$|Arc-Colors)"
)


@functools.lru_cache(maxsize=2)
def _entries(file: Path) -> dict[str, bytes]:
    if not file.is_file():
        raise missing(file, "gcompris-qt-data")
    return read_rcc(file)


def _table(table: str, name: str) -> tuple[str, str]:
    """The noun and the caption of an entry: by its own name, by its name without a number, or the name itself."""
    names = words.fixes("names_more.txt")[table]
    said = names.get(name) or names.get(name.rstrip("0123456789"))
    if said is None:
        said = name.rpartition("/")[2].replace("_", " ").lower()
        found = words.find_noun(said.split(), more=True)
        said = found[0] if found and table == "cards" and found[2] - found[1] == len(said.split()) else "-"
    noun, _, caption = said.partition(" | ")
    return noun, caption or words.phrase(noun)


def _chinese(folder: Path) -> dict[str, str]:
    """Chinese names of the words of `lang`, by their English names."""
    entries = _entries(folder / "lang.rcc")
    read = {
        language: json.loads(next(v for k, v in entries.items() if k.endswith(f"content-{language}.json")))
        for language in ("en", "zh_CN")
    }
    return {name.lower(): read["zh_CN"][file] for file, name in read["en"].items() if read["zh_CN"].get(file)}


def _read(folder: Path, origin: str, activities: tuple[str, ...]) -> list[Source]:
    chinese = _chinese(folder)
    found: list[Source] = []
    for activity in activities:
        file = folder / f"{activity}.rcc"
        for entry in sorted(_entries(file)):
            match = _ENTRY.search(entry)
            drawn = activity in ("lang", "solar_system") or entry.endswith(".svg")
            if not match or drawn != (origin == "cards"):
                continue
            name = match[1]
            if activity == "details":
                if not name.endswith("_background"):
                    continue
                name = re.sub(r"(_2007_02_24_c)?_background$", "", name)
            noun, caption = _table(origin, f"{activity}/{name}")
            if noun == "-":
                continue
            known = words.zh_nouns().get(noun) or chinese.get(noun)
            subject = re.sub(
                r"[^a-z0-9]", "", (caption if caption.startswith(("The ", "Mount ")) else f"{activity}{name}").lower()
            )
            found.append(
                Source(
                    key=f"{origin}:{activity}/{name}",
                    origin=origin,
                    path=f"{file}#{entry}",
                    caption=words.sentence(caption),
                    noun=noun,
                    category=words.lexicon()[noun].category,
                    group=f"{origin}:{subject}",
                    flippable=noun not in ("number", "number blocks", "alphabet blocks"),
                    photo=origin == "photos",
                    rectangular=origin == "photos",
                    zh_noun=known,
                )
            )
    return found


def read_photos(folder: Path) -> list[Source]:
    """The named photographs, one source each.

    Args:
        folder: GCompris' `rcc` folder.

    Returns:
        The sources, in order.

    Raises:
        DataError: The package is not there.
    """
    return _read(folder, "photos", _PHOTOS)


def read_cards(folder: Path) -> list[Source]:
    """The drawn cards: words, instruments, things for babies, farm animals, planets.

    Args:
        folder: GCompris' `rcc` folder.

    Returns:
        The sources, in order.

    Raises:
        DataError: The package is not there.
    """
    return _read(folder, "cards", _CARDS)


def erase_photos(folder: Path) -> dict[str, Pictures.Image]:
    """The 33 photographs that are for judging only, by name."""
    return {
        Path(entry).stem: load(f"{folder / 'erase.rcc'}#{entry}").convert("RGB")
        for entry in sorted(_entries(folder / "erase.rcc"))
        if entry.endswith(".webp") and _ENTRY.search(entry)
    }


def load(path: str) -> Pictures.Image:
    """Open an entry of a resource file, RGBA; drawings at 512 pixels."""
    from PIL import Image

    from recipes.default.dataset.icons import drawn

    file, _, entry = path.partition("#")
    content = _entries(Path(file))[entry]
    return drawn(content.decode(), 512) if entry.endswith(".svg") else Image.open(io.BytesIO(content)).convert("RGBA")


def backgrounds(root: Path = Path("/")) -> list[Path]:
    """Large photographs and textures without letters or named things: grounds for scenes, and images without labels.

    Args:
        root: `/`, or where gnome-backgrounds, plasma-workspace-wallpapers and mate-backgrounds were unpacked.

    Returns:
        One file per background, in order; none where the packages are missing.
    """
    share = root / "usr/share"
    largest: dict[str, Path] = {}
    for folder in _BACKGROUNDS:
        for file in sorted((share / folder).rglob("*")):
            inside = file.relative_to(share / folder)
            name = inside.parts[0] if folder == "wallpapers" else file.stem
            if file.suffix not in (".jpg", ".png", ".webp") or _PLAIN.search(name) or _PLAIN.search(file.stem):
                continue
            if name not in largest or file.stat().st_size > largest[name].stat().st_size:
                largest[name] = file
    return [largest[name] for name in sorted(largest)]


@functools.lru_cache(maxsize=64)
def _opened(path: Path) -> Pictures.Image:
    """A background at most 1280 pixels wide, so that many stay in memory."""
    from PIL import Image

    with Image.open(path) as image:
        image.draft("RGB", (1280, 1280))
        image = image.convert("RGB")
    image.thumbnail((1280, 1280))
    return image


def background_crop(path: Path, seed: int, side: int = 224) -> Pictures.Image:
    """A square piece of a background, a third of its height or more, perhaps mirrored: the same one for a seed.

    Args:
        path: One of `backgrounds`.
        seed: Chooses the piece.
        side: Of the image in pixels.

    Returns:
        RGB.
    """
    from PIL import Image

    rng = random.Random(seed)
    image = _opened(path)
    size = round(min(image.size) * rng.uniform(0.34, 1.0))
    left, top = rng.randint(0, image.width - size), rng.randint(0, image.height - size)
    piece = image.crop((left, top, left + size, top + size)).resize((side, side), Image.Resampling.LANCZOS)
    return piece.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.random() < 0.5 else piece
