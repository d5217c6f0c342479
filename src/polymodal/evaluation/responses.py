"""Answers that were given once are kept, so that a run that was cut off goes on and nothing is asked twice.

An answer is kept under a hash of the model (`Backend.fingerprint`), the conversation with the content of its media, and
the sampling. The files are JSON lines in the user's cache folder, one a model and a process; what one write left
unfinished is left out when they are read. Failures are not kept: they are tried again.
"""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from polymodal.backends.base import Answer
from polymodal.errors import MediaError
from polymodal.generation.params import GenerationParams
from polymodal.media.source import describe, local_path, read_bytes
from polymodal.messages import FileSlice, Message, Source, TableCell, Text
from polymodal.utils.files import cache_folder, make_folder, regular_size, sha256_file, sha256_json, writing


class Responses:
    """The kept answers of one model."""

    def __init__(self, model: str, params: GenerationParams, rank: int = 0, on_disk: bool = True) -> None:
        self.model = model
        self.sampling = params.model_dump(mode="json")
        self.folder = cache_folder() / "responses" / model[:32]
        self.file = self.folder / f"answers-{rank}.jsonl"
        self.on_disk = on_disk
        self._known: dict[str, str] = {}
        for path in sorted(self.folder.glob("answers-*.jsonl")) if on_disk else ():
            for line in path.read_bytes().splitlines():
                try:
                    entry = json.loads(line)
                    self._known[entry["key"]] = entry["answer"]
                except (ValueError, KeyError, TypeError):
                    continue  # the end of a run that was killed while it wrote

    def key(self, messages: Sequence[Message], blind: bool = False) -> str:
        """The name of an answer; raises `MediaError` where a medium cannot be read."""
        turns = [[m.role, [p.text if isinstance(p, Text) else _content(p) for p in m.parts]] for m in messages]
        return sha256_json([self.model, self.sampling, turns, blind])

    def get(self, key: str) -> str | None:
        """An answer that was kept."""
        return self._known.get(key)

    def put(self, answers: Mapping[str, Answer]) -> None:
        """Keep answers; those of one call are kept together or not at all."""
        new = {key: answer for key, answer in answers.items() if isinstance(answer, str)}
        self._known.update(new)
        if not new or not self.on_disk:
            return
        make_folder(self.folder)
        lines = "".join(json.dumps({"key": k, "answer": a}) + "\n" for k, a in new.items()).encode()
        with writing(self.file):
            handle = os.open(self.file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
            try:
                if os.fstat(handle).st_size and not self._ends_a_line():
                    lines = b"\n" + lines
                os.write(handle, lines)
                os.fsync(handle)
            finally:
                os.close(handle)

    def _ends_a_line(self) -> bool:
        with self.file.open("rb") as file:
            file.seek(-1, os.SEEK_END)
            return file.read() == b"\n"


def _content(part: Any) -> list[str]:
    """A medium's kind and a hash of its content."""
    return [type(part).__name__.lower(), media_hash(part.source)]


def media_hash(source: Source) -> str:
    """Hash a medium's bytes."""
    if isinstance(source, str | Path) and not str(source).startswith("data:"):
        path = local_path(source, describe(source))
        regular_size(path, error=MediaError)
        info = path.stat()
        return _file_hash(path, info.st_size, info.st_mtime_ns)
    if isinstance(source, str | bytes | bytearray | memoryview | FileSlice | TableCell):
        return hashlib.sha256(read_bytes(source)).hexdigest()
    assert not isinstance(source, Path)
    return hashlib.sha256(repr((source.mode, source.size)).encode() + source.tobytes()).hexdigest()


@lru_cache(maxsize=100_000)
def _file_hash(path: Path, _size: int, _mtime: int) -> str:
    return sha256_file(path)
