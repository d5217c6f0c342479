"""What the default model is judged by and never trained on, `python -m recipes.default.dataset judges`.

`animals.json` and `photos.json`: photographs of Debian's gcompris-qt-data that fill the frame (GPL-3+ and CC-BY-SA;
read on the user's machine, nothing of it is shipped), with names written by eye in judges.txt. `sees.json`: images that
nobody labelled, or whose name no training is told, for which the vision tower is surer than half of one class; right is
that class, its synonyms and parents (kind `sees`; `mistaken` where the tower is wrong by eye). `unsure.json`: as many
images with nothing to name as clear ones; `python -m recipes.default.dataset.unsure` tells from the answers how often
"I am not sure" was right. Photographs and drawings are the same whatever the seed of a dataset; stamps are asked about
where it holds them out. `judged` names what every new reader of training images leaves out, copies elsewhere included.
"""

from __future__ import annotations

import hashlib
import io
import json
import random
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from polymodal.errors import DataError
from recipes.default.dataset import sees, sources
from recipes.default.dataset.generate import Packages, new_data_set
from recipes.default.dataset.plan import IMAGE, Record
from recipes.default.dataset.senses.rcc import read_rcc
from recipes.default.dataset.sources import missing
from recipes.default.dataset.unsure import NOT_SURE, blurred, nothing

if TYPE_CHECKING:
    from PIL import Image as Pictures

GCOMPRIS = Path("/usr/share/gcompris-qt/rcc")
EXAMPLES = Path(__file__).parents[3] / "examples" / "pictures"
PHOTOS, NOTHING, BLURRED = 30, 30, 24
SIDE = 640
ASKED = "What is this?"
NEAR = {"photos": 10, "openclipart": 3}
"""Bits of 64 by which the hashes of two images may differ and be copies; drawings have few shades."""


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


@dataclass(frozen=True)
class LeftOut:
    """An image that training must not show: by its key, or as a copy by its hash."""

    key: str
    hash: int  # 64 bits, of `hash_of`

    def copied(self, other: int, mirrored: int) -> bool:
        """Whether an image of these two hashes, its own and that of its mirror image, is a copy."""
        near = NEAR.get(self.key.split(":")[0], NEAR["photos"])
        return min((self.hash ^ other).bit_count(), (self.hash ^ mirrored).bit_count()) <= near


def build_judges(
    output: Path, *, default: Path, packages: Packages | None = None, gcompris: Path = GCOMPRIS, force: bool = False
) -> str:
    """Write the four files and their images; a line of counts. `default` says which stamps and drawings it held out."""
    output, places, held = Path(output), packages or Packages(), held_out(default)
    files: dict[str, list[Record]] = {}
    with new_data_set(output, workers=1, force=force) as (_, root):

        def add(file: str, image: Pictures.Image, kind: str, answers: Sequence[str], key: str) -> None:
            records = files.setdefault(file, [])
            name = f"{file}-{len(records):03d}"
            image.thumbnail((SIDE, SIDE))
            image.save(root / "images" / f"{name}.jpg", quality=92)
            records.append(_record(name, kind, answers, key))

        photographs = {"animals": animals(gcompris), "photos": photos(gcompris)}
        for file, taken in photographs.items():
            for one in taken:
                add(file, one.open(), "name", one.answers, one.key)
        known = {one.key: one for taken in photographs.values() for one in taken}
        taught = {source.key for source in sources.read_openclipart(places.openclipart)}

        def drawing(key: str) -> Pictures.Image:
            return sees.on_white(sees.file_of(key, places.stamps, places.openclipart))

        clear: dict[str, list[str]] = {}
        for section, kind in (("right", "sees"), ("wrong", "mistaken")):
            for key, name in sees.listed(section).items():
                if (key.startswith("stamps:") or key in taught) and key not in held:
                    continue
                add("sees", known[key].open() if key in known else drawing(key), kind, sees.accepted(name), key)
                if kind == "sees":
                    clear[key] = [*sees.accepted(name), *(known[key].answers if key in known else ())]
        rng = random.Random("judges/unsure")
        for number in range(NOTHING):
            add("unsure", nothing(rng), "unsure", NOT_SURE, f"drawn:{number}")
        for one in rng.sample(list(known.values()), BLURRED):
            add("unsure", blurred(one.open()), "unsure", NOT_SURE, one.key)
        for key in sees.listed("dim"):
            add("unsure", drawing(key), "unsure", NOT_SURE, key)
        for key in rng.sample(sorted(clear), min(len(clear), len(files["unsure"]))):
            image = known[key].open() if key in known else drawing(key)
            add("unsure", image, "clear", list(dict.fromkeys(clear[key])), key)
        hashes = {}
        for file, records in files.items():
            text = json.dumps(records, ensure_ascii=False, indent=0) + "\n"
            (root / f"{file}.json").write_text(text, encoding="utf-8")
            hashes[f"{file}.json"] = hashlib.sha256(text.encode()).hexdigest()
        about = {"records": {file: len(records) for file, records in files.items()}, "sha256": hashes}
        (root / "build.json").write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
    return f"{output}: " + ", ".join(f"{len(records)} {file}" for file, records in files.items())


