"""One row of a data file, before it is a conversation, and the few things that every reader needs."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any, TypeAlias

from polymodal.errors import DataError
from polymodal.messages import FileSlice, TableCell
from polymodal.utils.files import regular_size

SHORT_ANSWER = "Answer the question using a single word or phrase."
"""What LLaVA-1.5 writes after a question whose answer is short (Liu et al. 2023, arXiv:2310.03744, section 3.2)."""

CAPTION = "Provide a one-sentence caption for the provided image."
"""What LLaVA-1.5 asks where the answer is a caption; the "plain" template of stage 1 leaves it out."""

IMAGES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm"})
"""File names that mean an image, in folders and archives."""

PACKED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")
"""How files begin that gzip, bzip2, xz and zstd wrote."""

Medium: TypeAlias = "str | Path | FileSlice | TableCell"
"""Text is a path that is still to be located (and may be refused); the others are located already."""


@dataclass(frozen=True)
class RawRow:
    """One row."""

    where: str  # File and row, as errors name it
    data: Any  # The row as a record: an object with `conversations` or `messages`. None for a broken row
    error: DataError | None = None  # What is wrong with a broken row, in one line that starts with `where`
    line: int = 0  # The line it begins on in a JSON file, counted from 1; 0 elsewhere
    text: str = ""  # Its text in a JSON file, unchanged (bytes that are not UTF-8 are surrogates); "" elsewhere
    form: str = ""  # The only form that is meant ("llava", "messages", "openai"), or ""
    kind: str = ""  # Of a row that names none
    id: str = ""  # Of a row that names none
    # The rest is filled in by `iter_rows`.
    number: int = -1  # Counted from 0 over all files of the source, broken rows too
    root: Path = Path()  # The folder that media paths are relative to and may not leave
    source: str = ""  # Of a row that names none


@dataclass(frozen=True)
class Options:
    """What a reader is told."""

    root: Path  # The folder that media paths are relative to and may not leave
    annotations: Path | None = None  # The second file, of formats that have two
    prompt: str | None = None  # The question of captions, or what follows each question; the format's own when None


Reader: TypeAlias = Callable[[Path, Options], Iterator[RawRow]]
"""Yields every row of one file, broken ones too; raises `DataError` where the file as a whole cannot be used."""


class Layout:
    """Where a dataset's images lie under the root: people unpack archives with and without their folders."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._choice: int | None = None

    def choose(self, *names: str) -> str:
        """Pick an image's name; the first image decides for all, so that millions are not looked for."""
        if self._choice is None:
            there = [index for index, name in enumerate(names) if (self._root / name).is_file()]
            self._choice = there[0] if there else 0
        return names[self._choice]


@contextmanager
def open_file(path: Path) -> Iterator[BufferedReader]:
    """Open a data file."""
    regular_size(path, error=DataError)
    try:
        with path.open("rb") as file:
            yield file
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None


def broken(where: str, problem: str, code: str = "broken-row", **fields: Any) -> RawRow:
    """Make the row that stands for a broken one."""
    return RawRow(where, None, DataError(f"{where}: {problem}", code), **fields)


def dialogue(images: Sequence[Medium], turns: Sequence[tuple[str, str]], **fields: Any) -> dict[str, Any]:
    """Make a record of images and then questions with answers. Text is text: `<image>` in it means nothing."""
    messages: list[dict[str, Any]] = []
    for index, (question, answer) in enumerate(turns):
        parts: list[dict[str, Any]] = [{"type": "image", "image": item} for item in images] if index == 0 else []
        if question:
            parts.append({"type": "text", "text": question})
        messages.append({"role": "user", "content": parts})
        messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    return {**fields, "messages": messages}


def caption_of(images: Sequence[Medium], text: str, options: Options, **fields: Any) -> dict[str, Any]:
    """Make a record of a caption."""
    return dialogue(images, [(CAPTION if options.prompt is None else options.prompt, text)], **fields)


def question_of(
    images: Sequence[Medium], question: str, answer: str, options: Options, default: str = SHORT_ANSWER, **fields: Any
) -> dict[str, Any]:
    """Make a record of a question, with the prompt after it on a line of its own."""
    prompt = default if options.prompt is None else options.prompt
    return dialogue(images, [(f"{question}\n{prompt}" if prompt else question, answer)], **fields)


def object_of(value: Any) -> dict[str, Any]:
    """An object as it is; an empty one for what is none, so that its fields are found to be missing."""
    return value if isinstance(value, dict) else {}


def text_of(value: Any) -> str:
    """The text without outer space; "" for what is no text."""
    return value.strip() if isinstance(value, str) else ""


def best_answer(answers: Any) -> str:
    """Choose what is trained on where several people answered."""
    if not isinstance(answers, list):
        return text_of(answers)
    texts = [text_of(item.get("answer") if isinstance(item, dict) else item) for item in answers]
    counts = Counter(text for text in texts if text)
    return counts.most_common(1)[0][0] if counts else ""  # equal counts keep the order of the list
