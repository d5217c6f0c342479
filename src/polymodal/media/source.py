"""Bytes from a path, a `data:` URL, an archive, a cell of a parquet file or memory, never more than a limit.

Nothing is fetched over the network here: a training record or a request that names a URL must not make this program
open a connection. Error lines name the source in a form that is safe to print. A path may not climb out of the folder
that its data lie in; a symbolic link inside that folder is followed wherever it leads, since who made the folder made
the link, and image folders are often linked from another disk.

Parquet has no way to read one cell: a column is read a row group at a time. The last groups are kept, so that reading
in order costs one read a group; reading in random order costs one for each image. Hugging Face `datasets` writes groups
of about 100 images, which keeps that bearable. Where it is not, cache the features or convert the file.
"""

import base64
import binascii
import os
import re
import threading
from collections.abc import Callable
from functools import lru_cache, wraps
from pathlib import Path
from typing import Any, ParamSpec, TypeVar
from urllib.parse import unquote, unquote_to_bytes

from polymodal.errors import MediaError, PolymodalError, first_line
from polymodal.messages import FileSlice, Source, TableCell
from polymodal.utils.extras import extra
from polymodal.utils.files import home_path, regular_size

P = ParamSpec("P")
T = TypeVar("T")

MAX_BYTES = 128 * 2**20
"""The largest file that is read unless the caller says otherwise."""
MAX_GROUP_BYTES = 2 * 2**30
"""The largest row group of a parquet file, uncompressed, that is read."""

# Held while a row group is read: threads that want the same one wait for it instead of reading it again.
_LOCK = threading.Lock()
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+)://|(?i:(file)):(?=/)")


class NamedBytes(bytes):
    """A file's bytes that error lines call by a name, such as the place in a request that they came from."""

    name = ""
    decoders: Any = None  # `media.decoders.Decoders`, where they are not to be decoded in this process


def isolated(function: Callable[P, T]) -> Callable[P, T]:
    """A function that opens its first argument: in another process, where that asks for it."""

    @wraps(function)
    def opened(*args: P.args, **kwargs: P.kwargs) -> T:
        if (decoders := getattr(args[0] if args else None, "decoders", None)) is None:
            return function(*args, **kwargs)
        found: T = decoders.run(function.__name__, args[0], args[1:], kwargs)
        return found

    return opened


def describe(source: Source, kind: str = "image") -> str:
    """Name a source for an error line."""
    if isinstance(source, bytes | bytearray | memoryview):
        return getattr(source, "name", "") or f"{kind} of {len(source)} bytes"
    if isinstance(source, FileSlice):
        return f"{describe(source.path)}: {describe(source.name) if source.name else f'byte {source.offset}'}"
    if isinstance(source, TableCell):
        item = f"[{source.item}]" if source.item >= 0 else ""
        return f"{describe(source.path)}: row {source.row} of row group {source.group}, `{source.column}`{item}"
    if not isinstance(source, str | Path):
        return "image in memory"
    text = str(source)
    if text[:5].lower() == "data:":
        return "data: URL"
    shown = "".join(c if c.isprintable() else "?" for c in text)
    return shown if len(shown) <= 200 else f"{shown[:120]}...{shown[-60:]}"


def read_bytes(
    source: str | Path | bytes | FileSlice | TableCell, *, limit: int = MAX_BYTES, name: str | None = None
) -> bytes:
    """Read a source whole."""
    name = name or describe(source)
    if isinstance(source, bytes | bytearray | memoryview):
        _check_size(name, len(source), limit)
        data = bytes(source)
    elif isinstance(source, str) and source[:5].lower() == "data:":
        data = _data_url(source, limit, name)
    elif isinstance(source, str | Path):
        data = _file(local_path(source, name), limit, name)
    elif isinstance(source, FileSlice):
        data = _file(source.path, limit, name, source)
    elif isinstance(source, TableCell):
        data = read_cell(source, limit, name)
    else:
        raise MediaError(f"{name}: expected a path, a data: URL or bytes, got {type(source).__name__}")
    _check_size(name, len(data), limit)
    if not data:
        raise MediaError(f"{name}: the file is empty (0 bytes); give a file with content", "empty-file")
    return data


def local_path(source: str | Path, name: str) -> Path:
    """Turn a path or `file:` URL into a path; refuse every other URL."""
    if isinstance(source, Path):
        return source
    if not source.strip():
        raise MediaError("the path is empty; give a file")
    found = _SCHEME.match(source)
    if found is None:
        return home_path(source)
    scheme = (found[1] or found[2]).lower()
    if scheme == "file":
        return Path(from_file_url(source, name))
    if scheme in ("http", "https"):
        raise MediaError(f"{name}: remote fetch is off; download the file and give its path", "remote-file")
    raise MediaError(f"{name}: {scheme}: URLs cannot be read; give a path or a data: URL")


