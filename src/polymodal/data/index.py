"""The tokenised rows of a data source in memory maps: built once, opened in a moment, read row by row.

A folder holds flat arrays of token ids and loss masks, where each row begins in them, its images' plans, places and
content hashes, and the rows themselves as records of our own, whatever form they came in (JSON, parquet, tar). So a
run starts without reading 600,000 rows of JSON, workers share the pages of one file, and a row that cannot be used
was found before the first step. What it was made from (data files, tokenizer, template, image rules) decides the
folder's name; the sizes and times of the images are compared when it is opened.

Rows that were longer than allowed are here too: `max_length` is applied by the reader, and may change.
"""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from polymodal.data.arrays import GrowingArray, open_array
from polymodal.data.load import iter_rows, record_from_json, record_to_json, row_record
from polymodal.data.readers.base import RawRow
from polymodal.data.readers.conversations import Record
from polymodal.data.readers.registry import data_files, detect_format
from polymodal.errors import DataError, PolymodalError, first_line
from polymodal.media_plan import AudioPlan, Box, ImagePlan, MediaPlan, Size, VideoPlan
from polymodal.messages import FileSlice, TableCell
from polymodal.processing.collate import Sample, Slot
from polymodal.processing.processor import Processor
from polymodal.utils.files import atomic_folder, sha256_file
from polymodal.utils.threads import Progress, ahead, quiet

VERSION = 2
INFO = "index.json"
MODALITIES = ("image", "video", "audio", "document")
CONTEXT_ARRAYS = ("contexts", "context_lengths")
MEDIA_COLUMNS = ("plan", "modality", "start", "length", "message")
"""What is known of each medium of a row, in `media.npy`."""

_DTYPES = {
    "<i4": ("tokens", "targets", "tiles", "media"),
    "<i8": ("rows", "token_offsets", "media_offsets", "record_offsets"),
    "|u1": ("digests", "keys"),
    "|b1": ("mask",),
}


@dataclass(frozen=True)
class Reading:
    """How a data source is read: the arguments of `load_records`, and which rows are taken."""

    path: Path  # The data file, folder or pattern
    image_root: Path | None = None  # Where media paths start; the file's own folder when None
    format: str = "auto"  # Its form, or "auto"
    annotations: Path | None = None  # The second file, of forms that have two
    kind: str = ""  # Of rows that name none
    source: str = ""  # Of rows that name none
    prompt: str | None = None  # The question of captions, or what follows each question
    draw: tuple[int, tuple[int, ...]] | None = None  # Take so many rows, chosen by this seed; all when None

    def rows(self) -> Iterator[RawRow]:
        """The rows of the source, all of them."""
        return iter_rows(
            self.path, self.image_root, format=self.format, annotations=self.annotations, prompt=self.prompt
        )


def open_index(
    folder: Path,
    reading: Reading,
    processor: Processor,
    *,
    skip_errors: bool = False,
    workers: int = 2,
    progress: Progress = quiet,
    log: Callable[[str], None] = lambda line: None,
) -> Index:
    """Open the index of a source, and build it where it is not there or its images changed."""
    about = identity(reading, processor)
    key = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]
    target = folder / f"{reading.path.stem.strip('*') or 'data'}-{key}"
    with _locked(folder, key):
        if (target / INFO).is_file():
            index = Index(target)
            changed = index.changed_media()
            if not changed:
                refuse(index.faults, skip_errors)
                return index
            log(f"{target.name}: {changed} changed since it was tokenised; tokenising {reading.path} again")
        for old in folder.glob(f".{target.name}.*"):  # of a process that was killed while it built this one
            shutil.rmtree(old, ignore_errors=True)
        with atomic_folder(target, replace=True) as work:
            build(work, about, reading, processor, skip_errors, workers, progress)
    return Index(target)


