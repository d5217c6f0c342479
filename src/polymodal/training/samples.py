"""Records to tokens, once, before the first step; and the order in which they are seen.

The order is a pure function of (sizes, repeats, seed, epoch), so a resumed run needs one integer, and the number of
processes does not matter. Since every length is known beforehand, the loss denominator of a step is known to every
process without communication.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeVar

import numpy as np

from polymodal.errors import ConfigError, DataError, PolymodalError
from polymodal.processing.sample import Sample

if TYPE_CHECKING:
    from polymodal.data.records import Record
    from polymodal.processing.processor import Processor
    from polymodal.training.recipe import DataConfig

T = TypeVar("T")
R = TypeVar("R")


class Progress(Protocol):
    """Wraps an iterable with a progress bar."""

    def __call__(self, items: Iterable[T], label: str, total: int) -> Iterable[T]:
        """Yield the items; show label, count, rate and time left."""
        ...


@dataclass(frozen=True)
class Prepared:
    """The tokenised data of a stage.

    Attributes:
        records: The records kept.
        samples: Their tokens, without pixels.
        targets: [n] trained tokens of each.
        lengths: [n] tokens of each.
        sources: Range of indices and repeat of each data file.
        left_out: Why records were left out, with counts.
        fingerprint: Hash of every token and mask; a resumed run must see the same.
    """

    records: list[Record]
    samples: list[Sample]
    targets: np.ndarray
    lengths: np.ndarray
    sources: tuple[tuple[range, float], ...]
    left_out: dict[str, int]
    fingerprint: str


def read_mix(data: DataConfig, seed: int) -> list[tuple[list[Record], float]]:
    """Read the data files.

    Args:
        data: The mixture.
        seed: Chooses the records where `max_samples` is set.

    Returns:
        For each file its records and its repeat.

    Raises:
        DataError: A file is missing, damaged or empty.
    """
    from polymodal.data.records import load_records

    mix = []
    for number, source in enumerate(data.mix):
        root = Path(source.image_root) if source.image_root is not None else None
        records = load_records(Path(source.path), root)
        if not records:
            raise DataError(f"{source.path}: no records")
        if source.max_samples is not None and source.max_samples < len(records):
            rng = np.random.default_rng([seed, number])
            kept = np.sort(rng.permutation(len(records))[: source.max_samples])
            records = [records[i] for i in kept]
        mix.append((records, source.repeat))
    return mix


def prepare(
    mix: Sequence[tuple[Sequence[Record], float]],
    processor: Processor,
    data: DataConfig,
    progress: Progress,
    workers: int,
    skipped_file: Path | None = None,
) -> Prepared:
    """Tokenise every record once, without making pixel tensors.

    Args:
        mix: For each source its records and its repeat.
        processor: Of the model, with the stage's template.
        data: Limits and what to do on errors.
        progress: Wraps the iteration with a progress bar.
        workers: Threads that decode pictures (for their sizes and hashes).
        skipped_file: Where records that could not be read are listed.

    Returns:
        The samples, and what was left out and why.

    Raises:
        PolymodalError: A record cannot be read and `on_error` is "stop", or nothing is left.
    """
    everything = [record for records, _ in mix for record in records]

    def tokenise(record: Record) -> Sample | PolymodalError:
        try:
            return processor(record.messages, id=record.id, pixels=False)
        except PolymodalError as error:
            return error

    kept: list[bool] = []
    records: list[Record] = []
    samples: list[Sample] = []
    left_out: dict[str, int] = {}
    digest = hashlib.sha256()
    skipped = []
    results = zip(everything, ahead(tokenise, everything, workers), strict=True)
    for record, result in progress(results, "tokenising", len(everything)):
        reason = ""
        if isinstance(result, PolymodalError):
            if data.on_error == "stop":
                raise type(result)(f"record {record.id}: {result}")
            skipped.append({"id": record.id, "error": str(result)})
            reason = "unreadable"
        elif result.input_ids.numel() > data.max_length:
            reason = f"longer than max_length {data.max_length}"
        elif not bool(result.loss_mask[1:].any()):
            reason = "without a trained token"
        kept.append(not reason)
        if reason:
            left_out[reason] = left_out.get(reason, 0) + 1
            continue
        assert isinstance(result, Sample)
        records.append(record)
        samples.append(result)
        for part in (result.input_ids, result.loss_mask):
            digest.update(part.numpy().tobytes())
        digest.update("".join(result.media_keys).encode())
    if skipped and skipped_file is not None:
        skipped_file.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in skipped), "utf-8")
    if not samples:
        counts = ", ".join(f"{count} {reason}" for reason, count in left_out.items())
        raise DataError(f"no record is left to train on: {counts}")
    sources, start, first = [], 0, 0
    for group, repeat in mix:
        count = sum(kept[start : start + len(group)])
        sources.append((range(first, first + count), repeat))
        start, first = start + len(group), first + count
    return Prepared(
        records=records,
        samples=samples,
        # The first token is never predicted, whatever its mask says.
        targets=np.array([int(sample.loss_mask[1:].sum()) for sample in samples]),
        lengths=np.array([sample.input_ids.numel() for sample in samples]),
        sources=tuple(sources),
        left_out=left_out,
        fingerprint=digest.hexdigest(),
    )


def epoch_order(sources: Sequence[tuple[range, float]], seed: int, epoch: int) -> np.ndarray:
    """The order of one epoch.

    Args:
        sources: Range of indices and repeat of each data file.
        seed: The run's.
        epoch: Counted from 0.

    Returns:
        [n] sample indices; n is the same in every epoch.
    """
    rng = np.random.default_rng([seed, epoch])
    parts = []
    for indices, repeat in sources:
        count = round(len(indices) * repeat)
        whole, rest = divmod(count, max(1, len(indices)))
        members = np.arange(indices.start, indices.stop)
        parts += [members] * whole + [rng.permutation(members)[:rest]]
    order = np.concatenate(parts)
    rng.shuffle(order)
    return order


class Order:
    """The endless sequence of sample indices, epoch after epoch.

    Args:
        sources: As in `epoch_order`.
        seed: The run's.
    """

    def __init__(self, sources: Sequence[tuple[range, float]], seed: int) -> None:
        self.sources = sources
        self.seed = seed
        self.epoch_size = len(epoch_order(sources, seed, 0))
        if self.epoch_size == 0:
            raise ConfigError("data.mix: `repeat` is so small that an epoch has no record")
        self._cached: tuple[int, np.ndarray] = (-1, np.empty(0, dtype=np.int64))

    def take(self, start: int, count: int) -> np.ndarray:
        """Indices at positions start .. start + count - 1; an epoch's end is not padded or dropped."""
        found = []
        while count > 0:
            epoch, offset = divmod(start, self.epoch_size)
            if self._cached[0] != epoch:
                self._cached = (epoch, epoch_order(self.sources, self.seed, epoch))
            part = self._cached[1][offset : offset + count]
            found.append(part)
            start, count = start + len(part), count - len(part)
        return np.concatenate(found)


