"""Read Qt's resource files (.rcc): a folder tree in one file, entries plain or deflated.

Big-endian: `qres`, version, then the offsets of tree, data and names. A node of the tree is a name's offset, flags and,
for a folder, the count and place of its children, for a file its language and the offset of its bytes, which follow
their length. A name is its length, a hash and UTF-16.
"""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

from polymodal.errors import DataError

_DEFLATED, _FOLDER, _ZSTANDARD = 1, 2, 4
MOST_NODES, MOST_BYTES = 100_000, 256 * 2**20


def read_rcc(path: Path) -> dict[str, bytes]:
    """The files inside a resource file, by their path in it."""
    data = path.read_bytes()
    try:
        return _read(data)
    except (struct.error, zlib.error, UnicodeDecodeError, ValueError) as error:
        raise DataError(f"{path}: damaged, or no resource file of Qt ({error})") from None


def _read(data: bytes) -> dict[str, bytes]:
    magic, version, tree, start, names = struct.unpack_from(">4sIIII", data)
    if magic != b"qres" or not 1 <= version <= 3:
        raise ValueError(f"starts with {magic!r}, version {version}")
    size = 14 if version == 1 else 22  # a date was added
    found: dict[str, bytes] = {}
    waiting, seen = [(0, "")], 0
    while waiting:
        node, above = waiting.pop()
        seen += 1
        if seen > MOST_NODES:
            raise ValueError(f"more than {MOST_NODES:,} entries")
        place = tree + node * size
        name, flags = struct.unpack_from(">IH", data, place)
        inside = f"{above}/{_name(data, names + name)}".lstrip("/") if node else ""
        if flags & _FOLDER:
            count, first = struct.unpack_from(">II", data, place + 6)
            waiting += [(first + child, inside) for child in reversed(range(min(count, MOST_NODES)))]
        else:
            (offset,) = struct.unpack_from(">I", data, place + 10)
            found[inside] = _content(data, start + offset, flags)
    return found


def _name(data: bytes, place: int) -> str:
    (length,) = struct.unpack_from(">H", data, place)
    return _cut(data, place + 6, 2 * length).decode("utf-16-be")


def _content(data: bytes, place: int, flags: int) -> bytes:
    (length,) = struct.unpack_from(">I", data, place)
    content = _cut(data, place + 4, length)
    if flags & _ZSTANDARD:
        raise ValueError("an entry is packed with Zstandard, which is not read here")
    if flags & _DEFLATED:  # the size it unpacks to comes first
        unpacking = zlib.decompressobj()
        content = unpacking.decompress(content[4:], MOST_BYTES)
        if unpacking.unconsumed_tail:
            raise ValueError(f"an entry unpacks to more than {MOST_BYTES:,} bytes")
    return content


def _cut(data: bytes, place: int, length: int) -> bytes:
    if place + length > len(data):
        raise ValueError("it is cut off")
    return data[place : place + length]
