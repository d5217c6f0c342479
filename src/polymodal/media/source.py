"""Bytes from a path, a `data:` URL, a place in an archive or memory, never more than a limit.

Nothing is fetched over the network here: a training record or a request that names a URL must not make this program
open a connection. Error lines name the source in a form that is safe to print.
"""

from __future__ import annotations

import base64
import binascii
import re
import stat
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote, unquote_to_bytes

from polymodal.errors import MediaError
from polymodal.messages import FileSlice, TableCell

if TYPE_CHECKING:
    from polymodal.messages import Source

MAX_BYTES = 128 * 2**20
"""The largest file that is read unless the caller says otherwise."""

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+)://")


def describe(source: Source) -> str:
    """Name a source for an error line.

    Args:
        source: A path, a `data:` URL, bytes, a place in an archive, or a picture in memory.

    Returns:
        One short printable line.
    """
    if isinstance(source, bytes | bytearray | memoryview):
        return f"picture of {len(source)} bytes"
    if isinstance(source, FileSlice):
        return f"{describe(source.path)}: {describe(source.name) if source.name else f'byte {source.offset}'}"
    if isinstance(source, TableCell):
        item = f"[{source.item}]" if source.item >= 0 else ""
        return f"{describe(source.path)}: row {source.row} of row group {source.group}, `{source.column}`{item}"
    if not isinstance(source, str | Path):
        return "picture in memory"
    text = str(source)
    if text[:5].lower() == "data:":
        return "data: URL"
    shown = "".join(c if c.isprintable() else "?" for c in text)
    return shown if len(shown) <= 200 else f"{shown[:120]}...{shown[-60:]}"


def read_bytes(
    source: str | Path | bytes | FileSlice | TableCell, *, limit: int = MAX_BYTES, name: str | None = None
) -> bytes:
    """Read a source whole.

    Args:
        source: A path, a `file:` or `data:` URL, a place in an archive, or the bytes themselves.
        limit: The most bytes allowed.
        name: What an error calls the source; made from the source when None.

    Returns:
        The bytes; never empty.

    Raises:
        MediaError: The source is missing, empty, a directory, remote, not decodable or larger than `limit`.
    """
    name = name or describe(source)
    if isinstance(source, bytes | bytearray | memoryview):
        data = bytes(source) if len(source) <= limit else _too_large(name, len(source), limit)
    elif isinstance(source, str) and source[:5].lower() == "data:":
        data = _data_url(source, limit, name)
    elif isinstance(source, str | Path):
        data = _file(_local_path(source, name), limit, name)
    elif isinstance(source, FileSlice):
        data = _file(source.path, limit, name, source)
    elif isinstance(source, TableCell):
        from polymodal.media.table import read_cell

        data = read_cell(source, limit, name)
    else:
        raise MediaError(f"{name}: expected a path, a data: URL or bytes, got {type(source).__name__}")
    if not data:
        raise MediaError(f"{name}: the file is empty (0 bytes); give a file with content")
    return data


def _local_path(source: str | Path, name: str) -> Path:
    """Turn a path or `file:` URL into a path; refuse every other URL."""
    if isinstance(source, Path):
        return source
    if not source.strip():
        raise MediaError("the path of a picture is empty; give a file")
    found = _SCHEME.match(source)
    if found is None:
        return Path(source).expanduser()
    scheme = found[1].lower()
    if scheme == "file":
        rest = unquote(source[found.end() :])
        return Path(rest[len("localhost") :] if rest.startswith("localhost/") else rest)
    if scheme in ("http", "https"):
        raise MediaError(f"{name}: remote fetch is off; download the file and give its path")
    raise MediaError(f"{name}: {scheme}: URLs cannot be read; give a path or a data: URL")


def _file(path: Path, limit: int, name: str, part: FileSlice | None = None) -> bytes:
    """Read a regular file, or a part of one; devices and pipes could block or never end."""
    try:
        info = path.stat()
        if stat.S_ISDIR(info.st_mode):
            raise MediaError(f"{name}: is a directory; give a file")
        if not stat.S_ISREG(info.st_mode):
            raise MediaError(f"{name}: is not a regular file; give a file")
        size = info.st_size if part is None else part.size
        if size > limit:
            _too_large(name, size, limit)
        with path.open("rb") as file:
            if part is None:
                data = file.read(limit + 1)  # the file may have grown since
            else:
                file.seek(part.offset)
                data = file.read(part.size)
                if len(data) < part.size:
                    raise MediaError(f"{name}: the file ends before it; it was cut off or has changed, fetch it again")
    except FileNotFoundError:
        raise MediaError(f"{name}: no such file; check the path") from None
    except PermissionError:
        raise MediaError(f"{name}: no permission to read; check the file's mode") from None
    except (OSError, ValueError) as error:  # ValueError: a null character in the path
        reason = getattr(error, "strerror", None) or str(error)
        raise MediaError(f"{name}: cannot be read ({reason}); check the path") from None
    return data if len(data) <= limit else _too_large(name, len(data), limit)


def _data_url(url: str, limit: int, name: str) -> bytes:
    """Decode `data:[type][;base64],payload`, checking the size before the work."""
    head, comma, payload = url.partition(",")
    if not comma:
        raise MediaError(f"{name}: has no comma; it must read data:image/png;base64,...")
    if head.lower().endswith(";base64"):
        if len(payload) > 4 * limit:  # room for percent escapes and line breaks; checked again after decoding
            _too_large(name, len(payload) * 3 // 4, limit)
        packed = re.sub(rb"\s", b"", unquote_to_bytes(payload)).translate(bytes.maketrans(b"-_", b"+/"))
        try:
            data = base64.b64decode(packed + b"=" * (-len(packed) % 4), validate=True)
        except binascii.Error:
            raise MediaError(f"{name}: its base64 is damaged; encode the file again") from None
    else:
        if len(payload) > 3 * limit:
            _too_large(name, len(payload) // 3, limit)
        data = unquote_to_bytes(payload)
    return data if len(data) <= limit else _too_large(name, len(data), limit)


def _too_large(name: str, size: int, limit: int) -> bytes:
    """Raise; typed as bytes so that it can stand where data would."""
    raise MediaError(f"{name}: {size:,} bytes, at most {limit:,} are allowed; make the file smaller")
