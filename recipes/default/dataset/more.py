"""More sources for training: icons, flags, photographs, cards and the drawings whose names the first table lacks.

They join after the first ones and draw their hold-outs by random numbers of their own, so that what the first ones are
judged on stays what it was. What shows the same as something held out there (the same code point in another style, the
same drawing under another number) is held out here too, and what is the same image, or the same photograph as one of
those kept for judging (`judges.py`), is left out.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from recipes.default.dataset import clipart, icons, photos, sources
from recipes.default.dataset.sources import Source

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image as Pictures

ORIGINS = ("icons", "flags", "photos", "cards", "openclipart2", "symbols")
SHARE = {"icons": 0.05, "flags": 0.08, "cards": 0.06, "openclipart2": 0.06, "symbols": 0.04}
SAME = 12.0
"""Root mean square difference of two 16x16 images, of 255, under which they are the same image."""
LICENCES = {
    "gcompris-qt-data": "GPL-3+ / CC-BY-SA",
    "gnome-backgrounds": "CC-BY-SA-3.0",
    "plasma-workspace-wallpapers": "LGPL-3 / CC-BY-SA-4.0",
    "mate-backgrounds": "GPL-2+ / CC-BY-SA-4.0",
    "@iconify-json/fluent-emoji": "MIT",
    "@iconify-json/noto": "Apache-2.0",
    "@iconify-json/twemoji": "CC-BY-4.0",
    "@iconify-json/openmoji": "CC-BY-SA-4.0",
    "@iconify-json/flag": "MIT",
    "cldr-annotations-full": "Unicode-3.0",
    "cldr-localenames-full": "Unicode-3.0",
}


@dataclass(frozen=True)
class Places:
    """Where the packages of the later sources lie."""

    npm: Path = icons.NPM  # each package unpacked under its name without the scope
    gcompris: Path = photos.GCOMPRIS
    openclipart: Path = sources.OPENCLIPART
    root: Path = Path("/")  # of the desktop backgrounds

    @classmethod
    def under(cls, root: Path, npm: Path) -> Places:
        """The packages as get_packages.sh put them: Debian's under the root, npm's in a folder of their own."""
        gcompris, openclipart = (root / path.relative_to("/") for path in (cls.gcompris, cls.openclipart))
        return cls(npm, gcompris, openclipart, root)


def load(source: Source) -> Pictures.Image:
    """The image of an entry inside a package's file, RGBA."""
    return (icons.render if source.origin in ("icons", "flags") else photos.load)(source.path)


def read(places: Places, first: list[Source]) -> list[Source]:
    """Read every later source.

    Args:
        places: Of the packages.
        first: The sources that are there already; icons of Noto that its font gave are not repeated.

    Returns:
        The sources, by origin, not yet measured.

    Raises:
        DataError: A package is missing.
    """
    drawn = {f"icons:noto/{s.key.partition(':')[2]}" for s in first if s.origin == "emoji"}
    return [
        *(s for s in icons.read_icons(places.npm) if s.key not in drawn),
        *icons.read_flags(places.npm),
        *photos.read_photos(places.gcompris),
        *photos.read_cards(places.gcompris),
        *clipart.read_more_openclipart(places.openclipart),
    ]


def npm_versions(npm: Path) -> dict[str, dict[str, str]]:
    """Version and licence of each npm package, as the metadata of a data set names them."""
    return {
        name: {"version": icons.package(npm / name.rpartition("/")[2])["version"], "licence": licence}
        for name, licence in LICENCES.items()
        if name.startswith(("@", "cldr"))
    }


def signature(image: Pictures.Image) -> np.ndarray:
    """16x16 colours of an image on gray: what tells the same image at another size or quality from another one."""
    import numpy as np
    from PIL import Image

    image = image.convert("RGBA")
    ground = Image.new("RGBA", image.size, (128, 128, 128, 255))
    ground.alpha_composite(image)
    small = ground.convert("RGB").resize((16, 16), Image.Resampling.BOX)
    return np.asarray(small, dtype=np.float32).reshape(-1)


def twins(images: np.ndarray, others: np.ndarray) -> np.ndarray:
    """For each signature [n, 768], whether one of the others [m, 768] is the same image."""
    import numpy as np

    if not len(others):
        return np.zeros(len(images), dtype=bool)
    limit = SAME**2 * images.shape[1]
    square = (others**2).sum(1)
    return np.array([bool((square + (one**2).sum() - 2 * (others @ one)).min() < limit) for one in images], dtype=bool)


def split(first: list[Source], new: list[Source], thumbs: list[Path], left_out: list[bool], seed: int) -> list[Source]:
    """Mark which of the later sources are held out.

    Args:
        first: The first sources, measured and split.
        new: The later ones, measured.
        thumbs: The cut-outs of both, in that order.
        left_out: Which of the later ones are for judging only.
        seed: Draws the rest.

    Returns:
        The later sources, in the same order; what is the same image as a held-out one is held out as well.
    """
    import numpy as np
    from PIL import Image

    def signatures(chosen: list[int]) -> np.ndarray:
        found = []
        for i in chosen:
            with Image.open(thumbs[i]) as image:
                found.append(signature(image))
        return np.stack(found) if found else np.zeros((0, 768), np.float32)

    held = {s.group for s in first if s.heldout}
    known = {s.group for s in first}
    for origin in SHARE:
        groups = sorted({s.group for s in new if s.origin == origin} - known)
        random.Random(f"{seed}/heldout/{origin}").shuffle(groups)
        held |= set(groups[: round(len(groups) * SHARE[origin])])
    held |= {s.group for s, out in zip(new, left_out, strict=True) if out}
    judged = [i for i, s in enumerate(first) if s.heldout or s.photo]
    judged += [i for i, s in enumerate(new, len(first)) if s.group in held and s.origin == "photos"]
    alike = [i for i, s in enumerate(new) if s.group not in held and s.origin != "symbols"]
    same = twins(signatures([len(first) + i for i in alike]), signatures(judged))
    twin = {i for i, one in zip(alike, same, strict=True) if one}
    return [replace(s, heldout=s.group in held or i in twin) for i, s in enumerate(new)]
