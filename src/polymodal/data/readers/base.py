"""One row of a data file, before it is a conversation, and the few things that every reader needs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from polymodal.errors import DataError
from polymodal.messages import FileSlice, TableCell

SHORT_ANSWER = "Answer the question using a single word or phrase."
"""What LLaVA-1.5 writes after a question whose answer is short (Liu et al. 2023, arXiv:2310.03744, section 3.2)."""

CAPTION = "Provide a one-sentence caption for the provided image."
"""What LLaVA-1.5 asks where the answer is a caption; the "plain" template of stage 1 leaves it out."""

PICTURES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm"})
"""File names that mean a picture, in folders and archives."""

Medium: TypeAlias = "str | Path | FileSlice | TableCell"
"""Text is a path that is still to be located (and may be refused); the others are located already."""


@dataclass(frozen=True)
class RawRow:
    """One row.

    Attributes:
        number: Counted from 0 over all files of the source, broken rows too.
        where: File and row, as errors name it.
        data: The row as a record: an object with `conversations` or `messages`. None for a broken row.
        error: What is wrong with a broken row, in one line that starts with `where`.
        path: The file that holds the row.
        root: The folder that media paths are relative to and may not leave.
        line: The line it begins on in a JSON file, counted from 1; 0 elsewhere.
        form: The only form that is meant ("llava", "messages", "openai"), or "".
        kind: Of a row that names none.
        source: Of a row that names none.
        id: Of a row that names none.
    """

    number: int
    where: str
    data: Any
    error: DataError | None = None
    path: Path = Path()
    root: Path = Path()
    line: int = 0
    form: str = ""
    kind: str = ""
    source: str = ""
    id: str = ""


@dataclass(frozen=True)
class Options:
    """What a reader is told.

    Attributes:
        root: The folder that media paths are relative to and may not leave.
        annotations: The second file, of formats that have two.
        prompt: The question of captions, or what follows each question; the format's own when None.
    """

    root: Path
    annotations: Path | None = None
    prompt: str | None = None


Reader: TypeAlias = Callable[[Path, Options], Iterator[RawRow]]
"""Yields every row of one file, broken ones too; raises `DataError` where the file as a whole cannot be used."""


def broken(number: int, where: str, problem: str, path: Path) -> RawRow:
    """Make the row that stands for a broken one.

    Args:
        number: The row's.
        where: File and row.
        problem: What is wrong and what to do.
        path: The file.

    Returns:
        The row.
    """
    return RawRow(number, where, None, DataError(f"{where}: {problem}"), path=path)


def dialogue(pictures: Sequence[Medium], turns: Sequence[tuple[str, str]], **fields: Any) -> dict[str, Any]:
    """Make a record of pictures and then questions with answers. Text is text: `<image>` in it means nothing.

    Args:
        pictures: They stand before the first question.
        turns: Question and answer; an empty question leaves only the pictures.
        **fields: Others of the record, such as `id`.

    Returns:
        The record, in the `messages` form.
    """
    messages: list[dict[str, Any]] = []
    for index, (question, answer) in enumerate(turns):
        parts: list[dict[str, Any]] = [{"type": "image", "image": item} for item in pictures] if index == 0 else []
        if question:
            parts.append({"type": "text", "text": question})
        messages.append({"role": "user", "content": parts})
        messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    return {**fields, "messages": messages}


def asked(question: str, prompt: str | None, default: str = SHORT_ANSWER) -> str:
    """Put the prompt after a question, on a line of its own.

    Args:
        question: The question.
        prompt: What was asked for; "" for nothing.
        default: The prompt where that is None.

    Returns:
        The text of the user's turn.
    """
    prompt = default if prompt is None else prompt
    return f"{question}\n{prompt}" if prompt else question


def text_of(value: Any) -> str:
    """The text without outer space; "" for what is no text."""
    return value.strip() if isinstance(value, str) else ""


def best_answer(answers: Any) -> str:
    """Choose what is trained on where several people answered.

    Args:
        answers: Text, or a list of texts or of objects with `answer`.

    Returns:
        The most frequent answer, the first of these where several are; "" where there is none.
    """
    if not isinstance(answers, list):
        return text_of(answers)
    texts = [text_of(item.get("answer") if isinstance(item, dict) else item) for item in answers]
    counts = Counter(text for text in texts if text)
    return counts.most_common(1)[0][0] if counts else ""  # equal counts keep the order of the list
