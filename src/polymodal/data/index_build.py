"""How an index is written: every row of a source tokenised once, streamed into growing arrays.

The parts of `data.index` that are needed only while an index is built.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib import format as npy

from polymodal.data.load import iter_rows, record_to_json, row_record
from polymodal.data.readers.base import RawRow
from polymodal.data.readers.conversations import Record
from polymodal.data.readers.registry import data_files, detect_format
from polymodal.errors import DataError, PolymodalError
from polymodal.media_plan import ImagePlan
from polymodal.messages import FileSlice, TableCell
from polymodal.processing.collate import Sample
from polymodal.processing.processor import Processor
from polymodal.utils.files import sha256_file
from polymodal.utils.threads import Progress, ahead

# ---- .npy files that grow while they are written, and memory maps of them afterwards ----


class GrowingArray:
    """Writes an .npy file row by row; the header's room for the number of rows is filled in at the end."""

    def __init__(self, path: Path, dtype: str, row: tuple[int, ...] = ()) -> None:
        self.dtype, self.row, self.rows = np.dtype(dtype), row, 0
        self._file = path.open("wb")
        self._header()

    def append(self, values: np.ndarray) -> None:
        """Append rows: [n, *row]."""
        block = np.ascontiguousarray(values, dtype=self.dtype).reshape(-1, *self.row)
        self._file.write(block.tobytes())
        self.rows += len(block)

    def close(self) -> None:
        """Write the final header and close the file."""
        end = self._file.tell()
        self._file.seek(0)
        length = self._header()
        assert end == length + self.rows * self.dtype.itemsize * int(np.prod(self.row, initial=1))
        self._file.close()

    def _header(self) -> int:
        # NumPy pads the header so that its length does not depend on the number of rows.
        shape = (self.rows, *self.row)
        npy.write_array_header_1_0(
            self._file, {"descr": npy.dtype_to_descr(self.dtype), "fortran_order": False, "shape": shape}
        )
        return self._file.tell()


def open_array(path: Path) -> np.ndarray:
    """Map an .npy file into memory, for reading."""
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)  # type: ignore[no-any-return]
    except ValueError:  # nothing can be mapped of an array without rows
        return np.load(path, allow_pickle=False)  # type: ignore[no-any-return]


VERSION = 1
INFO = "index.json"
MODALITIES = ("image", "video", "audio", "document")
CONTEXT_ARRAYS = ("contexts", "context_lengths")
MEDIA_COLUMNS = ("plan", "modality", "start", "length", "message")
"""What is known of each medium of a row, in `media.npy`."""


@dataclass(frozen=True)
class Reading:
    """How a data source is read; the arguments of `records.load_records`, and which rows are taken."""

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


def identity(reading: Reading, processor: Processor) -> dict[str, Any]:
    """What an index is made from: two that agree in this hold the same."""
    form = detect_format(reading.path) if reading.format == "auto" else reading.format
    files = data_files(reading.path, form)
    tokenizer, config = processor.tokenizer, processor.config
    vocabulary = hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode())
    vocabulary.update(json.dumps([str(tokenizer.chat_template), tokenizer.special_tokens_map], default=str).encode())
    return {
        "version": VERSION,
        "files": [_file_identity(file, form) for file in files],
        "annotations": None if reading.annotations is None else sha256_file(reading.annotations),
        "image_root": str(
            Path(os.path.abspath(reading.image_root or (files[0] if form == "folder" else files[0].parent)))
        ),
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
        self._plans: dict[ImagePlan, int] = {}
        self._files: dict[str, list[int]] = {}
        self._records = (folder / "records.jsonl").open("wb")
        self._arrays = {
            "tokens": GrowingArray(folder / "tokens.npy", "<i4"),
            "mask": GrowingArray(folder / "mask.npy", "|b1"),
            "targets": GrowingArray(folder / "targets.npy", "<i4"),
            "rows": GrowingArray(folder / "rows.npy", "<i8"),
            "tiles": GrowingArray(folder / "tiles.npy", "<i4"),
            "digests": GrowingArray(folder / "digests.npy", "|u1", (32,)),
            "media": GrowingArray(folder / "media.npy", "<i4", (len(MEDIA_COLUMNS),)),
            "keys": GrowingArray(folder / "keys.npy", "|u1", (32,)),
            "token_offsets": GrowingArray(folder / "token_offsets.npy", "<i8"),
            "media_offsets": GrowingArray(folder / "media_offsets.npy", "<i8"),
            "record_offsets": GrowingArray(folder / "record_offsets.npy", "<i8"),
        }
        self._ends()

    def _ends(self) -> None:
        for name, end in (
            ("token_offsets", self._arrays["tokens"].rows),
            ("media_offsets", self._arrays["media"].rows),
            ("record_offsets", self._records.tell()),
        ):
            self._arrays[name].append(np.array([end]))

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
        arrays["targets"].append(np.array([int(sample.loss_mask[1:].sum())]))
        arrays["rows"].append(np.array([number]))
        arrays["tiles"].append(np.array([sum(plan.num_tiles for plan in sample.plans)]))
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


def _write_lines(path: Path, lines: Iterable[Any]) -> None:
    with path.open("w", encoding="utf-8") as handle:
        for line in lines:
            handle.write(json.dumps(line, ensure_ascii=False) + "\n")