def micro_batches(
    indices: np.ndarray, lengths: np.ndarray, micro_size: int, group_by_length: bool, rank: int = 0, world: int = 1
) -> list[np.ndarray]:
    """Cut one step's samples into micro-batches.

    Args:
        indices: [G] the step's samples.
        lengths: Tokens of every sample.
        micro_size: Most samples of a micro-batch.
        group_by_length: Sort by length first, so that little is padded.
        rank: This process.
        world: Number of processes; divides G.

    Returns:
        This process's micro-batches; every process gets the same number.
    """
    if group_by_length:
        indices = indices[np.argsort(lengths[indices], kind="stable")]
    mine = indices[rank::world]
    return [mine[i : i + micro_size] for i in range(0, len(mine), micro_size)]


def ahead(
    function: Callable[[T], R], items: Iterable[T], workers: int, depth: int | None = None
) -> Generator[R, None, None]:
    """Map in threads, in order, a bounded number of items ahead.

    Args:
        function: What to do with each item.
        items: The items.
        workers: Threads.
        depth: Most items in flight; four for each thread when None.

    Yields:
        Results, in the order of the items.
    """
    depth = depth or 4 * workers
    pool = ThreadPoolExecutor(workers)
    queue: list[Future[R]] = []
    try:
        for item in items:
            queue.append(pool.submit(function, item))
            if len(queue) >= depth:
                yield queue.pop(0).result()
        while queue:
            yield queue.pop(0).result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def with_pixels(record: Record, sample: Sample, processor: Processor) -> Sample:
    """Decode a record's pictures again, for training without a feature cache."""
    if not sample.plans:
        return sample
    again = processor(record.messages, id=record.id)
    if again.media_keys != sample.media_keys:
        raise DataError(f"record {record.id}: its picture changed on disk while training")
    return replace(sample, pixels=again.pixels)
