"""Read a data file: a JSON list, or JSON Lines (one object a line). Errors name the file and the record or line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from polymodal.data.formats import Record, read_record
from polymodal.errors import DataError

__all__ = ["Record", "load_records"]


def load_records(path: Path, image_root: Path | None = None) -> list[Record]:
    """Read all records of a file, checking every one.

    Args:
        path: A file that holds a JSON list of records, or one record a line.
        image_root: The folder that media paths are relative to and may not leave; the file's own folder when None.

    Returns:
        The records, in order.

    Raises:
        DataError: The file or a record cannot be used; names the file, the line or index, and the field.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text (byte {error.start}); save it as UTF-8") from None
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None
    rows = _rows_of_list(text, path) if text.lstrip()[:1] == "[" else _rows_of_lines(text, path)
    if not rows:
        raise DataError(f"{path}: the file holds no records")
    root = path.parent if image_root is None else Path(image_root)
    return [read_record(row, root, where, default_id=f"{path.stem}-{index}") for index, (row, where) in enumerate(rows)]


def _rows_of_list(text: str, path: Path) -> list[tuple[Any, str]]:
    try:
        rows = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise DataError(f"{path}: {_explain(error)}") from None
    return [(row, f"{path}: record {index}") for index, row in enumerate(rows)]


def _rows_of_lines(text: str, path: Path) -> list[tuple[Any, str]]:
    rows: list[tuple[Any, str]] = []
    for number, line in enumerate(text.split("\n"), start=1):  # not splitlines: U+2028 may stand inside a string
        if not line.strip():
            continue
        try:
            rows.append((json.loads(line), f"{path}: line {number}"))
        except (json.JSONDecodeError, RecursionError) as error:
            hint = "expected a JSON list, or one object a line"
            raise DataError(f"{path}: line {number}: {_explain(error, with_line=False)}; {hint}") from None
    return rows


def _explain(error: Exception, *, with_line: bool = True) -> str:
    """Say what is wrong with JSON text."""
    if not isinstance(error, json.JSONDecodeError):
        return "the JSON is nested too deeply"
    line = f"line {error.lineno} " if with_line else ""
    return f"not valid JSON: {error.msg} ({line}column {error.colno})"
