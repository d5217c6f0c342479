"""The rows of a JSON or JSONL file one after the other, with line and text, so that one broken row costs one row.

`load_records` stops at the first mistake, as training must. Checking must not: a row that is cut, or is not UTF-8,
is handed on as broken and the rows after it are read. A JSON list is parsed element by element; after a broken
element the next object that is a row (and not a turn inside one) is looked for.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from polymodal.data.readers.base import Options, RawRow, broken
from polymodal.errors import DataError

LIST, LINES = "list", "lines"
_DECODER = json.JSONDecoder()
_SPACE = re.compile(r"[ \t\r\n]*")
_NEXT_OBJECT = re.compile(r"\}\s*,\s*(?=\{)|\n\s*(?=\{)")
_INVALID = re.compile("[\udc80-\udcff]")


@dataclass(frozen=True)
class TextRow:
    """One row as it stands in the file."""

    number: int  # Counted from 0, broken rows too
    line: int  # The line it begins on, counted from 1
    text: str  # Its JSON text, unchanged; bytes that are not UTF-8 are surrogates
    data: Any  # The parsed value; None for a broken row
    code: str = ""  # "" or the fault that kept it from being parsed, of `faults.FAULTS`
    error: str = ""  # What is wrong, in words


def file_form(path: Path) -> str:
    """Tell a JSON list from JSON Lines by the first character that is no space."""
    try:
        with path.open("rb") as handle:
            while block := handle.read(4096):
                if first := block.removeprefix(b"\xef\xbb\xbf").lstrip()[:1]:
                    return LIST if first == b"[" else LINES
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None
    raise DataError(f"{path}: the file holds no records")


def text_rows(path: Path) -> Iterator[TextRow]:
    """Read the rows of a JSON list or JSONL file."""
    if file_form(path) == LIST:
        yield from _of_list(path.read_bytes().decode("utf-8-sig", "surrogateescape"))
    else:
        yield from _of_lines(path)


def _of_lines(path: Path) -> Iterator[TextRow]:
    number = 0
    with path.open("rb") as handle:
        for line, raw in enumerate(handle, start=1):  # by \n alone: U+2028 may stand inside a string
            text = raw.decode("utf-8-sig" if line == 1 else "utf-8", "surrogateescape").strip("\r\n")
            if not text.strip():
                continue
            yield _row(number, line, text)
            number += 1


def _of_list(text: str) -> Iterator[TextRow]:
    number, line, counted = 0, 1, 0
    row: TextRow | None = None
    position = _skip(text, text.index("[") + 1)
    while position < len(text) and text[position] != "]":
        line += text.count("\n", counted, position)
        counted = position
        end, row = _element(text, position, number, line)
        yield row
        number += 1
        position = _skip(text, end)
        if text[position : position + 1] == ",":
            position = _skip(text, position + 1)
    if position >= len(text) and (row is None or not row.code):
        line += text.count("\n", counted)
        yield TextRow(number, line, "", None, "broken-json", "the list is not closed: its end is missing")


def _element(text: str, start: int, number: int, line: int) -> tuple[int, TextRow]:
    """Parse one element of a list; its end, and the row."""
    try:
        data, end = _DECODER.raw_decode(text, start)
        after = _skip(text, end)
        if text[after : after + 1] in (",", "]", ""):
            return end, _not_utf8(number, line, text[start:end]) or TextRow(number, line, text[start:end], data)
        error: Exception = json.JSONDecodeError("Expecting ',' delimiter", text, after)
    except (ValueError, RecursionError) as found:
        error = found
    end = _resume(text, start)
    return end, TextRow(number, line, text[start:end], None, "broken-json", explain(error))


def _resume(text: str, start: int) -> int:
    """Where a broken element ends: before the next object that is a row, or at the end of the list."""
    for match in _NEXT_OBJECT.finditer(text, start):
        try:
            data, end = _DECODER.raw_decode(text, match.end())
        except (ValueError, RecursionError):
            continue
        after = _skip(text, end)
        is_turn = not isinstance(data, dict) or not {"from", "role", "type"}.isdisjoint(data)
        if not is_turn and text[after : after + 1] in (",", "]"):
            return match.end()
    return len(text.rstrip().removesuffix("]"))


def _not_utf8(number: int, line: int, text: str) -> TextRow | None:
    found = _INVALID.search(text)
    if found is None:
        return None
    return TextRow(number, line, text, None, "not-utf8", f"not UTF-8 text (character {found.start() + 1})")


def _row(number: int, line: int, text: str) -> TextRow:
    try:
        return _not_utf8(number, line, text) or TextRow(number, line, text, json.loads(text))
    except (ValueError, RecursionError) as error:
        return TextRow(number, line, text, None, "broken-json", explain(error))


def _skip(text: str, position: int) -> int:
    match = _SPACE.match(text, position)
    return match.end() if match else position


def explain(error: Exception) -> str:
    """Say what is wrong with JSON text, in a few words."""
    if isinstance(error, json.JSONDecodeError):
        return f"not valid JSON: {error.msg} (column {error.colno})"
    return "a number has too many digits" if isinstance(error, ValueError) else "the JSON is nested too deeply"


# ---- Rows of records: a JSON list or JSON Lines, in LLaVA's form, with `messages`, or as OpenAI's content parts ----


def read_any(path: Path, options: Options) -> Iterator[RawRow]:
    """Read rows that may be in LLaVA's form or have `messages`, each as its keys say."""
    return _rows(path, options, "")


def read_llava(path: Path, options: Options) -> Iterator[RawRow]:
    """Read rows with `conversations`."""
    return _rows(path, options, "llava")


def read_messages(path: Path, options: Options) -> Iterator[RawRow]:
    """Read rows with `messages` and lists of media beside them."""
    return _rows(path, options, "messages")


def read_openai(path: Path, options: Options) -> Iterator[RawRow]:
    """Read rows with `messages` (or rows that are the list of messages), where `<image>` in text is text."""
    for row in _rows(path, options, "openai"):
        if isinstance(row.data, list):
            yield RawRow(**{**row.__dict__, "data": {"messages": row.data}})
        else:
            yield row


def _rows(path: Path, options: Options, form: str) -> Iterator[RawRow]:
    lines = file_form(path) == LINES
    for row in text_rows(path):
        where = f"{path}: line {row.line}" if lines else f"{path}: record {row.number}"
        if row.error:
            hint = "; expected a JSON list, or one object a line" if lines else f" (line {row.line})"
            yield broken(row.number, where, f"{row.error}{hint}", path)
            continue
        yield RawRow(
            row.number,
            where,
            row.data,
            path=path,
            root=options.root,
            line=row.line,
            form=form,
            kind="conversation",
            id=f"{path.stem}-{row.number}",
        )
