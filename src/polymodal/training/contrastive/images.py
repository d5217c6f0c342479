"""The images of a pair stage as small byte rasters: each decoded once, kept where asked for, cut and mirrored.

Without a cut a raster is the tile itself. With it, the raster is the whole image, squeezed to a square larger
than the tile, and each view takes a part of it: a cut is then never enlarged by much, all rasters have one shape and
lie in one file, and what training sees does not depend on whether they are kept. The part is drawn in the image's
own proportions, as if it were cut from the original.

An image's key is a hash of its pixels and the image rules; two files with the same pixels are one image.
"""

import hashlib
import json
import math
import os
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image as PILImage

from polymodal.config import ImageConfig
from polymodal.errors import DataError, MediaError
from polymodal.media.image import open_image
from polymodal.media_plan import Size, plan_image
from polymodal.messages import Source
from polymodal.processing.image_transform import resize_filter, tile_bytes
from polymodal.processing.media_parts import image_key
from polymodal.training.contrastive.augment import crop_box
from polymodal.training.feature_cache import MEMORY, OFF, FeatureStore
from polymodal.training.recipes.contrastive import AugmentConfig
from polymodal.utils.files import make_folder, writing
from polymodal.utils.progress import progress
from polymodal.utils.threads import ahead

LARGEST = 2.0
"""A raster's side is at most so many times the tile's."""


@dataclass(frozen=True)
class ImageMetadata:
    """An image that was decoded once."""

    key: str  # Hash of its pixels and the image rules
    height: int  # In pixels
    width: int  # In pixels


@dataclass
class Images:
    """Sources to rasters and tiles."""

    image: ImageConfig  # The image rules
    augment: AugmentConfig  # What is done to images
    store: FeatureStore | None = None  # Kept rasters, or None
    metadata: dict[str, ImageMetadata] = field(default_factory=dict)  # By `source_name`

    def tile(self, source: Source, numbers: np.ndarray | None = None, mirrored: bool = False) -> np.ndarray:
        """One view of an image."""
        # -> [3, H, W]
        whole = crops(self.augment)
        if whole and numbers is not None:
            raster = self._decoded(source, True) if self.store is None else self._kept(source)
            tile = self._cut(raster, self.metadata[source_name(source)], numbers)
        else:
            tile = self._decoded(source, False) if whole or self.store is None else self._kept(source)
        return np.ascontiguousarray(tile[:, :, ::-1]) if mirrored else tile

    def raster(self, image: PILImage.Image, whole: bool) -> np.ndarray:  # -> [3, H, W]
        """A decoded image as bytes."""
        if whole:
            height, width = raster_size(self.image, self.augment)
            squeezed = image.resize((width, height), resize_filter(self.image))
            return np.ascontiguousarray(np.asarray(squeezed).transpose(2, 0, 1))
        plan = plan_image(Size(image.height, image.width), self.image, Size(1, 1))
        return tile_bytes(image, plan, self.image)[0]

    def open(self, source: Source) -> PILImage.Image:
        """Decode an image under the rules' limits."""
        return open_image(source, background=self.image.background, max_pixels=self.image.max_pixels)

    def _decoded(self, source: Source, whole: bool) -> np.ndarray:
        image = self.open(source)
        if image_key(image, self.image) != self.metadata[source_name(source)].key:
            raise DataError(f"image {source!r} changed on disk while training")
        return self.raster(image, whole)

    def _kept(self, source: Source) -> np.ndarray:
        assert self.store is not None
        found = self.store.gather([self.metadata[source_name(source)].key])
        assert found is not None
        return found[0].numpy()

    def _cut(self, raster: np.ndarray, seen: ImageMetadata, numbers: np.ndarray) -> np.ndarray:
        left, top, right, bottom = crop_box(numbers, seen.height, seen.width, self.augment)
        _, height, width = raster.shape
        image = PILImage.fromarray(np.ascontiguousarray(raster.transpose(1, 2, 0)))
        box = (left * width, top * height, right * width, bottom * height)
        tile = image.resize((self.image.tile_size[1], self.image.tile_size[0]), resize_filter(self.image), box=box)
        return np.ascontiguousarray(np.asarray(tile).transpose(2, 0, 1))


def raster_size(image: ImageConfig, augment: AugmentConfig) -> tuple[int, int]:
    """Height and width of a kept image: the tile, or so much more that the smallest cut has the tile's pixels."""
    if not crops(augment):
        return image.tile_size
    factor = min(LARGEST, 1 / math.sqrt(augment.scale[0]))
    return round(image.tile_size[0] * factor), round(image.tile_size[1] * factor)


def crops(augment: AugmentConfig) -> bool:
    """Whether images are cut, and not only mirrored."""
    return augment.type != "none" and augment.scale[0] < 1


