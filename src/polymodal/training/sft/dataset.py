"""Conversations to tokens, once, before the first step; and micro-batches of them.

Data files become an index of memory maps (`data.index`), which the next run opens in a moment; records that are in
memory already are tokenised in memory. Both give the same `Prepared`. Since every length is known beforehand, the loss
denominator of a step is known to every process without communication.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from polymodal.data.index import Reading, open_index, sample_digest
from polymodal.data.mixture import Joined, Picked, epoch_repeats
from polymodal.data.readers.conversations import Record
from polymodal.errors import DataError, PolymodalError
from polymodal.media_plan import AudioPlan
from polymodal.modeling.vlm import MultimodalLM
from polymodal.processing.collate import Batch, Sample, as_one, collate, collate_packed, stack_windows
from polymodal.processing.image_codes import empty_condition
from polymodal.processing.media_parts import Opened
from polymodal.processing.processor import Processor
from polymodal.training.feature_cache import Broken, FeatureStore, fill_missing, patch_by_patch, together
from polymodal.training.recipes.sft import DataConfig
from polymodal.training.sft.conditions import without_condition
from polymodal.utils.files import write_text
from polymodal.utils.progress import log
from polymodal.utils.threads import Progress, ahead


@dataclass(frozen=True)
class Prepared:
    """The tokenised data of a stage."""

    records: Sequence[Record]  # The records kept
    samples: Sequence[Sample]  # Their tokens, without pixels
    targets: np.ndarray  # [n] trained tokens of each
    lengths: np.ndarray  # [n] tokens of each
    sources: tuple[tuple[range, float], ...]  # Range of indices and repeat of each data file
    left_out: dict[str, int]  # Why records were left out, with counts
    fingerprint: str  # Hash of every token and mask; a resumed run must see the same


@dataclass(frozen=True)
class _Source:
    """One source, tokenised: as `Prepared`, before anything is left out."""

    records: Sequence[Record]
    samples: Sequence[Sample]
    targets: np.ndarray
    lengths: np.ndarray
    digests: np.ndarray
    faults: list[dict[str, Any]]


def prepare(
    mix: Sequence[tuple[Sequence[Record] | Reading, float]],
    processor: Processor,
    data: DataConfig,
    progress: Progress,
    workers: int,
    skipped_file: Path,
) -> Prepared:
    """Tokenise every record once, without making pixel tensors, or open what an earlier run made of them."""
    folder = Path(data.index) if data.index is not None else skipped_file.parent / "index"
    skip = data.on_error == "skip"
    sources = [
        _of_files(source, processor, folder, skip, workers, progress)
        if isinstance(source, Reading)
        else _of_records(source, processor, skip, workers, progress)
        for source, _ in mix
    ]
    left_out: dict[str, int] = {}
    kept: list[tuple[_Source, np.ndarray]] = []
    longest = processor.longest(data.max_length)
    limit = f"max_length {longest}" if longest == data.max_length else f"the language model's {longest} positions"
    digest = hashlib.sha256()
    for source in sources:
        long, untrained = source.lengths > longest, source.targets == 0
        for reason, count in (
            ("unreadable", len(source.faults)),
            (f"longer than {limit}", int(long.sum())),
            ("without a trained token", int((untrained & ~long).sum())),
        ):
            if count:
                left_out[reason] = left_out.get(reason, 0) + count
        rows = np.flatnonzero(~(long | untrained))
        kept.append((source, rows))
        digest.update(np.ascontiguousarray(source.digests[rows]).tobytes())
    skipped = [{"id": fault["id"], "error": fault["error"]} for source in sources for fault in source.faults]
    if skipped:
        write_text(skipped_file, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in skipped))
    sizes = [len(rows) for _, rows in kept]
    if not sum(sizes):
        counts = ", ".join(f"{count} {reason}" for reason, count in left_out.items())
        raise DataError(f"no record is left to train on: {counts}")
    weights = [source.weight for source in data.mix] if len(data.mix) == len(mix) else None
    repeats = epoch_repeats(sizes, [repeat for _, repeat in mix], weights)
    ends = np.cumsum(sizes).tolist()
    return Prepared(
        records=Joined([Picked(source.records.__getitem__, rows) for source, rows in kept]),
        samples=Joined([Picked(source.samples.__getitem__, rows) for source, rows in kept]),
        targets=np.concatenate([source.targets[rows] for source, rows in kept]).astype(np.int64),
        lengths=np.concatenate([source.lengths[rows] for source, rows in kept]).astype(np.int64),
        sources=tuple((range(end - size, end), each) for end, size, each in zip(ends, sizes, repeats, strict=True)),
        left_out=left_out,
        fingerprint=digest.hexdigest(),
    )


def _of_files(
    reading: Reading, processor: Processor, folder: Path, skip: bool, workers: int, progress: Progress
) -> _Source:
    """Open a source's index, or build it."""
    index = open_index(folder, reading, processor, skip_errors=skip, workers=workers, progress=progress, log=log)
    rows = np.arange(len(index))
    records, samples = Picked(index.record, rows), Picked(index.sample, rows)
    return _Source(records, samples, index.targets, index.lengths, index.digests, index.faults)