@contextmanager
def _locked(folder: Path, key: str) -> Iterator[None]:
    """Let one process build an index; the others wait, then open it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = (folder / f".{key}.lock").open("w")
    except OSError as error:
        raise DataError(f"{folder}: cannot be written ({error.strerror}); choose another data.index") from None
    with handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
        except OSError as error:  # some network file systems have no locks
            raise DataError(f"{folder}: cannot be locked ({error.strerror}); choose another data.index") from None
        yield


class Index:
    """An index, opened. Rows are counted from 0 over those that could be tokenised."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            self.info: dict[str, Any] = json.loads((folder / INFO).read_text(encoding="utf-8"))
            self._tokens, self._mask, self._media, self._keys = (
                open_array(folder / f"{name}.npy") for name in ("tokens", "mask", "media", "keys")
            )
            self._starts, self._media_starts, self._record_starts = (
                open_array(folder / f"{name}_offsets.npy") for name in ("token", "media", "record")
            )
            self.targets, self.tiles, self.rows, self.digests = (
                open_array(folder / f"{name}.npy") for name in ("targets", "tiles", "rows", "digests")
            )
            self.faults: list[dict[str, Any]] = list(_read_lines(folder / "faults.jsonl"))
        except (OSError, ValueError, EOFError, KeyError) as error:
            raise DataError(f"{folder}: the index is damaged ({first_line(error)}); remove the folder") from None
        self.lengths, self.images = np.diff(self._starts), np.diff(self._media_starts)
        self._plans = [_plan(plan) for plan in self.info["plans"]]
        self._contexts = self._context_starts = np.zeros(0, np.int64)
        if (folder / f"{CONTEXT_ARRAYS[0]}.npy").is_file():
            self._contexts, lengths = (open_array(folder / f"{name}.npy") for name in CONTEXT_ARRAYS)
            self._context_starts = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])

    def __len__(self) -> int:
        return len(self.targets)

    @cached_property
    def _records(self) -> np.ndarray:
        path = self.folder / "records.jsonl"
        return np.memmap(path, np.uint8, "r") if path.stat().st_size else np.zeros(0, np.uint8)

    def _plain(self, row: int) -> dict[str, Any]:
        start, end = self._record_starts[row], self._record_starts[row + 1]
        return json.loads(self._records[start:end].tobytes())  # type: ignore[no-any-return]

    def record(self, row: int) -> Record:
        """The row as a record."""
        return record_from_json(self._plain(row))

    def media_keys(self, row: int) -> tuple[str, ...]:
        """Content hashes of the row's media."""
        start, end = self._media_starts[row], self._media_starts[row + 1]
        return tuple(key.tobytes().hex() for key in self._keys[start:end])

    def _contexts_of(self, row: int) -> tuple[torch.Tensor, ...]:
        """What the projector reads beside each image of a row."""
        if not len(self._context_starts):
            return ()
        media = range(self._media_starts[row], self._media_starts[row + 1])
        starts = [(self._context_starts[medium], self._context_starts[medium + 1]) for medium in media]
        return tuple(torch.from_numpy(self._contexts[start:end].astype(np.int64)) for start, end in starts)

    def sample(self, row: int) -> Sample:
        """The row as tokens, without pixels."""
        start, end = self._starts[row], self._starts[row + 1]
        places = self._media[self._media_starts[row] : self._media_starts[row + 1]].tolist()
        return Sample(
            input_ids=torch.from_numpy(self._tokens[start:end].astype(np.int64)),
            loss_mask=torch.from_numpy(np.array(self._mask[start:end])),
            slots=tuple(Slot(MODALITIES[m], first, length, message) for _, m, first, length, message in places),
            plans=tuple(self._plans[plan] for plan, *_ in places),
            media_keys=self.media_keys(row),
            id=self._plain(row)["id"],
            contexts=self._contexts_of(row),
        )

    def changed_media(self) -> str:
        """The first medium whose file is not what it was; "" where all are."""

        def changed(batch: list[list[Any]]) -> str:
            return next((path for path, *stat in batch if stat_of(path) != stat), "")

        lines = list(_read_lines(self.folder / "files.jsonl"))
        batches = [lines[i : i + 2048] for i in range(0, len(lines), 2048)]
        return next((path for path in ahead(changed, batches, 8) if path), "")


def _plan(plain: dict[str, Any]) -> MediaPlan:
    """A plan from what `asdict` made of it; each class is known by a field that only it has."""

    def revive(value: Any) -> Any:
        if isinstance(value, list):
            return tuple(value)
        if not isinstance(value, dict):
            return value
        return _plan(value) if "grid" in value else Box(**value) if "top" in value else Size(**value)

    kind: Any = ImagePlan if "grid" in plain else VideoPlan if "times" in plain else AudioPlan
    return kind(**{name: revive(value) for name, value in plain.items()})  # type: ignore[no-any-return]