def open_images(image: ImageConfig, augment: AugmentConfig, where: str) -> Images:
    """Prepare images, with what an earlier run kept of them."""
    if where == OFF:
        return Images(image, augment)
    height, width = raster_size(image, augment)
    kind = "whole" if crops(augment) else "tile"
    folder = None if where == MEMORY else Path(where) / f"{kind}-{height}x{width}"
    return Images(image, augment, FeatureStore(folder, (3, height, width), "uint8"))


def scan(
    images: Images, sources: Iterable[Source], index: Path | None, workers: int, label: str
) -> dict[str, MediaError]:
    """Decode every image that is not in the index yet, keep its raster where asked for, and index it."""
    with nullcontext() if images.store is None else images.store.locked():
        return _scan(images, {source_name(source): source for source in sources}, index, workers, label)


def _scan(
    images: Images, distinct: dict[str, Source], index: Path | None, workers: int, label: str
) -> dict[str, MediaError]:
    store, whole = images.store, crops(images.augment)
    before = _read_index(index)
    found = {name: before.get((name, _stamp(source))) for name, source in distinct.items()}
    images.metadata |= {name: entry for name, entry in found.items() if entry is not None}
    todo = [
        (name, source)
        for name, source in distinct.items()
        if (entry := found[name]) is None or (store is not None and entry.key not in store.where)
    ]
    faults: dict[str, MediaError] = {}
    lines: list[str] = []
    waiting: dict[str, np.ndarray] = {}

    def decode(item: tuple[str, Source]) -> tuple[ImageMetadata, np.ndarray | None] | MediaError:
        try:
            image = images.open(item[1])
        except MediaError as error:
            return error
        seen = ImageMetadata(image_key(image, images.image), image.height, image.width)
        wanted = store is not None and seen.key not in store.where
        return seen, images.raster(image, whole) if wanted else None

    results = zip(todo, ahead(decode, todo, workers), strict=True)
    for (name, source), result in progress(results, label, len(todo)):
        if isinstance(result, MediaError):
            faults[name] = result
            continue
        seen, raster = result
        images.metadata[name] = seen
        if raster is not None and store is not None and seen.key not in store.where:
            waiting[seen.key] = raster
            if len(waiting) >= 256:
                _keep(store, waiting)
        lines.append(json.dumps([name, _stamp(source), seen.key, seen.height, seen.width]) + "\n")
    if store is not None:
        _keep(store, waiting)
    if index is not None and lines:
        make_folder(index.parent)
        with writing(index), index.open("a", encoding="utf-8") as file:
            file.writelines(lines)
    return faults


def source_name(source: Source) -> str:
    """What an image's source is called in the index; bytes and images in memory by their content."""
    if isinstance(source, bytes | bytearray | memoryview):
        return f"bytes {hashlib.sha256(source).hexdigest()}"
    if isinstance(source, PILImage.Image):
        return f"image {source.mode} {source.size} {hashlib.sha256(source.tobytes()).hexdigest()}"
    return str(source) if isinstance(source, str | Path) else repr(source)


def _keep(store: FeatureStore, waiting: dict[str, np.ndarray]) -> None:
    if waiting:
        store.add([(key, raster[None]) for key, raster in waiting.items()])
        waiting.clear()


def _stamp(source: Source) -> str:
    """Size and time of the file that an image lies in; "" where it lies in none."""
    path: Any = getattr(source, "path", source)
    if not isinstance(path, str | Path) or str(path)[:5].lower() == "data:":
        return ""
    try:
        found = os.stat(path)
    except (OSError, ValueError):
        return ""
    return f"{found.st_size} {found.st_mtime_ns}"


def _read_index(index: Path | None) -> dict[tuple[str, str], ImageMetadata]:
    """Read what earlier runs found; a line that a crash cut short is passed over."""
    found: dict[tuple[str, str], ImageMetadata] = {}
    if index is None or not index.is_file():
        return found
    for line in index.read_text(encoding="utf-8").splitlines():
        try:
            name, stamp, key, height, width = json.loads(line)
        except ValueError:
            continue
        found[(name, stamp)] = ImageMetadata(key, height, width)
    return found


def index_file(folder: Path, image: ImageConfig) -> Path:
    """Where the metadata of images under these rules is kept."""
    rules = hashlib.sha256(image.model_dump_json().encode()).hexdigest()[:16]
    return folder / f"images-{rules}.jsonl"


def image_numbers(keys: Sequence[str]) -> np.ndarray:
    """Images' keys as [n] int64 ids; equal exactly for equal pixels."""
    return np.array([int(key[:16], 16) for key in keys], dtype=np.uint64).astype(np.int64)