def held_out(default: Path) -> frozenset[str]:
    """The keys that a default dataset holds out."""
    file = default / "build.json"
    try:
        return frozenset(json.loads(file.read_text(encoding="utf-8"))["heldout_sources"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{file}: no default dataset ({error}); make it first, or name one with --default") from None


def _record(name: str, kind: str, answers: Sequence[str], key: str) -> Record:
    best = answers[0][:1].upper() + answers[0][1:]
    turns = [{"from": "human", "value": f"{IMAGE}\n{ASKED}"}, {"from": "gpt", "value": best}]
    return {
        "id": name,
        "image": f"images/{name}.jpg",
        "conversations": turns,
        "kind": kind,
        "prompt": ASKED,
        "answers": list(answers),
        "kinds": [kind],
        "source": key.split(":")[0],
        "sources": [key],
    }


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
    """The photographs of other things, at most one a noun."""
    # Fixed for good: a seed of its own, so that every dataset leaves out the same ones.
    rng = random.Random("judges/photos")
    lines = listed("photos")
    rng.shuffle(lines)
    chosen: list[tuple[str, tuple[str, ...]]] = []
    for images, answers in lines:
        alike = any(answers[0] in others or others[0] in answers for _, others in chosen)
        if len(chosen) < PHOTOS and not alike:
            chosen.append((rng.choice(images), answers))
    return _read(root, sorted(chosen))


def judged(gcompris: Path = GCOMPRIS, openclipart: Path = sources.OPENCLIPART) -> list[LeftOut]:
    """What every new reader of training images leaves out: what is judged, and the package's example images."""
    known = {one.key: one.open() for one in (*animals(gcompris), *photos(gcompris))}
    taught = {source.key for source in sources.read_openclipart(openclipart)}
    for key in (*sees.listed("right"), *sees.listed("wrong"), *sees.listed("dim")):
        # What the first readers name is held out by groups already, or trained on and then not asked about.
        if key not in known and key not in taught and not key.startswith("stamps:"):
            known[key] = sees.on_white(sees.file_of(key, openclipart=openclipart))
    for file in sorted(EXAMPLES.glob("*.png")):
        known[f"openclipart:{file.stem}"] = sees.on_white(file)
    return [LeftOut(key, hash_of(image)) for key, image in known.items()]


def is_judged(key: str, image: Pictures.Image, left_out: Iterable[LeftOut]) -> bool:
    """Whether an image, on white where it is a cut-out, is one of those left out, or a copy of one."""
    from PIL import ImageOps

    own, mirrored = hash_of(image), hash_of(ImageOps.mirror(image))
    return any(one.key == key or one.copied(own, mirrored) for one in left_out)


def hash_of(image: Pictures.Image) -> int:
    """Which of 8 x 8 cells are lighter than their right neighbours: alike for copies of any size and quality."""
    import numpy as np
    from PIL import Image

    cells = np.asarray(image.convert("L").resize((9, 8), Image.Resampling.BOX), dtype=int)
    bits = (cells[:, :-1] > cells[:, 1:]).flatten()
    return int("".join("01"[int(bit)] for bit in bits), 2)


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
