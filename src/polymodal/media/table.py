"""Bytes of one cell of a parquet file, the way Hugging Face `datasets` stores pictures.

Parquet has no way to read one cell: a column is read a row group at a time. The last groups are kept, so that reading
in order costs one read a group; reading in random order costs one for each picture. `datasets` writes groups of about
100 pictures, which keeps that bearable; a group too large for memory is refused. Where it is not, cache the features
or convert the file.
"""

from __future__ import annotations

import os
import threading
from functools import lru_cache
from pathlib import Path
from typing import Any

from polymodal.errors import MediaError, first_line
from polymodal.media.source import describe, read_bytes
from polymodal.messages import TableCell

MAX_GROUP_BYTES = 2 * 2**30
"""The largest row group, uncompressed, that is read."""

_LOCK = threading.Lock()
"""Held while a group is read: threads that want the same group wait for it instead of reading it again."""


def open_table(path: Path, error: type[Exception] = MediaError) -> Any:
    """Open a parquet file.

    Args:
        path: The file.
        error: What to raise.

    Returns:
        A `pyarrow.parquet.ParquetFile`.

    Raises:
        Exception: `error`, with one line: pyarrow is missing, or the file is missing or not a parquet file.
    """
    try:
        import pyarrow.parquet as parquet
    except ImportError:
        raise error(f"{path}: reading parquet needs pyarrow; pip install 'polymodal[data]'") from None
    try:
        return parquet.ParquetFile(path)
    except FileNotFoundError:
        raise error(f"{path}: no such file") from None
    except Exception as reason:  # pyarrow raises many types for damaged files
        raise error(f"{path}: not a whole parquet file ({first_line(reason)[:160]}); fetch it again") from None


def read_column(path: Path, group: int, column: str) -> Any:
    """Read one column of one row group; the last two stay in memory.

    Args:
        path: The parquet file.
        group: Row group, from 0.
        column: The column.

    Returns:
        A `pyarrow.ChunkedArray`.

    Raises:
        MediaError: The file cannot be read, or the column is too large or damaged.
    """
    try:
        info = path.stat()
    except OSError as error:
        raise MediaError(f"{path}: cannot be read ({error.strerror}); check the path") from None
    with _LOCK:
        return _column(path, info.st_mtime_ns, info.st_size, group, column)


@lru_cache(maxsize=2)
def _column(path: Path, _mtime: int, _size: int, group: int, column: str) -> Any:
    with open_table(path) as file:
        if not 0 <= group < file.metadata.num_row_groups or column not in file.schema_arrow.names:
            raise MediaError(f"{path}: no column `{column}` in row group {group}; the file has changed")
        size = file.metadata.row_group(group).total_byte_size
        if size > MAX_GROUP_BYTES:
            raise MediaError(
                f"{path}: row group {group} has {size:,} bytes, at most {MAX_GROUP_BYTES:,} are allowed; write the "
                "file with smaller row groups"
            )
        try:
            return file.read_row_group(group, columns=[column]).column(column)
        except Exception as error:  # pyarrow raises many types for damaged pages
            raise MediaError(
                f"{path}: column `{column}` of row group {group} is damaged ({first_line(error)[:160]}); fetch it again"
            ) from None


def read_cell(cell: TableCell, limit: int, name: str) -> bytes:
    """Read a cell's bytes.

    Args:
        cell: Which.
        limit: The most bytes allowed.
        name: What an error calls the source.

    Returns:
        The bytes.

    Raises:
        MediaError: The cell is missing, empty or too large, or the file cannot be read.
    """
    column = read_column(cell.path, cell.group, cell.column)
    if not 0 <= cell.row < len(column):
        raise MediaError(f"{name}: no such row; the file has changed")
    value = column[cell.row]
    if cell.item >= 0 and value.is_valid:
        if cell.item >= len(value):
            raise MediaError(f"{name}: no such picture; the file has changed")
        value = value[cell.item]
    if hasattr(value, "keys") and value.is_valid:  # a struct
        if "bytes" not in value:
            raise MediaError(f"{name}: has no `bytes`; the file is damaged or has changed")
        if not value["bytes"].is_valid and cell.root is not None and "path" in value and value["path"].is_valid:
            return _at_path(str(value["path"].as_py()), cell.root, limit, name)
        value = value["bytes"]
    if not value.is_valid:
        raise MediaError(f"{name}: the cell is empty; give the picture's bytes")
    if not hasattr(value, "as_buffer"):
        raise MediaError(f"{name}: holds {value.type}, not bytes; the file is damaged or has changed")
    buffer = value.as_buffer()
    if buffer.size > limit:
        raise MediaError(f"{name}: {buffer.size:,} bytes, at most {limit:,} are allowed; make the file smaller")
    return bytes(buffer.to_pybytes())


def _at_path(value: str, root: Path, limit: int, name: str) -> bytes:
    """Read the file that a cell names in place of its bytes."""
    path = Path(os.path.normpath(root.absolute() / value))
    if not path.is_relative_to(os.path.normpath(root.absolute())):
        raise MediaError(f"{name}: {value!r} leaves the folder {root}; media must lie inside it")
    return read_bytes(path, limit=limit, name=f"{name}: {describe(path)}")
