"""Image towers compared on frozen features alone: k-NN and linear probe on held-out images, and speed.

    python -m recipes.default.dataset pairs --output data/pairs
    python -m benchmarks.towers data/pairs efficientnet_lite0 vit_small

Learnt from are the single things of data/pairs/train.json, at most --views images of each; asked is for the held-out
things of classes.json, none of which was trained on: their group (animal, food, ...) and their name, where a training
image has the same name. A tower is one of the package (efficientnet_lite0, vit_small), or a folder of SigLIP, CLIP or
DINOv2. Its features are the mean over its patches, from the last layer before the final norm (EfficientNet: its head).
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from polymodal.config import ImageConfig, VisionConfig
from polymodal.errors import ConfigError, DataError, PolymodalError
from polymodal.media.image import open_image
from polymodal.media_plan import Size, plan_image
from polymodal.metrics.intervals import mean_interval
from polymodal.metrics.linear_probe import Labelled, knn, linear_probe
from polymodal.modeling.encoders.efficientnet import PIXEL_MEAN, PIXEL_STD
from polymodal.modeling.encoders.vision import build_vision_encoder
from polymodal.processing.image_config_hf import image_config_from_hf
from polymodal.processing.image_transform import make_tiles
from polymodal.utils.files import shipped
from polymodal.utils.threads import ahead

EFFICIENTNET = "efficientnet_lite0"


@dataclass(frozen=True)
class Shown:
    """An image and what it shows."""

    path: Path
    noun: str
    category: str
    thing: str


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.towers", description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, help="the folder of `python -m recipes.default.dataset pairs`")
    parser.add_argument("towers", nargs="+", help="efficientnet_lite0, vit_small, or a model folder")
    parser.add_argument("--views", type=int, default=4, metavar="N", help="training images of a thing (default 4)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here")
    options = parser.parse_args(argv)
    try:
        train, test = read_images(options.data, options.views)
        rows = [compare(tower, train, test) for tower in options.towers]
    except PolymodalError as error:
        print(f"towers: {error}", file=sys.stderr)
        return 1
    print(f"{len(train)} training images, {len(test)} held-out ones\n")
    print(table(rows))
    if options.json is not None:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")
    return 0


def read_images(folder: Path, views: int) -> tuple[list[Shown], list[Shown]]:
    """Training and held-out images of single things whose group is known."""
    try:
        records = json.loads((folder / "train.json").read_text(encoding="utf-8"))
        tasks = json.loads((folder / "classes.json").read_text(encoding="utf-8"))["tasks"]
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{folder}: no dataset of `python -m recipes.default.dataset pairs` ({error})") from error
    seen: Counter[str] = Counter()
    train: list[Shown] = []
    groups: dict[str, str] = {}
    for record in records:
        if "noun" not in record:
            continue
        thing = record["sources"][0]
        groups[record["noun"]] = record["category"]
        seen[thing] += 1
        if seen[thing] <= views:
            train.append(Shown(folder / record["image"], record["noun"], record["category"], thing))
    held_out: dict[str, Shown] = {}
    for task in tasks:
        for entry in task["pictures"]:
            if entry["noun"] in groups:
                group = groups[entry["noun"]]
                held_out[entry["image"]] = Shown(folder / entry["image"], entry["noun"], group, entry["sources"][0])
    if not train or not held_out:
        raise DataError(f"{folder}: no images of single things to compare towers on")
    return train, list(held_out.values())


def load_tower(name: str) -> tuple[Any, ImageConfig]:
    """A tower and its image rules."""
    if name == EFFICIENTNET:
        rules = ImageConfig(
            image_aspect_ratio="squash", tile_size=(224, 224), image_mean=PIXEL_MEAN, image_std=PIXEL_STD
        )
        return build_vision_encoder(VisionConfig(vision_tower=name, type=name, stages=("head",), pool=7)), rules
    folder = shipped(name) or Path(name)
    config = folder / "config.json"
    if not config.is_file():
        raise ConfigError(f"{name}: neither {EFFICIENTNET} nor a model folder")
    kind = json.loads(config.read_text(encoding="utf-8")).get("model_type", "").removesuffix("_vision_model")
    vision = VisionConfig(vision_tower=name, type=kind, mm_vision_select_layer=-1)
    rules = image_config_from_hf(json.loads((folder / "preprocessor_config.json").read_text(encoding="utf-8")))
    encoder: Any = build_vision_encoder(vision, tile=Size(*rules.tile_size))
    return encoder.float(), rules  # a CPU has no arithmetic in float16


@torch.no_grad()
def encode(encoder: Any, rules: ImageConfig, images: list[Shown]) -> tuple[torch.Tensor, float]:
    """[N, E] mean features, and the seconds that the tower took."""

    def tile(shown: Shown) -> torch.Tensor:
        image = open_image(shown.path)
        plan = plan_image(Size(image.height, image.width), rules, Size(1, 1))
        return torch.from_numpy(make_tiles(image, plan, rules)[0])

    found, waiting, spent = [], [], 0.0
    for number, one in enumerate(ahead(tile, images, 2), 1):
        waiting.append(one)
        if len(waiting) == 8 or number == len(images):
            start = time.perf_counter()
            found.append(encoder(torch.stack(waiting).to(next(encoder.parameters()).dtype)).float().mean(dim=1))
            spent += time.perf_counter() - start
            waiting = []
    return torch.cat(found), spent


def compare(name: str, train: list[Shown], test: list[Shown]) -> dict[str, Any]:
    """All figures of one tower."""
    encoder, rules = load_tower(name)
    known, seconds = encode(encoder, rules, train)
    asked, more = encode(encoder, rules, test)
    row: dict[str, Any] = {
        "tower": name,
        "parameters": sum(p.numel() for p in encoder.parameters()) + sum(b.numel() for b in encoder.buffers()),
        "images_per_s": (len(train) + len(test)) / (seconds + more),
    }
    for what in ("category", "noun"):
        names = sorted({getattr(shown, what) for shown in train})
        number = {text: i for i, text in enumerate(names)}
        keep = [i for i, shown in enumerate(test) if getattr(shown, what) in number]
        learn = Labelled(known, torch.tensor([number[getattr(s, what)] for s in train]), [s.thing for s in train])
        ask = Labelled(asked[keep], torch.tensor([number[getattr(test[i], what)] for i in keep]))
        most = Counter(learn.labels.tolist()).most_common(1)[0][0]
        row[what] = {"images": len(keep), "classes": len(names), "majority": float((ask.labels == most).float().mean())}
        for method, score in (("knn", knn), ("linear", linear_probe)):
            right = score(learn, ask).double().numpy()
            row[what][method] = {"score": float(right.mean()), "interval": mean_interval(right)}
    return row


def table(rows: list[dict[str, Any]]) -> str:
    """The figures as a Markdown table."""
    lines = [
        "| tower | numbers | images/s | of | k-NN | 95% | linear | 95% | majority |",
        "|---|--:|--:|---|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        for what in ("category", "noun"):
            found = row[what]
            shown = [
                f"{found[m]['score']:.1%} | {found[m]['interval'][0]:.1%} to {found[m]['interval'][1]:.1%}"
                for m in ("knn", "linear")
            ]
            lines.append(
                f"| {row['tower']} | {row['parameters'] / 1e6:.1f} M | {row['images_per_s']:.0f} "
                f"| {what}, {found['images']} of {found['classes']} | {shown[0]} | {shown[1]} "
                f"| {found['majority']:.1%} |"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
