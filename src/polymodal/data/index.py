"""The tokenised rows of a data source in memory maps: built once, opened in a moment, read row by row.

A folder holds flat arrays of token ids and loss masks, where each row begins in them, its images' plans, places and
content hashes, and the rows themselves as records of our own, whatever form they came in (JSON, parquet, tar). So a
run starts without reading 600,000 rows of JSON, workers share the pages of one file, and a row that cannot be used
was found before the first step. What it was made from (data files, tokenizer, template, image rules) decides the
folder's name; the sizes and times of the images are compared when it is opened.

Rows that were longer than allowed are here too: `max_length` is applied by the reader, and may change.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from polymodal.data import index_build
from polymodal.data.index_build import CONTEXT_ARRAYS, INFO, MODALITIES, Reading, identity, open_array, stat_of
from polymodal.data.load import record_from_json
from polymodal.data.readers.conversations import Record
from polymodal.errors import DataError, first_line
from polymodal.media_plan import Box, ImagePlan, Size
from polymodal.processing.collate import Sample, Slot
from polymodal.processing.processor import Processor
from polymodal.utils.files import atomic_folder
from polymodal.utils.threads import Progress, ahead, quiet


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
                index_build.refuse(index.faults, skip_errors)
                return index
            log(f"{target.name}: {changed} changed since it was tokenised; tokenising {reading.path} again")
        for old in folder.glob(f".{target.name}.*"):  # of a process that was killed while it built this one
            shutil.rmtree(old, ignore_errors=True)
        with atomic_folder(target, replace=True) as work:
            index_build.build(work, about, reading, processor, skip_errors, workers, progress)
    return Index(target)


class Index:
    """An index, opened. Rows are counted from 0 over those that could be tokenised."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            self.info: dict[str, Any] = json.loads((folder / INFO).read_text(encoding="utf-8"))
            self._tokens, self._mask, self._media, self._keys = (
                open_array(folder / f"{name}.npy") for name in ("tokens", "mask", "media", "keys")
            )
            names = ("token_offsets", "media_offsets", "record_offsets", "targets", "tiles", "rows", "digests")
            arrays = {name: open_array(folder / f"{name}.npy") for name in names}
            self.faults: list[dict[str, Any]] = list(_read_lines(folder / "faults.jsonl"))
        except (OSError, ValueError, EOFError, KeyError) as error:
            raise DataError(f"{folder}: the index is damaged ({first_line(error)}); remove the folder") from None
        self._starts, self._media_starts = arrays["token_offsets"], arrays["media_offsets"]
        self._record_starts = arrays["record_offsets"]
        self.targets, self.tiles, self.rows, self.digests = (
            arrays[name] for name in ("targets", "tiles", "rows", "digests")
        )
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
        """Content hashes of the row's images."""
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


def _plan(plain: dict[str, Any]) -> ImagePlan:
    def revive(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return Box(**value) if "top" in value else Size(**value)

    return ImagePlan(**{name: revive(value) for name, value in plain.items()})


def _read_lines(path: Path) -> Iterator[Any]:
    with path.open(encoding="utf-8") as handle:
        for line in handle:
            yield json.loads(line)


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
