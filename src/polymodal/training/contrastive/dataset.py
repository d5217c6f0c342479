"""Records to pairs of image and caption, what each step shows of them, and how a batch is made.

All captions are tokenised before the first step, and every image is decoded once, so a record that cannot be used is
found before training. The records of one image in one source are one sample; which of its captions an epoch sees is
drawn. Pairs of one image can still meet in a step (two sources, `repeat`, the end of an epoch): they carry the same
image id, by which losses know that neither is the other's negative.

The order is that of every stage, a pure function of the seed; what is drawn for a sample is one of (seed, epoch,
sample), see `augment`. So a resumed run needs one integer, and neither threads nor processes change what is seen.
"""

from __future__ import annotations

import bisect
import hashlib
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from polymodal.data.index import Reading
from polymodal.data.load import row_record
from polymodal.data.mixture import epoch_repeats
from polymodal.data.pairs import image_and_captions
from polymodal.data.readers.conversations import Record
from polymodal.errors import DataError, PolymodalError
from polymodal.media_plan import Size
from polymodal.messages import Source
from polymodal.modeling.dual_encoders.base import PairBatch, PairModel
from polymodal.modeling.dual_encoders.distillation import flip_grid
from polymodal.training.contrastive import augment
from polymodal.training.contrastive.images import Images, image_numbers, index_file, scan, source_name
from polymodal.training.feature_cache import Broken, FeatureStore
from polymodal.training.recipes.contrastive import PairRecipe, TextConfig
from polymodal.training.steps import Order, Steps
from polymodal.utils.files import write_text
from polymodal.utils.progress import log, progress


@dataclass(frozen=True)
class Pairs:
    """The samples of a pair stage, in memory: images by their sources, captions as tokens."""

    ids: tuple[str, ...]  # [n] of the first record of each image
    keys: np.ndarray  # [n] uint64 hashes of them, for what is drawn
    sources: tuple[Source, ...]  # [n] where each image is
    image_ids: np.ndarray  # [n] int64, equal for equal pixels
    captions: tuple[range, ...]  # [n] the numbers of each image's texts, as ranges of `starts`
    tokens: np.ndarray  # All texts' tokens, one after the other
    starts: np.ndarray  # [m + 1] where each text begins in `tokens`
    mixture: tuple[tuple[range, float], ...]  # Range of samples and repeat of each data file
    fingerprint: str  # Hash of every image and token; a resumed run must see the same
    images: tuple[str, ...]  # [n] keys of the images' pixels

    def text(self, number: int) -> np.ndarray:
        """The tokens of one text."""
        return self.tokens[self.starts[number] : self.starts[number + 1]]


@dataclass(frozen=True)
class Plan:
    """Which pairs go through the model together, and what was drawn for them."""

    indices: np.ndarray  # [b] samples
    texts: np.ndarray  # [b] numbers of their texts
    numbers: np.ndarray | None  # [b, COUNT] uniform numbers of the augmentation, or None for plain tiles
    length: int  # What the texts are padded to; the same over the whole step

    def cut(self, part: slice) -> Plan:
        """Some of these pairs."""
        numbers = None if self.numbers is None else self.numbers[part]
        return replace(self, indices=self.indices[part], texts=self.texts[part], numbers=numbers)

    def split(self, size: int) -> list[Plan]:
        """Micro-batches of at most `size` pairs."""
        return [self.cut(slice(start, start + size)) for start in range(0, len(self.indices), size)]


