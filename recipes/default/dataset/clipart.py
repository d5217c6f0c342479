"""The drawings of Open Clip Art that the first reader leaves: those whose names only the later table knows.

Things become the origin `openclipart2`; flags, playing cards, signs, arrows and the like, many alike, `symbols`.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

from recipes.default.dataset import words
from recipes.default.dataset.sources import Source, read_openclipart

_LEFT_OUT = re.compile(  # not for children, not one thing, or names that say little
    r"pantyhose|stripper|sexy|kallisti|gallows|cannabis|dead_|bullet_hole|ak47|m16_|9_mm|fat_man|projectile|historic/"
    r"|semaphore|special/|flowchart|buttons/|dopewars|batasuna|anarch|socialist|gay_pride|copileft|padania|nationalists"
    r"|symbol_1|star_(1[3-9]|[2-9]\d)pt"  # more than a thousand, drawn in thin lines, too alike to tell
    r"|religion/(?!simple_cross|angel_icon|cross_hand)|head\d|zinf|xbill|quake|pdf|mime-"
)
_ICONS = re.compile(r"computer/icons/(?:flat|lemon|etiquette)")
_FLAGS = re.compile(r"signs_and_symbols/flags/(?:africa|america|asia|europe|oceania|miscellany)\b")
_NO_FLAG = re.compile(
    r"map|route|umbrella|capitol|inukshuk|ampel|outline|regions|rios|provinces|peninsule|coat_of|symbol|fleur_de|"
    r"alternate|plain|split|flag"
)
_REGION_OF = re.compile(r"^(france|germany|spain|uk|usa|canada|australia|belgium|denmark|finland|china|italy)_(?=.)")
_SUITS = {"c": "clubs", "d": "diamonds", "h": "hearts", "s": "spades"}
_RANKS = dict(
    zip(
        ["2", "3", "4", "5", "6", "7", "8", "9", "10", "a", "j", "k", "q"],
        ["two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "ace", "jack", "king", "queen"],
        strict=True,
    )
)
_POINTS = [
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
    "twelve",
    "thirteen",
    "fourteen",
    "fifteen",
    "sixteen",
]
_SIGNS = {  # of the AIGA signs: what they are for
    "air_transportation": "an airport", "bar": "a bar", "barber_shop": "a barber", "beauty_salon": "a hairdresser",
    "bus": "buses", "car_rental": "rental cars", "coffee_shop": "a coffee shop", "currency_exchange": "changing money",
    "drinking_fountain": "a drinking fountain", "elevator": "an elevator", "escalator": "an escalator",
    "fire_extinguisher": "a fire extinguisher", "first_aid": "first aid", "heliport": "a heliport",
    "information": "information", "litter_disposal": "litter", "baggage_lockers": "lockers", "mail": "a post office",
    "lost_and_found": "lost things", "nursery": "a nursery", "parking": "parking", "rail_transportation": "trains",
    "restaurant": "a restaurant", "shops": "shops", "stairs": "stairs", "taxi": "taxis", "telephone": "a telephone",
    "toilet_men": "a men's toilet", "toilet_women": "a women's toilet", "toilets": "toilets",
    "waiting_room": "a waiting room", "water_transportation": "ships",
}  # fmt: skip
_FORBIDDEN = {"no_smoking": "no smoking sign", "no_entry": "no entry sign"} | dict.fromkeys(
    ("no_parking", "no_dogs"), "prohibition sign"
)
_WAYS = {"down": "down", "up": "up", "left": "to the left", "right": "to the right"}


def _symbol(folder: str, stem: str) -> tuple[str, str] | None:
    """The noun and the caption of a drawing whose folder says what it is."""
    if _FLAGS.match(folder):
        country = _country(folder, stem)
        return ("flag", f"The flag of {country}.") if country else None
    if match := re.fullmatch(r"(?:white|simple|ornamental|bordered)_([cdhs])_(\w+)", stem):
        return "playing card", f"The {_RANKS[match[2]]} of {_SUITS[match[1]]}."
    if re.fullmatch(r"(?:white|simple|ornamental|bordered)_jk_[br]", stem):
        return "joker", "A joker."
    if folder.endswith("cardbacks"):
        return "playing card", "The back of a playing card."
    if match := re.match(r"star_(\d+)pt", stem):
        return "star", f"A star with {_POINTS[int(match[1]) - 5]} points."
    if match := re.match(r"arrow-(down|left|right|up)-(\w+?)_", stem):
        arrow = words.phrase("arrow", match[2].replace("seagreen", "green"))
        return "arrow", f"{arrow} that points {_WAYS[match[1]]}."
    if folder == "shapes/arrows" and stem.startswith("arrow"):
        return "arrow", "An arrow."
    if match := re.match(r"jigsaw_(\w+)_\d+$", stem):
        return "puzzle piece", f"A {match[1]} puzzle piece."
    if folder == "shapes/callouts":
        noun = "thought bubble" if stem.startswith("cloud") else "speech bubble"
        return noun, words.phrase(noun)
    if match := re.fullmatch(r"aiga_(.*?)[1_]", stem):
        if match[1] in _FORBIDDEN:
            return _FORBIDDEN[match[1]], words.phrase(_FORBIDDEN[match[1]])
        return ("sign", f"A sign for {_SIGNS[match[1]]}.") if match[1] in _SIGNS else None
    if match := re.match(r"signalflag_(\d|(?!alt|aff)[a-z])", stem):
        return "flag", f"A signal flag for the {'number' if match[1].isdigit() else 'letter'} {match[1].upper()}."
    if match := re.match(r"map_of_([a-z]+)_", stem):
        return "map", f"A map of {match[1].capitalize()}."
    return None


def _country(folder: str, stem: str) -> str | None:
    """The country or the region of a flag's file: "usa_rhode_island" in a folder of regions -> "Rhode Island"."""
    if not re.fullmatch(r"[a-z-]+(_[a-z-]+)*", stem) or _NO_FLAG.search(stem):
        return None
    if folder.count("/") > 2:
        stem = _REGION_OF.sub("", stem)
    small = {"and", "of", "the", "da", "de", "la"}
    return " ".join(word if word in small else word.capitalize() for word in stem.split("_"))


