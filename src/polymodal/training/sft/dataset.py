"""Records to tokens, once, before the first step; and the order in which they are seen.

Data files become an index of memory maps (`data.index`), which the next run opens in a moment; records that are in
memory already are tokenised in memory. Both give the same `Prepared`.

The order is a pure function of (sizes, repeats, seed, epoch), so a resumed run needs one integer, and the number of
processes does not matter. Since every length is known beforehand, the loss denominator of a step is known to every
process without communication.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from polymodal.data.index import Reading, open_index, sample_digest
from polymodal.data.mixture import Joined, Picked, epoch_repeats
from polymodal.errors import DataError, PolymodalError
from polymodal.processing.collate import Sample
from polymodal.utils.files import write_text
from polymodal.utils.progress import log
from polymodal.utils.threads import Progress, ahead

if TYPE_CHECKING:
    from polymodal.data.readers.conversations import Record
    from polymodal.processing.processor import Processor
    from polymodal.training.recipes.sft import DataConfig


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
class _Part:
    """One source, tokenised: as `Prepared`, before anything is left out."""

    records: Sequence[Record]
    samples: Sequence[Sample]
    targets: np.ndarray
    lengths: np.ndarray
    digests: np.ndarray
    faults: list[dict[str, Any]]


def read_mix(data: DataConfig, seed: int) -> list[tuple[Reading, float]]:
    """List the data files; nothing is read yet."""
    return [
        (
            Reading(
                path=Path(source.path),
                image_root=Path(source.image_root) if source.image_root is not None else None,
                format=source.format,
                annotations=Path(source.annotations) if source.annotations is not None else None,
                kind=source.kind,
                source=source.source,
                prompt=source.prompt,
                draw=(source.max_samples, (seed, number)) if source.max_samples is not None else None,
            ),
            source.repeat,
        )
        for number, source in enumerate(data.mix)
    ]


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
    parts = [
        _of_files(source, processor, folder, skip, workers, progress)
        if isinstance(source, Reading)
        else _of_records(source, processor, skip, workers, progress)
        for source, _ in mix
    ]
    left_out: dict[str, int] = {}
    skipped: list[dict[str, Any]] = []
    kept, digest = [], hashlib.sha256()
    for part in parts:
        long, untrained = part.lengths > data.max_length, part.targets == 0
        reasons = (
            ("unreadable", len(part.faults)),
            (f"longer than max_length {data.max_length}", int(long.sum())),
            ("without a trained token", int((untrained & ~long).sum())),
        )
        for reason, count in reasons:
            if count:
                left_out[reason] = left_out.get(reason, 0) + count
        skipped += [{"id": fault["id"], "error": fault["error"]} for fault in part.faults]
        kept.append(np.flatnonzero(~(long | untrained)))
        digest.update(np.ascontiguousarray(part.digests[kept[-1]]).tobytes())
    if skipped:
        lines = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in skipped)
        write_text(skipped_file, lines)
    sizes = [len(rows) for rows in kept]
    if not sum(sizes):
        counts = ", ".join(f"{count} {reason}" for reason, count in left_out.items())
        raise DataError(f"no record is left to train on: {counts}")
    repeats = [repeat for _, repeat in mix]
    weights = [source.weight for source in data.mix] if len(data.mix) == len(mix) else None
    starts = np.cumsum([0, *sizes]).tolist()
    ranges = [range(start, start + size) for start, size in zip(starts, sizes, strict=False)]
    pairs = list(zip(parts, kept, strict=True))
    return Prepared(
        records=Joined([Picked(part.records.__getitem__, rows) for part, rows in pairs]),
        samples=Joined([Picked(part.samples.__getitem__, rows) for part, rows in pairs]),
        targets=np.concatenate([part.targets[rows] for part, rows in pairs]).astype(np.int64),
        lengths=np.concatenate([part.lengths[rows] for part, rows in pairs]).astype(np.int64),
        sources=tuple(zip(ranges, epoch_repeats(sizes, repeats, weights), strict=True)),
        left_out=left_out,
        fingerprint=digest.hexdigest(),
    )


def _of_files(
    reading: Reading, processor: Processor, folder: Path, skip: bool, workers: int, progress: Progress
) -> _Part:
    """Open a source's index, or build it."""
    index = open_index(folder, reading, processor, skip_errors=skip, workers=workers, progress=progress, log=log)
    rows = np.arange(len(index))
    return _Part(
        Picked(index.record, rows),
        Picked(index.sample, rows),
        index.targets,
        index.lengths,
        index.digests,
        index.faults,
    )


def _of_records(records: Sequence[Record], processor: Processor, skip: bool, workers: int, progress: Progress) -> _Part:
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
    return _Part(
        good,
        samples,
        # The first token is never predicted, whatever its mask says.
        np.array([int(sample.loss_mask[1:].sum()) for sample in samples], dtype=np.int64),
        np.array([sample.input_ids.numel() for sample in samples], dtype=np.int64),
        np.array([list(sample_digest(sample)) for sample in samples], dtype=np.uint8).reshape(-1, 32),
        faults,
    )


def micro_batches(
    indices: np.ndarray, lengths: np.ndarray, micro_size: int, group_by_length: bool, rank: int = 0, world: int = 1
) -> list[np.ndarray]:
    """Cut one step's samples into micro-batches."""
    # indices [G]
    if group_by_length:
        indices = indices[np.argsort(lengths[indices], kind="stable")]
    mine = indices[rank::world]
    return [mine[i : i + micro_size] for i in range(0, len(mine), micro_size)]


def with_pixels(record: Record, sample: Sample, processor: Processor) -> Sample:
    """Decode a record's images again, for training without a feature cache."""
    if not sample.plans:
        return sample
    again = processor(record.messages, id=record.id, pixels="uint8")
    if again.media_keys != sample.media_keys:
        raise DataError(f"record {record.id}: its image changed on disk while training")
    return replace(sample, pixels=again.pixels)