def _of_records(
    records: Sequence[Record], processor: Processor, skip: bool, workers: int, progress: Progress
) -> _Source:
    """Tokenise records that are in memory."""

    def tokenise(record: Record) -> Sample | PolymodalError:
        try:
            return processor(record.messages, id=record.id, pixels=False)
        except PolymodalError as error:
            return error

    good: list[Record] = []
    samples: list[Sample] = []
    faults: list[dict[str, Any]] = []
    results = zip(records, ahead(tokenise, records, workers), strict=True)
    for record, result in progress(results, "tokenising", len(records)):
        if isinstance(result, Sample):
            good.append(record)
            samples.append(result)
            continue
        if not skip:
            raise type(result)(f"record {record.id}: {result}")
        faults.append({"id": record.id, "error": str(result)})
    return _Source(
        good,
        samples,
        # The first token is never predicted, whatever its mask says.
        np.array([int(sample.loss_mask[1:].sum()) for sample in samples], dtype=np.int64),
        np.array([sample.input_ids.numel() for sample in samples], dtype=np.int64),
        np.array([list(sample_digest(sample)) for sample in samples], dtype=np.uint8).reshape(-1, 32),
        faults,
    )


def with_pixels(record: Record, sample: Sample, processor: Processor) -> Sample:
    """Decode a record's images again, for training without a feature cache."""
    if not sample.plans:
        return sample
    try:
        media = processor.media(record.messages)
    except PolymodalError as error:
        raise type(error)(f"record {record.id}: {error}", error.code) from error
    if tuple(medium.key for medium in media) != sample.media_keys:
        raise DataError(f"record {record.id}: its image or sound changed on disk while training")
    return replace(
        sample,
        pixels=tuple(medium.tiles("uint8") for medium in media if medium.tiles is not None),
        sounds=tuple(medium.windows for medium in media if medium.windows is not None),
    )


def turn_of_target(sample: Sample) -> np.ndarray:  # -> [R]
    """Number the assistant's turns, runs of the loss mask, for each token that is a target."""
    mask = sample.loss_mask.numpy()
    starts = mask & ~np.concatenate(([False], mask[:-1]))
    return (np.cumsum(starts) - 1)[1:][mask[1:]]


def kinds_of_targets(record: Record, sample: Sample, last_answer_only: bool = False) -> list[str]:
    """The kind of each target: its turn's where the record has as many `kinds` as turns, else the record's."""
    turns = turn_of_target(sample)
    kinds = record.extra.get("kinds")
    trained = [message.train for message in record.messages if message.role == "assistant"]
    if not isinstance(kinds, (list, tuple)) or len(kinds) != len(trained) or not len(turns):
        return [record.kind] * len(turns)
    kinds = [str(kind) for kind, is_trained in zip(kinds, trained, strict=True) if is_trained]
    if turns[-1] >= len(kinds):
        return [record.kind] * len(turns)
    return [kinds[-1 if last_answer_only else turn] for turn in turns]


