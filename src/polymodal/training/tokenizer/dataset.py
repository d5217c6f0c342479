"""The images of a tokenizer's recipe: those of records, whoever shows them, or the files of a folder."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from polymodal.config import ImageConfig
from polymodal.data.index import Reading
from polymodal.data.load import row_record
from polymodal.data.mixture import epoch_repeats
from polymodal.data.readers.base import KINDS
from polymodal.data.readers.registry import detect_format
from polymodal.errors import DataError, PolymodalError
from polymodal.messages import Image, Source
from polymodal.training.contrastive.images import Images, index_file, open_images, scan, source_name
from polymodal.training.recipes.contrastive import AugmentConfig
from polymodal.training.recipes.sections import SourceConfig
from polymodal.training.recipes.tokenizer import TokenizerRecipe
from polymodal.training.task import read_mix
from polymodal.utils.files import write_text
from polymodal.utils.progress import log


@dataclass(frozen=True)
class ImageDataset:
    """Images by number, each once in its source of the mix."""

    images: Images
    sources: tuple[Source, ...]  # [n]
    spans: tuple[tuple[str, range], ...]  # Name of each source of the mix, and its images
    mixture: tuple[tuple[range, float], ...]  # The same with `repeat`
    fingerprint: str  # Hash of all pixels; a resumed run must see the same

    def __len__(self) -> int:
        return len(self.sources)

    def pixels(self, indices: Sequence[int] | np.ndarray) -> torch.Tensor:  # -> [N, 3, H, W] uint8
        """Some images."""
        return torch.from_numpy(np.stack([self.images.tile(self.sources[index]) for index in indices]))


def read_images(mix: Sequence[SourceConfig], recipe: TokenizerRecipe, side: int, skipped_file: Path) -> ImageDataset:
    """List all images, decode each once, and leave out what cannot be used where the recipe says so."""
    data = recipe.data
    rules = ImageConfig(
        image_aspect_ratio=data.image_aspect_ratio,
        tile_size=(side, side),
        image_mean=(0.5, 0.5, 0.5),
        image_std=(0.5, 0.5, 0.5),
        pad_color=(255, 255, 255),
    )
    images = open_images(rules, AugmentConfig(), data.tile_cache)
    faults: list[dict[str, str]] = []

    def leave_out(name: str, error: PolymodalError) -> None:
        if data.on_error != "skip":
            raise error
        faults.append({"id": name, "error": str(error)})

    readings = read_mix(data.model_copy(update={"mix": tuple(mix)}), recipe.run.seed)
    found = [dict(_listed(reading, leave_out)) for reading, _ in readings]
    folder = Path(data.index) if data.index is not None else skipped_file.parent / "index"
    everything = [source for named in found for source in named.values()]
    broken = scan(images, everything, index_file(folder, rules), recipe.run.workers, "reading images")
    for name, fault in broken.items():
        leave_out(name, fault)
    if faults:
        write_text(skipped_file, "".join(json.dumps(fault, ensure_ascii=False) + "\n" for fault in faults))
        log(f"left out {len(faults)} images or records that cannot be used, listed in {skipped_file}")
    # Two files with the same pixels are one image.
    kept = [{images.metadata[name].key: s for name, s in named.items() if name not in broken} for named in found]
    for source, named in zip(mix, kept, strict=True):
        if not named:
            raise DataError(f"{source.path}: no image in it; name a folder of images, or records that show some")
    ends = np.cumsum([len(named) for named in kept]).tolist()
    spans = [range(end - len(named), end) for end, named in zip(ends, kept, strict=True)]
    given = [source.weight for source in mix] if any(source.weight is not None for source in mix) else None
    repeats = epoch_repeats([len(span) for span in spans], [repeat for _, repeat in readings], given)
    labels = [source.source or Path(source.path).stem for source in mix]
    return ImageDataset(
        images,
        tuple(source for named in kept for source in named.values()),
        tuple(zip(labels, spans, strict=True)),
        tuple(zip(spans, repeats, strict=True)),
        hashlib.sha256("".join(key for named in kept for key in named).encode()).hexdigest(),
    )


def _listed(reading: Reading, leave_out: Callable[[str, PolymodalError], None]) -> Iterator[tuple[str, Source]]:
    """The images of a source with their names; of `max_samples` as many, drawn by the run's seed."""
    if reading.path.is_dir() and detect_format(reading.path) == "folder":
        files = sorted(path for path in reading.path.rglob("*") if KINDS.get(path.suffix.lower()) == "image")
        found: dict[str, Source] = {source_name(path): path for path in files}
    else:
        found = {}
        for row in reading.rows():
            try:
                media = [part for message in row_record(row).messages for part in message.media]
            except PolymodalError as error:
                leave_out(str(row.id), error)
                continue
            found |= {source_name(part.source): part.source for part in media if isinstance(part, Image)}
    names = list(found)
    if reading.draw is not None and reading.draw[0] < len(names):
        chosen = np.random.default_rng(reading.draw[1]).permutation(len(names))[: reading.draw[0]]
        names = [names[number] for number in sorted(chosen.tolist())]
    return ((name, found[name]) for name in names)
