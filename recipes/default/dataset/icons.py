"""Icons and emoji in several styles, from the JSON files of Iconify's npm packages, drawn with resvg.

Icons are told apart by their Unicode code points: what the first emoji source holds out is held out here in every
style. A name is the CLDR short name of the code point, kept where all of it is a noun of the table.
"""

from __future__ import annotations

import functools
import io
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polymodal.errors import DataError
from recipes.default.dataset import words
from recipes.default.dataset.sources import Source

if TYPE_CHECKING:
    from PIL import Image as Pictures

STYLES = ("fluent-emoji", "twemoji", "openmoji", "noto")
NPM = Path("data/packages/npm")
DRAWN = 192
_JOINED = re.compile(r"(200d|1f3f[b-f]|20e3|e00..)")  # joined sequences and skin tones


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(
            f"{path} not found: `recipes/default/get_packages.sh data/packages more` gets the npm packages"
        ) from None


def package(folder: Path) -> Any:
    """An npm package's own description."""
    return _json(folder / "package.json")


@functools.cache
def _annotations(root: Path, language: str) -> dict[str, str]:
    """CLDR's short name of each character."""
    found = _json(root / "cldr-annotations-full" / "annotations" / language / "annotations.json")
    return {c: a["tts"][0] for c, a in found["annotations"]["annotations"].items() if a.get("tts")}


@functools.cache
def _territories(root: Path, language: str) -> dict[str, str]:
    found = _json(root / "cldr-localenames-full" / "main" / language / "territories.json")
    names: dict[str, str] = found["main"][language]["localeDisplayNames"]["territories"]
    return names


@functools.cache
def _icons(root: Path, style: str) -> Any:
    return _json(root / style / "icons.json")


def _character(code: str) -> str:
    return "".join(chr(int(part, 16)) for part in code.split("-"))


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower().replace("’", "")).strip("-")


def _codes(root: Path, style: str) -> dict[str, str]:
    """Code point -> name of the icon."""
    file = root / style / "chars.json"
    table = _json(file) if file.is_file() else {}
    if not table:  # this set has names alone: the slugs of CLDR's
        drawn = _icons(root, style)["icons"]
        for char, name in _annotations(root, "en").items():
            if _slug(name) in drawn:
                table["-".join(f"{ord(c):x}" for c in char)] = _slug(name)
    return {code.replace("-fe0f", ""): name for code, name in table.items()}


def icon_noun(name: str) -> str | None:
    """The noun that the whole of an icon's short name is, or None."""
    name = name.lower().replace("’", "'")
    table = words.fixes("names_more.txt")["icons"]
    if name in table:
        return None if table[name] == "-" else table[name]
    parts = [p for p in re.split(r"[^a-z'0-9]+", name.removesuffix(" face")) if p]
    match = words.find_noun(parts, more=True)
    return match[0] if match and match[2] - match[1] == len(parts) else None


def read_icons(root: Path) -> list[Source]:
    """Every icon, in every style, whose name is a noun of the table.

    Args:
        root: Folder with the npm packages, each unpacked under its own name without the scope.

    Returns:
        One source per code point and style, in order.

    Raises:
        DataError: A package is not there.
    """
    english, chinese = _annotations(root, "en"), _annotations(root, "zh")
    found: list[Source] = []
    for style in STYLES:
        drawn = _icons(root, style)["icons"]
        for code, slug in sorted(_codes(root, style).items()):
            if _JOINED.search(code) or slug not in drawn:
                continue
            char = _character(code)
            name = english.get(char) or slug.replace("-", " ")
            noun = icon_noun(name)
            smiley = noun is None and "face" in name.split() and 0x1F600 <= ord(char[0]) <= 0x1F644
            noun = "smiley" if smiley else noun
            if noun is None:
                continue
            caption = name if smiley else words.phrase(noun)
            found.append(
                Source(
                    key=f"icons:{style}/{code}",
                    origin="icons",
                    path=f"{root / style / 'icons.json'}#{slug}",
                    caption=words.sentence(f"{words.article(caption)} {caption}" if smiley else caption),
                    noun=noun,
                    category=words.lexicon()[noun].category,
                    group=f"emoji:{code}",
                    zh_noun=chinese.get(char) if not smiley and name == noun else words.zh_nouns().get(noun),
                )
            )
    return found


def read_flags(root: Path) -> list[Source]:
    """The flag of every country, called "flag" and, in the caption, by its country.

    Args:
        root: As for `read_icons`.

    Returns:
        One source per country, in order.

    Raises:
        DataError: A package is not there.
    """
    english, chinese = _territories(root, "en"), _territories(root, "zh")
    found: list[Source] = []
    for name in sorted(_icons(root, "flag")["icons"]):
        code = name.removesuffix("-4x3").upper()
        if not name.endswith("-4x3") or code not in english:
            continue
        country = english.get(f"{code}-alt-short", english[code])
        found.append(
            Source(
                key=f"flags:{name}",
                origin="flags",
                path=f"{root / 'flag' / 'icons.json'}#{name}",
                caption=f"The flag of {country}.",
                noun="flag",
                category="object",
                group=f"flags:{_slug(country)}",
                flippable=False,
                zh=f"{chinese[code]}的国旗。" if code in chinese else None,
                zh_noun="旗",
            )
        )
    return found


def render(path: str) -> Pictures.Image:
    """Draw an icon: the set's JSON file, `#` and the icon's name -> RGBA, its longer side `DRAWN` pixels."""
    file, _, name = path.rpartition("#")
    icons = _icons(Path(file).parent.parent, Path(file).parent.name)
    icon = icons["icons"][name]
    width, height = (icon.get(side, icons.get(side, 16)) for side in ("width", "height"))
    box = f"{icon.get('left', 0)} {icon.get('top', 0)} {width} {height}"
    return drawn(
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" viewBox="{box}" '
        f'width="{width}" height="{height}">{icon["body"]}</svg>',
        DRAWN,
    )


def drawn(svg: str, width: int) -> Pictures.Image:
    """Draw an SVG, RGBA, that many pixels wide."""
    from PIL import Image

    try:
        import resvg_py
    except ImportError as error:
        raise DataError("icons are drawn with resvg-py, which is not installed: pip install resvg-py") from error
    content = resvg_py.svg_to_bytes(svg_string=svg, skip_system_fonts=True, width=width)
    return Image.open(io.BytesIO(bytes(content))).convert("RGBA")
