"""The header of a safetensors file, read by ourselves before the library maps the file.

Layout: 8 bytes little-endian, the length of the header; the header, a JSON object of tensors {dtype, shape,
data_offsets} and an optional "__metadata__"; then the data without holes. The library checks the same, but names
neither file nor tensor; and a header alone says what a folder holds without loading any of it. Numbers in it are only
compared, never used to allocate: a header may claim a terabyte.
Source: the format's own description (huggingface/safetensors, README), whose rules are kept one by one.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from polymodal.errors import CheckpointError, first_line

MAX_HEADER = 100_000_000
"""Bytes of a header; the format's own limit."""
MAX_NAME = 1000
"""Characters of a tensor's name."""
METADATA = "__metadata__"

BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "U16": 16, "I16": 16, "F16": 16, "BF16": 16, "U32": 32, "I32": 32, "F32": 32,
    "U64": 64, "I64": 64, "F64": 64, "C64": 64, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
}  # fmt: skip
"""Bits of one number of each type."""


@dataclass(frozen=True)
class TensorInfo:
    """What a header says about a tensor."""

    dtype: str  # As the format writes it, such as "F32" or "BF16"
    shape: tuple[int, ...]  # Its shape
    num_bytes: int  # Its size in the file

    @property
    def numel(self) -> int:
        """How many numbers it has."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Header:
    """A file's tensors and free text."""

    tensors: dict[str, TensorInfo]  # By name, in the order of the data
    metadata: dict[str, str]  # What the writer noted, such as {"format": "pt"}


def read_header(path: Path) -> Header:
    """Read and check a safetensors file's header; the data is not touched."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            text, begin = _header_text(path, file, size)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror or error})") from error
    try:
        document = json.loads(text, object_pairs_hook=_no_duplicates, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: the header is not valid JSON ({first_line(error)})") from None
    if not isinstance(document, dict):
        raise CheckpointError(f"{path}: the header is not an object")
    metadata = document.pop(METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(f"{path}: {METADATA} must map texts to texts")
    return Header(_tensors(path, document, size - begin), metadata)


def _header_text(path: Path, file: BinaryIO, size: int) -> tuple[bytes, int]:
    """The header's bytes and where the data begins."""
    prefix = file.read(8)
    if len(prefix) < 8:
        raise CheckpointError(f"{path}: too short for safetensors ({size} bytes)")
    length = int.from_bytes(prefix, "little")
    if length > MAX_HEADER:
        raise CheckpointError(f"{path}: the header claims {length:,} bytes; this is no safetensors file, or damaged")
    if 8 + length > size:
        raise CheckpointError(f"{path}: cut short: the header claims {length:,} bytes, the file has {size:,}")
    text = file.read(length)
    if not text.startswith(b"{"):
        raise CheckpointError(f"{path}: the header does not begin with an object; this is no safetensors file")
    return text, 8 + length


def _tensors(path: Path, document: dict[str, Any], available: int) -> dict[str, TensorInfo]:
    """Check every entry, then that together they fill the data exactly."""
    entries = [(*_entry(path, name, value), name) for name, value in document.items()]
    entries.sort(key=lambda entry: entry[:2])
    found: dict[str, TensorInfo] = {}
    position, before = 0, ""
    for begin, end, info, name in entries:
        if end > available:
            raise CheckpointError(
                f"{path}: tensor {_shown(name)} ends at byte {end:,} of {available:,}; the file is cut short or damaged"
            )
        if begin < position:
            raise CheckpointError(f"{path}: tensors {_shown(before)} and {_shown(name)} overlap")
        if begin > position:
            raise CheckpointError(f"{path}: {begin - position:,} bytes before tensor {_shown(name)} belong to nobody")
        found[name] = info
        position, before = end, name
    if position != available:
        raise CheckpointError(f"{path}: {available - position:,} bytes after the last tensor belong to nobody")
    return found


def _entry(path: Path, name: str, value: Any) -> tuple[int, int, TensorInfo]:
    """One tensor of the header: where it begins and ends, and what it is."""
    where = f"{path}: tensor {_shown(name)}"
    if len(name) > MAX_NAME:
        raise CheckpointError(f"{where}: a name of {len(name):,} characters")
    if not isinstance(value, dict) or value.keys() != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{where}: dtype, shape and data_offsets are expected, and nothing else")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BITS:
        raise CheckpointError(f"{where}: unknown dtype {str(dtype)[:20]!r}")
    if not _counts(shape):
        raise CheckpointError(f"{where}: the shape must be whole numbers, none negative")
    if not _counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise CheckpointError(f"{where}: data_offsets must be two whole numbers, the first not above the second")
    bits = math.prod(shape) * BITS[dtype]
    begin, end = offsets
    if bits != 8 * (end - begin):
        takes = f"{-(-bits // 8):,} bytes" if bits < 1 << 66 else "more bytes than any file has"
        raise CheckpointError(
            f"{where}: {dtype} of shape {_shape(shape)} takes {takes}, data_offsets give {end - begin:,}"
        )
    return begin, end, TensorInfo(dtype, tuple(shape), end - begin)


def _counts(value: Any) -> bool:
    """Whether something is a list of whole numbers that a file can have, and not too many of them."""
    return (
        isinstance(value, list)
        and len(value) <= 64
        and all(isinstance(number, int) and not isinstance(number, bool) and 0 <= number < 1 << 63 for number in value)
    )


def _shape(shape: list[int]) -> str:
    return f"[{', '.join(map(str, shape[:8]))}{', ...' if len(shape) > 8 else ''}]"


def _shown(name: str) -> str:
    return repr(name if len(name) <= 100 else name[:100] + "...")


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise ValueError(f"{_shown(twice)} is there twice")
    return found


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no number of JSON")