def from_file_url(text: str, name: str, error: type[PolymodalError] = MediaError) -> str:
    """The path that a `file:` URL names; any other text as it is."""
    found = _SCHEME.match(text)
    if found is None or (found[1] or found[2]).lower() != "file":
        return text
    host, slash, rest = text[found.end() :].partition("/")
    if host.lower() not in ("", "localhost") or not slash:
        raise error(f"{name}: a file: URL names a file of this machine, as file:///folder/image.png does")
    return unquote(f"/{rest}")


def _file(path: Path, limit: int, name: str, part: FileSlice | None = None) -> bytes:
    """Read a regular file, or a part of one; devices and pipes could block or never end."""
    size = regular_size(path, name, MediaError)
    _check_size(name, size if part is None else part.size, limit)
    try:
        with path.open("rb") as file:
            if part is None:
                data = file.read(limit + 1)  # the file may have grown since
            else:
                file.seek(part.offset)
                data = file.read(part.size)
                if len(data) < part.size:
                    raise MediaError(f"{name}: the file ends before it; it was cut off or has changed, fetch it again")
    except OSError as error:
        raise MediaError(f"{name}: cannot be read ({error.strerror}); check the path") from None
    return data


def _data_url(url: str, limit: int, name: str) -> bytes:
    """Decode `data:[type][;base64],payload`, checking the size before the work."""
    head, comma, payload = url.partition(",")
    if not comma:
        raise MediaError(f"{name}: has no comma; it must read data:image/png;base64,...")
    if head.lower().endswith(";base64"):
        if len(payload) > 4 * limit:  # room for percent escapes and line breaks; checked again after decoding
            _check_size(name, len(payload) * 3 // 4, limit)
        packed = re.sub(rb"\s", b"", unquote_to_bytes(payload)).translate(bytes.maketrans(b"-_", b"+/"))
        try:
            data = base64.b64decode(packed + b"=" * (-len(packed) % 4), validate=True)
        except binascii.Error:
            raise MediaError(f"{name}: its base64 is damaged; encode the file again", "damaged-image") from None
    else:
        _check_size(name, len(payload) // 3, limit)
        data = unquote_to_bytes(payload)
    return data


def _check_size(name: str, size: int, limit: int) -> None:
    if size > limit:
        problem = f"{size:,} bytes, at most {limit:,} are allowed; make the file smaller"
        raise MediaError(f"{name}: {problem}", "too-many-pixels")


def open_table(path: Path, error: type[PolymodalError] = MediaError) -> Any:
    """Open a parquet file."""
    regular_size(path, error=error)
    parquet = extra("pyarrow.parquet", f"{path}: reading parquet needs", "polymodal[data]", error)
    try:
        file = parquet.ParquetFile(path)
        leaves = [file.schema.column(index) for index in range(len(file.schema))]
        # A value that a page names a thousand times stays one value in memory.
        texts = [leaf.path for leaf in leaves if leaf.physical_type == "BYTE_ARRAY"]
        return parquet.ParquetFile(path, read_dictionary=texts)
    except Exception as reason:  # pyarrow raises many types for damaged files
        raise error(f"{path}: not a whole parquet file ({first_line(reason)[:160]}); fetch it again") from None


def read_column(path: Path, group: int, column: str) -> Any:
    """Read one column of one row group; the last two stay in memory."""
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
            problem = f"column `{column}` of row group {group} is damaged ({first_line(error)[:160]}); fetch it again"
            raise MediaError(f"{path}: {problem}", "damaged-image") from None


def read_cell(cell: TableCell, limit: int, name: str) -> bytes:
    """Read a cell's bytes."""
    column = read_column(cell.path, cell.group, cell.column)
    if not 0 <= cell.row < len(column):
        raise MediaError(f"{name}: no such row; the file has changed")
    value = column[cell.row]
    if cell.item >= 0 and value.is_valid:
        if cell.item >= len(value):
            raise MediaError(f"{name}: no such image; the file has changed")
        value = value[cell.item]
    if hasattr(value, "keys") and value.is_valid:  # a struct
        if "bytes" not in value:
            raise MediaError(f"{name}: has no `bytes`; the file is damaged or has changed", "damaged-image")
        if not value["bytes"].is_valid and cell.root is not None and "path" in value and value["path"].is_valid:
            return _at_path(str(value["path"].as_py()), cell.root, limit, name)
        value = value["bytes"]
    if not value.is_valid:
        raise MediaError(f"{name}: the cell is empty; give the image's bytes")
    if hasattr(value, "dictionary"):
        value = value.value
    if not hasattr(value, "as_buffer"):
        raise MediaError(f"{name}: holds {value.type}, not bytes; the file is damaged or has changed", "damaged-image")
    buffer = value.as_buffer()
    _check_size(name, buffer.size, limit)
    return bytes(buffer.to_pybytes())


def _at_path(value: str, root: Path, limit: int, name: str) -> bytes:
    """Read the file that a cell names in place of its bytes; links inside the folder are followed."""
    path = Path(os.path.normpath(root.absolute() / value))
    if not path.is_relative_to(os.path.normpath(root.absolute())):
        raise MediaError(f"{name}: {value!r} leaves the folder {root}; media must lie inside it")
    return read_bytes(path, limit=limit, name=f"{name}: {describe(path)}")