def identity(reading: Reading, processor: Processor) -> dict[str, Any]:
    """What an index is made from: two that agree in this hold the same."""
    form = detect_format(reading.path) if reading.format == "auto" else reading.format
    files = data_files(reading.path, form)
    tokenizer, config = processor.tokenizer, processor.config
    senses = {"video": config.video, "audio": config.audio}
    vocabulary = hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode())
    vocabulary.update(json.dumps([str(tokenizer.chat_template), tokenizer.special_tokens_map], default=str).encode())
    return {
        "version": VERSION,
        "files": [_file_identity(file, form) for file in files],
        "annotations": None if reading.annotations is None else sha256_file(reading.annotations),
        "image_root": os.path.abspath(reading.image_root or (files[0] if form == "folder" else files[0].parent)),
        "format": form,
        "labels": [reading.kind, reading.source, reading.prompt],
        "name": reading.path.stem,
        "draw": None if reading.draw is None else [reading.draw[0], list(reading.draw[1])],
        "tokenizer": vocabulary.hexdigest(),
        "image_token_id": processor.image_token_id,
        "template": config.template.model_dump(mode="json"),
        "image": None if config.image is None else config.image.model_dump(mode="json"),
        "tokens": None if processor.tokens is None else [processor.tokens.height, processor.tokens.width],
        # Not there unless it is true, so that indices from before there was a choice stay good.
        **({"last_answer_only": True} if processor.last_answer_only else {}),
        **({"context": processor.context.identity} if processor.context is not None else {}),
        **{kind: rules.model_dump(mode="json") for kind, rules in senses.items() if rules is not None},
        **({} if processor.window is None else {"window": dataclasses.asdict(processor.window)}),
        **({} if processor.codes is None else {"codes": processor.codes.identity}),
    }


def _file_identity(file: Path, form: str) -> Any:
    """A data file's content; of archives and folders, which hold the images too, names, sizes and times."""
    if form not in ("parquet", "webdataset", "folder"):
        try:
            return sha256_file(file)
        except OSError as error:
            raise DataError(f"{file}: cannot be read: {error.strerror}") from None
    members = sorted(file.rglob("*")) if file.is_dir() else [file]
    digest = hashlib.sha256()
    for member in members:
        digest.update(json.dumps([os.path.relpath(member, file), *stat_of(str(member))]).encode())
    return [file.name, digest.hexdigest()]


def build(
    work: Path,
    about: dict[str, Any],
    reading: Reading,
    processor: Processor,
    skip_errors: bool,
    workers: int,
    progress: Progress,
) -> None:
    """Write an index into an empty folder."""
    total = sum(1 for _ in reading.rows())
    taken: set[int] | None = None
    if reading.draw is not None and reading.draw[0] < total:
        count, seed = reading.draw
        taken = set(np.random.default_rng(list(seed)).permutation(total)[:count].tolist())
    writer = _Writer(work)

    def tokenise(row: RawRow) -> tuple[RawRow, Record | None, Sample | PolymodalError]:
        record = None
        try:
            record = row_record(row, kind=reading.kind, source=reading.source)
            return row, record, processor(record.messages, id=record.id, pixels=False)
        except PolymodalError as error:
            return row, record, error

    wanted = (row for row in reading.rows() if taken is None or row.number in taken)
    results = ahead(tokenise, wanted, workers)
    for row, record, result in progress(results, f"tokenising {reading.path.name}", len(taken or ()) or total):
        if record is None or isinstance(result, PolymodalError):
            assert isinstance(result, PolymodalError)
            fault = {"row": row.number, "where": row.where, "id": record.id if record else "", "error": str(result)}
            refuse([fault], skip_errors)
            writer.faults.append(fault)
        else:
            writer.add(row.number, record, result)
    writer.close(about)
    if processor.codes is not None:
        verify_codes(Index(work), processor)


def verify_codes(index: Index, processor: Processor, rows: int = 16) -> None:
    """Decode the codes of some rows of a new index, as they lie on disk, and compare with the rows' images."""
    codes, left = processor.codes, rows
    for row in range(len(index)) if codes is not None else ():
        parts, ids = processor.made_of_codes(index.record(row).messages), index.sample(row).input_ids.tolist()
        starts = [place for place, i in enumerate(ids) if codes is not None and i == codes.begin]
        assert codes is not None and len(starts) == len(parts)  # nothing else is written with `<boi>`
        for start, part in zip(starts, parts, strict=True):
            codes.verify(part.source, ids[start : start + codes.count + 2], f"{index.folder}: row {row}")
        left -= bool(parts)
        if not left:
            return


def refuse(faults: Sequence[dict[str, Any]], skip_errors: bool) -> None:
    """Raise what the first fault says, unless faults are allowed."""
    if faults and not skip_errors:
        first = faults[0]
        # What a reader says names the row already.
        raise DataError(f"record {first['id']}: {first['error']}" if first["id"] else first["error"])