def _thing(folder: str, stem: str) -> tuple[str, str] | None:
    """The noun and the caption of a drawing by the start of its name: of the table, else of a noun at the start."""
    table = words.fixes("names_more.txt")["clipart"]
    starts = [s for s in table if stem.startswith(s) and (len(s) > 6 or not (s[-1] + stem[len(s) :][:1]).isalpha())]
    said = table[max(starts, key=len)] if starts else ""
    if stem in table:
        said = table[stem]
    elif not said and not _ICONS.match(folder):
        parts = [p for p in re.split(r"[^a-z]+", stem) if p]
        match = words.find_noun(parts[:4], last=False, more=True)
        if match and match[1] == 0:
            after = parts[match[2] :][:1]
            other = after and (after[0] in words.fixes()["other things"] or words.find_noun(after, more=True))
            said = "" if other else match[0]
    if said in ("", "-"):
        return None
    noun, _, caption = said.partition(" | ")
    return noun, caption or words.phrase(noun)


def read_more_openclipart(folder: Path) -> list[Source]:
    """Every drawing that the first reader leaves and whose name can be trusted.

    Args:
        folder: The package's `png` folder.

    Returns:
        One source per distinct file, in name order, of the origins `openclipart2` and `symbols`.

    Raises:
        DataError: When the folder is not there or empty.
    """
    first = {s.path for s in read_openclipart(folder)}
    seen = {hashlib.sha256(Path(path).read_bytes()).digest() for path in first}
    found: list[Source] = []
    for file in sorted(folder.rglob("*.png")):
        name = file.relative_to(folder).with_suffix("").as_posix()
        if str(file) in first or _LEFT_OUT.search(name) or file.stat().st_size > 1_500_000:
            continue
        parent, _, stem = name.rpartition("/")
        stem = stem.lower()
        symbol = _symbol(parent, stem)
        if (folder / "transportation/roadsigns" / file.name).is_file() and not stem.startswith("stop"):
            symbol = "road sign", "A road sign."
        said = symbol or _thing(parent, stem)
        if said is None:
            continue
        digest = hashlib.sha256(file.read_bytes()).digest()
        if digest in seen:
            continue
        seen.add(digest)
        noun, caption = said
        origin = "symbols" if symbol else "openclipart2"
        group = re.sub(r"(_?bw|_?[rsn]|[-_]?\d+|_)+$", "", re.sub(r"_bw|\d+", "", stem)) or stem
        group = f"{parent}/{stem}" if symbol or parent.endswith(("stickmen", "smilies")) else group
        country = re.fullmatch(r"The flag of (.*)\.", caption)
        found.append(
            Source(
                key=f"{origin}:{name}",
                origin=origin,
                path=str(file),
                caption=words.sentence(caption),
                noun=noun,
                category=words.lexicon()[noun].category,
                # As the first reader and the flags group, so that their hold-outs hold here.
                group="flags:" + re.sub(r"[^a-z]+", "-", country[1].lower()) if country else f"openclipart:{group}",
                flippable=symbol is None and not parent.startswith("signs"),
                zh_noun=words.zh_nouns().get(noun),
            )
        )
    return found
