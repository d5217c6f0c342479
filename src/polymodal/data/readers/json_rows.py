"""Rows of records: a JSON list or JSON Lines, in LLaVA's form, with `messages`, or as OpenAI's content parts."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from polymodal.data.readers.base import Options, RawRow, broken
from polymodal.data.readers.json_lines import LINES, file_form, text_rows


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