class _Writer:
    """The files of an index while they are written."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.faults: list[dict[str, Any]] = []
        self._plans: dict[MediaPlan, int] = {}
        self._files: dict[str, list[int]] = {}
        self._records = (folder / "records.jsonl").open("wb")
        self._arrays: dict[str, GrowingArray] = {}
        for dtype, names in _DTYPES.items():
            for name in names:
                width = {"media": (len(MEDIA_COLUMNS),), "keys": (32,), "digests": (32,)}.get(name, ())
                self._arrays[name] = GrowingArray(folder / f"{name}.npy", dtype, width)
        self._ends()

    def _ends(self) -> None:
        self._arrays["token_offsets"].append(np.array(self._arrays["tokens"].rows))
        self._arrays["media_offsets"].append(np.array(self._arrays["media"].rows))
        self._arrays["record_offsets"].append(np.array(self._records.tell()))

    def add(self, number: int, record: Record, sample: Sample) -> None:
        """Append a row."""
        for message in record.messages:
            for part in message.media:
                path = media_file(part.source)
                if path is not None and path not in self._files:
                    self._files[path] = stat_of(path)
        line = json.dumps(record_to_json(record), ensure_ascii=False, separators=(",", ":")) + "\n"
        self._records.write(line.encode())
        arrays = self._arrays
        arrays["tokens"].append(sample.input_ids.numpy())
        arrays["mask"].append(sample.loss_mask.numpy())
        # The first token is never predicted, whatever its mask says.
        arrays["targets"].append(sample.loss_mask[1:].sum().numpy())
        arrays["rows"].append(np.array(number))
        arrays["tiles"].append(np.array(sum(plan.num_tiles for plan in sample.plans)))
        if sample.contexts:
            self._add_contexts(sample)
        arrays["digests"].append(np.frombuffer(sample_digest(sample), dtype=np.uint8))
        for plan, slot, key in zip(sample.plans, sample.slots, sample.media_keys, strict=True):
            which = self._plans.setdefault(plan, len(self._plans))
            place = [which, MODALITIES.index(slot.modality), slot.start, slot.length, slot.message]
            arrays["media"].append(np.array(place))
            arrays["keys"].append(np.frombuffer(bytes.fromhex(key), dtype=np.uint8))
        self._ends()

    def _add_contexts(self, sample: Sample) -> None:
        """Append what a projector reads beside each image; only its indices have these arrays."""
        for name in CONTEXT_ARRAYS:
            if name not in self._arrays:
                self._arrays[name] = GrowingArray(self.folder / f"{name}.npy", "<i4")
        for row in sample.contexts:
            self._arrays["contexts"].append(row.numpy())
            self._arrays["context_lengths"].append(np.array([len(row)]))

    def close(self, about: dict[str, Any]) -> None:
        """Finish every file; `index.json` comes last."""
        for array in self._arrays.values():
            array.close()
        self._records.close()
        counts = {name: self._arrays[name].rows for name in ("rows", "tokens", "media")}
        _write_lines(self.folder / "faults.jsonl", self.faults)
        _write_lines(self.folder / "files.jsonl", ([path, *stat] for path, stat in self._files.items()))
        info = {"about": about, "counts": counts, "plans": [dataclasses.asdict(plan) for plan in self._plans]}
        (self.folder / INFO).write_text(json.dumps(info, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def sample_digest(sample: Sample) -> bytes:
    """Hash a sample's tokens, mask, images and their contexts."""
    digest = hashlib.sha256()
    for part in (sample.input_ids, sample.loss_mask):
        digest.update(part.numpy().tobytes())
    digest.update("".join(sample.media_keys).encode())
    for row in sample.contexts:
        digest.update(row.numpy().tobytes())
    return digest.digest()


def media_file(source: object) -> str | None:
    """The file that a medium lies in; None where it is no file."""
    if isinstance(source, FileSlice | TableCell):
        return str(source.path)
    if isinstance(source, Path):
        return str(source)
    return None


def stat_of(path: str) -> list[int]:
    """Size and time of a file; [-1, 0] where there is none."""
    try:
        info = os.stat(path)
    except OSError:
        return [-1, 0]
    return [info.st_size, info.st_mtime_ns]


def _read_lines(path: Path) -> Iterator[Any]:
    with path.open(encoding="utf-8") as handle:
        for line in handle:
            yield json.loads(line)


def _write_lines(path: Path, lines: Iterable[Any]) -> None:
    with path.open("w", encoding="utf-8") as handle:
        for line in lines:
            handle.write(json.dumps(line, ensure_ascii=False) + "\n")