@dataclass(frozen=True)
class PairDataset:
    """The data of a stage, and how a micro-batch is made of it."""

    prepared: Pairs  # The samples
    images: Images  # Their images
    seed: int  # The run's
    pad_id: int  # Fills texts
    text_length: int | None  # What every text is padded to; the longest of the step when None
    store: FeatureStore | None = None  # Kept output of the frozen tower, or None
    teacher: FeatureStore | None = None  # Kept output of a teacher, or None
    teacher_grid: Size | None = None  # Rows and columns of that output
    # Each sample's image under the teacher's rules, by which that output is found
    teacher_images: tuple[str, ...] = ()
    broken: Broken = field(default_factory=lambda: Broken(None))  # Pairs whose image cannot be read any more
    seen: Sequence[int] = ()  # The samples that steps see: of these features are kept

    def plan(self, indices: np.ndarray, epochs: np.ndarray, views: np.ndarray) -> Plan:
        """Draw what a step shows of its samples; every process draws the same."""
        # indices [G], epochs [G], views [G]
        augmented = self.images.augment.type != "none"
        places = range(augment.COUNT) if augmented else (augment.CAPTION,)
        numbers = augment.uniforms(self.seed, epochs, self.prepared.keys[indices], views, places)
        own = [self.prepared.captions[i] for i in indices]
        texts = np.array([c.start + int(u * len(c)) for c, u in zip(own, numbers[:, 0], strict=True)], dtype=np.int64)
        return Plan(indices, texts, numbers if augmented else None, self.length(texts))

    def length(self, texts: np.ndarray) -> int:
        """What these texts are padded to."""
        lengths = self.prepared.starts[texts + 1] - self.prepared.starts[texts]
        return self.text_length or int(lengths.max())

    def batch(self, plan: Plan) -> PairBatch:
        """Make a micro-batch: tokens, and pixels or kept features."""
        pairs = self.prepared
        plan, tiles = self._readable(plan)
        ids = torch.full((len(plan.indices), plan.length), self.pad_id, dtype=torch.int64)
        mask = torch.zeros(ids.shape, dtype=torch.bool)
        for row, number in enumerate(plan.texts):
            text = torch.from_numpy(pairs.text(int(number)).astype(np.int64))
            ids[row, : len(text)] = text
            mask[row, : len(text)] = True
        keys = [pairs.images[i] for i in plan.indices]
        features = None if self.store is None else self.store.gather(keys)
        teacher = None if self.teacher is None else self.teacher.gather([self.teacher_images[i] for i in plan.indices])
        mirrored = self._mirrored(plan)
        if teacher is not None and self.teacher_grid is not None and mirrored.any():
            teacher = flip_grid(teacher, self.teacher_grid, torch.from_numpy(mirrored))
        return PairBatch(
            ids,
            mask,
            torch.from_numpy(pairs.image_ids[plan.indices]),
            torch.from_numpy(np.stack(tiles)) if tiles else None,
            features,
            teacher,
            tuple(pairs.ids[i] for i in plan.indices),
        )

    def _mirrored(self, plan: Plan) -> np.ndarray:
        """Which images are shown mirrored: [b] bool."""
        if plan.numbers is None:
            return np.zeros(len(plan.indices), dtype=bool)
        found: np.ndarray = plan.numbers[:, augment.FLIP] < self.images.augment.flip
        return found

    def _readable(self, plan: Plan) -> tuple[Plan, list[np.ndarray]]:
        """The pairs and the views that the model takes; the next one that steps see stands in where one is broken."""
        # So a step keeps its shape, and no other pair of it changes, whatever the micro-batches and processes.
        found, tiles, mirrored = plan.cut(slice(None)), [], self._mirrored(plan).tolist()
        found = replace(found, indices=plan.indices.copy(), texts=plan.texts.copy())
        for row, first in enumerate(plan.indices.tolist()):
            numbers = None if plan.numbers is None else plan.numbers[row, augment.CROP :]
            for index, text in self._in_turn(first, int(plan.texts[row]), plan.length):
                try:
                    tile = self.view(index, numbers, mirrored[row])
                except PolymodalError as error:
                    self.broken.note(self.prepared.ids[index], error)
                    continue
                found.indices[row], found.texts[row] = index, text
                tiles += [] if tile is None else [tile]
                break
            else:
                raise DataError("no image of the data can be read any more; mend them and run the same command")
        return found, tiles

    def _in_turn(self, first: int, text: int, length: int) -> Iterator[tuple[int, int]]:
        """A sample with its text, then those seen after it, each with its first text of at most so many tokens."""
        yield first, text
        pairs, after = self.prepared, bisect.bisect_right(self.seen, first)
        for index in (*self.seen[after:], *self.seen[:after]):
            yield from [(index, t) for t in pairs.captions[index] if len(pairs.text(t)) <= length][:1]

    def tile(self, index: int) -> np.ndarray:  # -> [3, H, W]
        """A sample's plain tile, or that of the next one whose image can be read."""
        texts = np.array([self.prepared.captions[index].start])
        return self._readable(Plan(np.array([index]), texts, None, sys.maxsize))[1][0]

    def view(self, index: int, numbers: np.ndarray | None = None, mirrored: bool = False) -> np.ndarray | None:
        """One view of a sample's image; None where features take its place. An image that broke names its record."""
        pairs = self.prepared
        try:
            for store, keys in ((self.store, pairs.images), (self.teacher, self.teacher_images)):
                if store is not None and keys[index] not in store.where:
                    raise self.broken.images.get(keys[index]) or DataError("its features are missing")
            return self.images.tile(pairs.sources[index], numbers, mirrored) if self.store is None else None
        except PolymodalError as error:
            raise type(error)(f"record {pairs.ids[index]}: {error}", error.code) from error


