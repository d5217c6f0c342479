"""Images that nobody labelled, and what the vision tower's own classifier says of them.

`python -m recipes.default.dataset.sees` looks at them and prints the lines of `sees.txt`: [sees] where the tower is surer
than half of one ImageNet class, [dim] where no class has a tenth. The file is kept, so that what is judged on stays
what it is, and so that nothing has to be looked at again to leave it out of training.

The images: photographs that are judged anyway (judges.py), and the drawings of openclipart that no reader of the
default dataset had a name for, by halves: `judge_half` is for judging, training may have the other.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from recipes.default.dataset import sources, words

if TYPE_CHECKING:
    from PIL import Image as Pictures

SURE, DIM = 0.5, 0.1
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
    named = {source.key for source in sources.read_openclipart(folder)}
    found: dict[str, Path] = {}
    seen: set[bytes] = set()
    for file in sorted(folder.rglob("*.png")):
        name = file.relative_to(folder).with_suffix("").as_posix()
        key = f"openclipart:{name}"
        if key in named or _NO_THING.search(name) or file.stat().st_size > 1_500_000:
            continue
        digest = hashlib.sha256(file.read_bytes()).digest()
        if digest not in seen:
            seen.add(digest)
            found[key] = file
    return found


def group_of(key: str) -> str:
    """A drawing's group: its name without folder, number and what marks a variant, as the first reader has it."""
    stem = key.rpartition("/")[2].lower()
    return "openclipart:" + re.sub(r"(_?bw|_?[rsn]|[-_]?\d+|_)+$", "", re.sub(r"_bw|\d+", "", stem))


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


def accepted(name: str) -> list[str]:
    """What an answer may say of an image of an ImageNet class: its name, synonyms and parents that are no group."""
    return words.names_of(name)


def look(images: Iterator[tuple[str, Pictures.Image]], batch: int = 16) -> Iterator[tuple[str, str, float]]:
    """The tower's first class of every image, and how sure it is."""
    import itertools

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


def main() -> None:
    """Print the lines of sees.txt."""
    from recipes.default.dataset import judges

    def images() -> Iterator[tuple[str, Pictures.Image]]:
        for one in (*judges.animals(), *judges.photos()):
            yield one.key, one.open()
        for key, file in unlabelled().items():
            if judge_half(group_of(key)):
                yield key, on_white(file)

    found = list(look(images()))
    for title, wanted in (("sees", [f for f in found if f[2] > SURE]), ("dim", [f for f in found if f[2] < DIM])):
        print(f"[{title}]")
        print("\n".join(f"{key} = {name}" for key, name, _ in sorted(wanted)))


if __name__ == "__main__":
    main()
