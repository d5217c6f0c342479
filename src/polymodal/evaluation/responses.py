"""Answers that were given once are kept, so that a run that was cut off goes on and nothing is asked twice.

An answer is kept under a hash of the model (`Backend.fingerprint`), the conversation with the content of its media, the
sampling, and the batch size that was asked for. The files are JSON lines in the user's cache folder, one a model and a
process; a line holds the answers of one batch, and what a write left unfinished is left out when they are read.
Failures are not kept: they are tried again.
"""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path

from polymodal.backends.base import Answer
from polymodal.errors import MediaError
from polymodal.generation.params import GenerationParams
from polymodal.media.source import describe, local_path, read_bytes
from polymodal.messages import FileSlice, Media, Message, Source, TableCell, Text, said_of
from polymodal.utils.files import cache_folder, make_folder, regular_size, sha256_file, sha256_json, writing

Turn = tuple[str, list[str | list[str]]]
"""A message as it is hashed: its role, and its parts; a medium by its kind, its content and what is asked of it."""


class Responses:
    """The kept answers of one model."""

    def __init__(
        self, model: str, params: GenerationParams, batch: int | None = None, rank: int = 0, on_disk: bool = True
    ) -> None:
        self.how = [model, params.plain]
        self.among = "" if batch is None else f"@{batch}"  # answers of batches of another size may be others
        folder = cache_folder() / "responses" / model[:32]
        self.file = folder / f"answers-{rank}.jsonl"
        self.on_disk = on_disk
        self._known: dict[str, str] = {}
        if not on_disk:
            return
        make_folder(folder, "answers are kept there (--no-cache keeps none): ")
        for path in sorted(folder.glob("answers-*.jsonl")):
            with path.open("rb") as file:
                for line in file:
                    self._read(line)

    def _read(self, line: bytes) -> None:
        try:
            answers = json.loads(line)["answers"]
            self._known.update({key: answer for key, answer in answers.items() if isinstance(answer, str)})
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            pass  # an empty line, or the end of a run that was killed while it wrote

    def key(self, messages: Sequence[Message], blind: bool = False, turns: Sequence[Turn] | None = None) -> str:
        """The name of an answer, of `turns_of` where that is known; raises `MediaError` as it does."""
        return sha256_json([*self.how, turns_of(messages) if turns is None else turns, blind])

    def name(self, what: object) -> str:
        """The name of a remark on how answers were taken, which is kept among them."""
        return sha256_json([*self.how, what])

    def get(self, key: str) -> str | None:
        """An answer that was kept."""
        return self._known.get(key + self.among)

    def put(self, answers: Mapping[str, Answer]) -> None:
        """Keep answers; those of one call are kept together or not at all."""
        new = {key + self.among: answer for key, answer in answers.items() if isinstance(answer, str)}
        self._known.update(new)
        if not new or not self.on_disk:
            return
        # One write to the end of the file, which begins a line whatever stands there: two runs may share the file, and
        # one before them may have been killed in the middle of a line.
        with writing(self.file), self.file.open("ab") as file:
            file.write(b"\n" + json.dumps({"answers": new}).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())


def turns_of(messages: Sequence[Message]) -> list[Turn]:
    """A conversation with the content of its media; raises `MediaError` where one cannot be read."""
    return [(m.role, [p.text if isinstance(p, Text) else _content(p) for p in m.parts]) for m in messages]


def _content(part: Media) -> list[str]:
    """A medium's kind, a hash of its content, and what is asked of it where that is not left to the model."""
    said = said_of(part)
    return [type(part).__name__.lower(), media_hash(part.source), *([json.dumps(said, sort_keys=True)] if said else [])]


def media_hash(source: Source) -> str:
    """Hash a medium's bytes."""
    if isinstance(source, str | Path) and not str(source).startswith("data:"):
        path = local_path(source, describe(source))
        regular_size(path, error=MediaError)
        try:
            info = path.stat()
            return _file_hash(path, info.st_size, info.st_mtime_ns)
        except OSError as error:
            raise MediaError(f"{describe(source)}: cannot be read ({error.strerror}); check the path") from None
    if isinstance(source, str | bytes | bytearray | memoryview | FileSlice | TableCell):
        return hashlib.sha256(read_bytes(source)).hexdigest()
    assert not isinstance(source, Path)
    return hashlib.sha256(repr((source.mode, source.size)).encode() + source.tobytes()).hexdigest()


@lru_cache(maxsize=100_000)
def _file_hash(path: Path, _size: int, _mtime: int) -> str:
    return sha256_file(path)