class PairSteps(Steps):
    """The samples of each optimizer step, and which view of each sample a step shows."""

    def __init__(self, order: Order, global_size: int) -> None:
        super().__init__(order, global_size)
        self._views: tuple[int, np.ndarray] = (-1, np.empty(0, dtype=np.int64))

    def total(self, epochs: float) -> int:
        """Optimizer steps of a run."""
        return max(1, round(epochs * self.order.epoch_size / self.global_size))

    def places(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """The epoch of each of a step's samples, and how often it was seen in it before: [G], [G]."""
        positions = np.arange(step * self.global_size, (step + 1) * self.global_size)
        epochs, offsets = np.divmod(positions, self.order.epoch_size)
        views = np.zeros(len(positions), dtype=np.int64)
        for epoch in np.unique(epochs):
            inside = epochs == epoch
            views[inside] = self._epoch_views(int(epoch))[offsets[inside]]
        return epochs, views

    def _epoch_views(self, epoch: int) -> np.ndarray:
        if self._views[0] != epoch:
            members = self.order.take(epoch * self.order.epoch_size, self.order.epoch_size)
            self._views = (epoch, augment.views_of(members))
        return self._views[1]


@dataclass(frozen=True)
class _Pair:
    """A record as a pair."""

    id: str
    source: Source
    captions: tuple[str, ...]


def prepare_pairs(
    mix: Sequence[tuple[Sequence[Record] | Reading, float]],
    weights: Sequence[float | None],
    model: PairModel,
    images: Images,
    recipe: PairRecipe,
    skipped_file: Path,
) -> Pairs:
    """Read records, tokenise every caption and decode every image once."""
    faults: list[dict[str, str]] = []

    def leave_out(id: str, error: PolymodalError, where: str = "") -> None:
        if recipe.data.on_error != "skip":
            raise type(error)(f"{where}{error}")
        faults.append({"id": id, "error": str(error)})

    read: list[list[_Pair]] = []
    for source, _ in mix:
        read.append([])
        for record in _records(source, leave_out):
            try:
                read[-1].append(_Pair(record.id, *image_and_captions(record)))
            except DataError as error:
                leave_out(record.id, error)
    folder = Path(recipe.data.index) if recipe.data.index is not None else skipped_file.parent / "index"
    everything = [pair.source for pairs in read for pair in pairs]
    broken = scan(images, everything, index_file(folder, images.image), recipe.run.workers, "reading images")
    for pair in (pair for pairs in read for pair in pairs):
        if source_name(pair.source) in broken:
            leave_out(pair.id, broken[source_name(pair.source)], f"record {pair.id}: ")
    kept = [[pair for pair in pairs if source_name(pair.source) not in broken] for pairs in read]
    if faults:
        write_text(skipped_file, "".join(json.dumps(fault, ensure_ascii=False) + "\n" for fault in faults))
        log(f"left out {len(faults)} records that are no pairs or cannot be read, listed in {skipped_file}")
    if not any(kept):
        raise DataError(f"no pair is left to train on: {len(faults)} records cannot be used, see {skipped_file}")
    return _collect(kept, [repeat for _, repeat in mix], weights, model, images, recipe.text)


def _records(source: Sequence[Record] | Reading, leave_out: Callable[[str, PolymodalError], None]) -> Iterator[Record]:
    """The records of a source that can be read."""
    if not isinstance(source, Reading):
        yield from source
        return
    taken = None
    if source.draw is not None:
        total = sum(1 for _ in source.rows())
        count, seed = source.draw
        if count < total:
            taken = set(np.random.default_rng(seed).permutation(total)[:count].tolist())
    for row in source.rows():
        if taken is not None and row.number not in taken:
            continue
        try:
            record = row_record(row, kind=source.kind, source=source.source)
        except PolymodalError as error:
            leave_out(str(row.id), error)
        else:
            yield record


def _collect(
    sources: Sequence[Sequence[_Pair]],
    repeats: Sequence[float],
    weights: Sequence[float | None],
    model: PairModel,
    images: Images,
    text: TextConfig,
) -> Pairs:
    """Join the records of one image, and tokenise."""
    found: list[tuple[_Pair, str, dict[str, None]]] = []
    spans: list[range] = []
    for pairs in sources:
        by_key: dict[str, tuple[_Pair, str, dict[str, None]]] = {}
        for pair in pairs:
            key = images.metadata[source_name(pair.source)].key
            by_key.setdefault(key, (pair, key, {}))[2].update(dict.fromkeys(pair.captions))
        spans.append(range(len(found), len(found) + len(by_key)))
        found += by_key.values()
    templates = text.templates or ("{}",)
    texts = [
        template.replace("{}", caption) for *_, captions in found for caption in captions for template in templates
    ]
    tokens = tokenise(model.tokenizer, texts, min(text.max_length or model.max_text, model.max_text))
    flat, starts = np.concatenate(tokens), np.cumsum([0, *map(len, tokens)]).astype(np.int64)
    counts = [len(captions) * len(templates) for *_, captions in found]
    ends = np.cumsum(counts).tolist()
    keys, ids = tuple(key for _, key, _ in found), tuple(pair.id for pair, *_ in found)
    digest = hashlib.sha256("".join(keys).encode())
    digest.update(flat.tobytes() + starts.tobytes() + json.dumps(counts).encode())
    sizes = [len(span) for span in spans]
    given = list(weights) if any(weight is not None for weight in weights) else None
    return Pairs(
        ids=ids,
        keys=augment.sample_keys(ids),
        sources=tuple(pair.source for pair, *_ in found),
        image_ids=image_numbers(keys),
        captions=tuple(range(end - count, end) for end, count in zip(ends, counts, strict=True)),
        tokens=flat,
        starts=starts,
        mixture=tuple(zip(spans, epoch_repeats(sizes, repeats, given), strict=True)),
        fingerprint=digest.hexdigest(),
        images=keys,
    )


def tokenise(tokenizer: Any, texts: Sequence[str], limit: int) -> list[np.ndarray]:
    """Tokenise texts as the model's own folder does."""
    found: list[np.ndarray] = []
    starts = range(0, len(texts), 1024)
    for start in progress(starts, "tokenising", len(starts)):
        encoded = tokenizer(list(texts[start : start + 1024]), truncation=True, max_length=limit)["input_ids"]
        found += [np.asarray(ids, dtype=np.int32) for ids in encoded]
    for text, ids in zip(texts, found, strict=True):
        if not len(ids):
            raise DataError(f"caption {text!r}: the tokenizer makes no token of it")
    return found
