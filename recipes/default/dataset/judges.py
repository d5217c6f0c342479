"""What the default model is judged by and never trained on: photographs with names written by eye.

Out of Debian's gcompris-qt-data (GPL-3+ and CC-BY-SA; read on the user's machine, nothing of it is shipped): the 33
animals of `erase`, and 30 photographs of other things, drawn once, whatever the seed of a data set.
"""

from __future__ import annotations

import io
import random
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from polymodal.errors import DataError
from recipes.default.dataset.senses.rcc import read_rcc
from recipes.default.dataset.sources import missing

if TYPE_CHECKING:
    from PIL import Image as Pictures

GCOMPRIS = Path("/usr/share/gcompris-qt/rcc")
PHOTOS = 30
NEAR = 10
"""Bits of 64 that two hashes may differ by and still be the same photograph, cropped or scaled."""


@dataclass(frozen=True)
class Judged:
    """A photograph that is asked about."""

    key: str  # photos:activity/name, as the training's reader has it
    answers: tuple[str, ...]
    content: bytes  # its file

    def open(self) -> Pictures.Image:
        """The photograph, RGB."""
        from PIL import Image

        return Image.open(io.BytesIO(self.content)).convert("RGB")


def listed(section: str) -> list[tuple[list[str], tuple[str, ...]]]:
    """The lines of a section of judges.txt: images to choose from, and their accepted answers."""
    lines: list[tuple[list[str], tuple[str, ...]]] = []
    inside = ""
    for line in Path(__file__).with_name("judges.txt").read_text(encoding="utf-8").splitlines():
        if line.startswith("["):
            inside = line.strip("[]")
        elif inside == section and line and not line.startswith("#"):
            images, _, answers = line.partition(" = ")
            lines.append((images.split(), tuple(answers.split(", "))))
    return lines


def animals(root: Path = GCOMPRIS) -> list[Judged]:
    """The animals of `erase`."""
    return _read(root, [(image, answers) for (image,), answers in listed("animals")])


def photos(root: Path = GCOMPRIS) -> list[Judged]:
    """The photographs of other things."""
    # Fixed for good: a seed of its own, so that every data set leaves out the same ones.
    rng = random.Random("judges/photos")
    lines = listed("photos")
    rng.shuffle(lines)
    chosen: list[tuple[str, tuple[str, ...]]] = []
    for images, answers in lines:
        alike = any(answers[0] in others or others[0] in answers for _, others in chosen)
        if len(chosen) < PHOTOS and not alike:
            chosen.append((rng.choice(images), answers))
    return _read(root, sorted(chosen))


def _read(root: Path, wanted: list[tuple[str, tuple[str, ...]]]) -> list[Judged]:
    if not (root / "erase.rcc").is_file():
        raise missing(root / "erase.rcc", "gcompris-qt-data")
    files: dict[str, bytes] = {}
    for name in sorted({image.split("/")[0] for image, _ in wanted}):
        for inside, content in read_rcc(root / f"{name}.rcc").items():
            if inside.endswith(".webp"):
                files[f"{name}/{Path(inside).stem}"] = content
    lost = [image for image, _ in wanted if image not in files]
    if lost:
        raise DataError(f"{root}: no image {lost[0]}; judges.txt was written for gcompris-qt-data 3.1")
    return [Judged(f"photos:{_named(image)}", answers, files[image]) for image, answers in wanted]


def _named(image: str) -> str:
    return re.sub(r"(_2007_02_24_c)?_background$", "", image)