class NamedBatch(NamedTuple):
    """A batch with the kind, the source and the record of each of its targets, in order."""

    batch: Batch
    kinds: list[str]
    sources: list[str]
    records: list[str]
    lost: int  # Targets that were planned, of records that cannot be read any more


@dataclass(frozen=True)
class SFTDataset:
    """The data of a stage, and how a micro-batch is made of it."""

    prepared: Prepared  # Tokens, without pixels
    processor: Processor  # Makes pixels where features are not cached
    store: FeatureStore | None  # Cached features of images and videos, or None
    packed: bool = False  # Put the samples of a batch into one row, in place of padding them
    broken: Broken = field(default_factory=lambda: Broken(None))  # Records that cannot be read any more
    seen: np.ndarray | None = None  # The records of which features are kept; all where None
    sounds: FeatureStore | None = None  # Cached features of sounds, or None

    def batch(self, indices: np.ndarray) -> Batch:
        """Collate or pack samples, with features from the cache or pixels from the files."""
        return self._collate([self.sample(int(index)) for index in indices])

    def sample(self, index: int) -> Sample:
        """One sample as the model takes it; one of nothing but padding where its image cannot be read any more."""
        sample = self.prepared.samples[index]
        try:
            if not self._stores:
                return with_pixels(self.prepared.records[index], sample, self.processor)
            if gone := [key for key in sample.media_keys if not any(key in store.where for store in self._stores)]:
                raise DataError(f"record {sample.id}: {self.broken.images.get(gone[0], 'its features are missing')}")
            return sample
        except PolymodalError as error:
            self.broken.note(sample.id, error)
            # The step keeps its shape, whatever the number of processes; what it lost is counted in `NamedBatch.lost`.
            padding = torch.full((2,), self.processor.pad_id)
            return Sample(padding, torch.zeros(2, dtype=torch.bool), id=sample.id)

    def _collate(self, samples: Sequence[Sample]) -> Batch:
        made = collate_packed(samples) if self.packed else collate(samples, self.processor.pad_id)
        if not self._stores:
            return made
        keys = [item for sample in samples for item in zip(sample.media_keys, sample.heard, strict=True)]
        of_images, of_sounds = ([key for key, heard in keys if heard == wanted] for wanted in (False, True))
        features: Any = None if self.store is None else self.store.gather(of_images)
        if self.own_shapes and self.store is not None and features is not None:
            tiles = [plan.num_tiles for plan in made.plans if not isinstance(plan, AudioPlan)]
            of_each = features.split([self.store.where[key][1] for key in of_images])
            features = as_one([part.view(n, -1, part.shape[-1]) for part, n in zip(of_each, tiles, strict=True)])
        sounds = None if self.sounds is None else self.sounds.gather(of_sounds)
        return replace(made, features=features, audio_features=None if sounds is None else sounds[:, 0])

    @property
    def _stores(self) -> list[FeatureStore]:
        return [store for store in (self.store, self.sounds) if store is not None]

    @property
    def own_shapes(self) -> bool:
        """Whether each image has a shape of its own, and so its own number of features."""
        image = self.processor.config.image
        return image is not None and image.image_aspect_ratio == "native"

    def named_batch(self, indices: np.ndarray) -> NamedBatch:
        """A batch, and what its targets are called in the log."""
        dropped, indices = indices < 0, np.where(indices < 0, ~indices, indices)
        samples = [self.sample(int(index)) for index in indices]
        if (codes := self.processor.codes) is not None:
            start = empty_condition(self.processor.tokenizer)
            pairs = zip(samples, dropped, strict=True)
            samples = [without_condition(each, codes.begin, start) if bare else each for each, bare in pairs]
        kinds: list[str] = []
        sources: list[str] = []
        names: list[str] = []
        for index, sample in zip(indices, samples, strict=True):
            record = self.prepared.records[index]
            of_targets = kinds_of_targets(record, sample, self.processor.last_answer_only)
            kinds += of_targets
            sources += [record.source] * len(of_targets)
            names += [f"record {record.id}"] * len(of_targets)
        lost = int(self.prepared.targets[indices].sum()) - len(kinds)
        return NamedBatch(self._collate(samples), kinds, sources, names, lost)

    def fill_store(self, model: MultimodalLM, workers: int, label: str, seen: np.ndarray | None = None) -> SFTDataset:
        """Log what was left out, and compute the features that are missing, of some records only where `seen` is."""
        dataset = replace(self, seen=seen)
        for reason, count in self.prepared.left_out.items():
            log(f"left out {count} {label} {reason}")
        more, device = (model.device, workers, self.broken), model.device
        if self.store is not None:
            encode = (patch_by_patch if self.own_shapes else together)(model.encode_images, device)
            count = fill_missing(self.store, dataset._media(heard=False), self._tiles, encode, *more)
            log(f"features: {count} images encoded, {len(self.store.where)} in the cache")
        if self.sounds is not None:
            listen = sounds_together(model)
            count = fill_missing(self.sounds, dataset._media(heard=True), self._windows, listen, *more, "sounds")
            log(f"features: {count} sounds encoded, {len(self.sounds.where)} in the cache")
        return dataset

    def alone(self) -> Iterator[tuple[int, int]]:
        """The records that show one image of one tile, of which features are kept: index, and row in the store."""
        where = {} if self.store is None else self.store.where
        for index in self.kept():
            keys = self.prepared.samples[index].media_keys
            if len(keys) == 1 and where.get(keys[0], (0, 0))[1] == 1:
                yield index, where[keys[0]][0]

    def kept(self) -> Sequence[int]:
        """The records of which features are kept."""
        return range(len(self.prepared.samples)) if self.seen is None else self.seen.tolist()

    def _media(self, heard: bool) -> Iterator[tuple[str, tuple[int, int], int]]:
        """Of all sounds, or of all images and videos: key, record and place in it, and how many tiles or windows."""
        for index in self.kept():
            sample = self.prepared.samples[index]
            for place, (key, plan) in enumerate(zip(sample.media_keys, sample.plans, strict=True)):
                if isinstance(plan, AudioPlan) == heard:
                    yield key, (index, place), len(plan.frames) if isinstance(plan, AudioPlan) else plan.num_tiles

    def _open(self, key: str, where: tuple[int, int]) -> Opened:
        index, place = where
        record = self.prepared.records[index]
        try:
            opened = self.processor.medium(record.messages, place)
        except PolymodalError as error:
            if self.broken.file is not None:
                raise
            raise type(error)(f"record {record.id}: {error}", error.code) from error
        if opened.key != key:
            raise DataError(f"record {record.id}: its image or sound changed on disk while it was being encoded")
        return opened

    def _tiles(self, key: str, where: tuple[int, int]) -> torch.Tensor:
        tiles = self._open(key, where).tiles
        assert tiles is not None  # only sounds have none
        return tiles(True)

    def _windows(self, key: str, where: tuple[int, int]) -> tuple[torch.Tensor, AudioPlan]:
        opened = self._open(key, where)
        assert opened.windows is not None and isinstance(opened.plan, AudioPlan)
        return opened.windows, opened.plan


def sounds_together(
    model: MultimodalLM,
) -> Callable[[Sequence[tuple[torch.Tensor, AudioPlan]]], Sequence[torch.Tensor]]:
    """The audio encoder as what `fill_missing` asks for: of each sound [tokens, 1, E']."""

    def encode(items: Sequence[tuple[torch.Tensor, AudioPlan]]) -> Sequence[torch.Tensor]:
        windows = stack_windows([windows for windows, _ in items])
        assert windows is not None  # there is a sound
        plans = [plan for _, plan in items]
        made = model.encode_audio(windows.to(model.device), plans)[:, None]
        return made.split([plan.num_tokens for plan in plans])

    return encode
