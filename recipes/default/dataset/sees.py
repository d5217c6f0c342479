"""Images that nobody labelled, and what the vision tower's own classifier says of them.

`python -m recipes.default.dataset.sees` looks at them and prints those where the tower is surer than half of one
ImageNet class. sees.txt keeps that list, split by eye into classes that are right and that are not: what is judged on
stays what it is, and nothing has to be looked at again to leave it out of training.

The images: photographs that are judged anyway (judges.py), drawings of openclipart that the default dataset's first
reader has no name for, by halves (`judge_half`: for judging; training may have the other), and held-out stamps and
drawings of a default dataset, which have a name that no training is told.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from recipes.default.dataset import sources, words

if TYPE_CHECKING:
    from PIL import Image as Pictures

SURE = 0.5
SIDE = 448
_NO_THING = re.compile(
    r"^(shapes|people|special|logos|geography|decorations|computer/(icons|buttons|folders)|transportation/(aiga|roadsigns)|"
    r"signs_and_symbols(?!/(weather|clocks|money))|recreation/games/cards/|recreation/religion)"
)
"""Folders of signs, ornaments and people: nothing there is a thing that a class of ImageNet names."""


def judge_half(group: str) -> bool:
    """Whether unlabelled images of this group belong to judging; training may use the others."""
    return hashlib.sha256(group.encode()).digest()[0] % 2 == 0


def unlabelled(folder: Path = sources.OPENCLIPART) -> dict[str, Path]:
    """The drawings of openclipart that the default dataset's first reader has no name for, by key."""
    read = sources.read_openclipart(folder)
    named, groups = {source.key for source in read}, {source.group for source in read}
    found: dict[str, Path] = {}
    seen = {_digest(Path(source.path)) for source in read}
    for file in sorted(folder.rglob("*.png")):
        name = file.relative_to(folder).with_suffix("").as_posix()
        key = f"openclipart:{name}"
        if key in named or _NO_THING.search(name) or file.stat().st_size > 1_500_000:
            continue
        digest = _digest(file)
        if digest not in seen and group_of(key) not in groups:
            seen.add(digest)
            found[key] = file
    return found


def _digest(file: Path) -> bytes:
    return hashlib.sha256(file.read_bytes()).digest()


def group_of(key: str) -> str:
    """A drawing's group: its name without folder, number and what marks a variant, as the first reader has it."""
    stem = key.rpartition("/")[2].lower()
    return "openclipart:" + re.sub(r"(_?bw|_?[rsn]|[-_]?\d+|_)+$", "", re.sub(r"_bw|\d+", "", stem))


def accepted(name: str) -> list[str]:
    """What an answer may say of an image of an ImageNet class: its name, synonyms and parents that are no group."""
    return [*words.names_of(name), *filter(None, listed("also").get(name, "").split(", "))]


def file_of(key: str, stamps: Path = sources.STAMPS, openclipart: Path = sources.OPENCLIPART) -> Path:
    """The file of a stamp or a drawing, by its key."""
    origin, _, name = key.partition(":")
    file = (stamps if origin == "stamps" else openclipart) / f"{name}.png"
    if not file.is_file():
        raise sources.missing(file, "tuxpaint-stamps-default" if origin == "stamps" else "openclipart-png")
    return file


def on_white(file: Path) -> Pictures.Image:
    """A drawing on a white ground, cut to what it shows."""
    from PIL import Image

    with Image.open(file) as opened:
        image = opened.convert("RGBA")
    image = image.crop(image.getchannel("A").getbbox() or (0, 0, *image.size))
    image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    ground = Image.new("RGB", (round(image.width * 1.1) + 1, round(image.height * 1.1) + 1), (255, 255, 255))
    ground.paste(image, ((ground.width - image.width) // 2, (ground.height - image.height) // 2), image)
    return ground


def padded(image: Pictures.Image, side: int = 224) -> Pictures.Image:
    """The image on a white square, as the default model's processor gives it to its tower."""
    from PIL import Image

    longer = max(image.size)
    square = Image.new("RGB", (longer, longer), (255, 255, 255))
    square.paste(image, ((longer - image.width) // 2, (longer - image.height) // 2))
    return square.resize((side, side), Image.Resampling.BICUBIC)


def listed(section: str) -> dict[str, str]:
    """A section of sees.txt: the tower's class by the image's key."""
    found: dict[str, str] = {}
    inside = ""
    for line in Path(__file__).with_name("sees.txt").read_text(encoding="utf-8").splitlines():
        if line.startswith("["):
            inside = line.strip("[]")
        elif inside == section and " = " in line and not line.startswith("#"):
            key, _, name = line.partition(" = ")
            found[key] = name
    return found


def look(images: Iterator[tuple[str, Pictures.Image]], batch: int = 16) -> Iterator[tuple[str, str, float]]:
    """The tower's first class of every image, and how sure it is."""
    import numpy as np
    import torch

    from polymodal.modeling.encoders import efficientnet as tower
    from polymodal.utils.files import shipped_folder

    folder = shipped_folder() / "efficientnet_lite0"
    classes = (folder / tower.CLASSES_FILE).read_text(encoding="utf-8").splitlines()
    network = tower.load_efficientnet_lite0(folder / tower.WEIGHTS_FILE)
    mean, std = 255 * tower.PIXEL_MEAN[0], 255 * tower.PIXEL_STD[0]
    while taken := list(itertools.islice(images, batch)):
        pixels = torch.stack([torch.from_numpy(np.array(padded(image))).permute(2, 0, 1) for _, image in taken])
        with torch.inference_mode():
            sure = network.logits(network((pixels.float() - mean) / std)["head"]).softmax(-1)
        for (key, _), row in zip(taken, sure, strict=True):
            best = int(row.argmax())
            yield key, classes[best], float(row[best])


def main(argv: Sequence[str] | None = None) -> int:
    """Print what the tower is sure of."""
    from recipes.default.dataset import judges

    parser = argparse.ArgumentParser(prog="python -m recipes.default.dataset.sees", description=__doc__.split("\n")[0])
    parser.add_argument("default", type=Path, help="a default dataset; what it holds out is looked at too")
    held_out = judges.held_out(parser.parse_args(argv).default)

    def images() -> Iterator[tuple[str, Pictures.Image]]:
        for one in (*judges.animals(), *judges.photos()):
            yield one.key, one.open()
        for key, file in unlabelled().items():
            if judge_half(group_of(key)):
                yield key, on_white(file)
        for key in sorted(held_out):
            if key.startswith(("stamps:", "openclipart:")):
                yield key, on_white(file_of(key))

    for key, name, sure in look(images()):
        if sure > SURE:
            print(f"{key} = {name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
