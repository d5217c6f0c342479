"""Where a benchmark's rows come from: its official files, parquet of the Hugging Face dataset, or VLMEvalKit's TSV.

A row is a dict of plain values; a column of media holds sources (`messages.Source`) that nothing has read yet. What is
missing or cannot be used is said with the file, the row and the column.
"""

import ast
import base64
import binascii
import csv
import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from polymodal.data.readers.parquet import cells_of
from polymodal.errors import DataError, MediaError, first_line
from polymodal.media.source import open_table
from polymodal.messages import Image, Message, user
from polymodal.utils.files import cache_folder, make_folder, regular_size, writing

Row = dict[str, Any]

MAX_CELL = 48 * 2**20
"""The largest cell of a TSV: an image in base64."""
MAX_JSON = 2 * 2**30
"""The largest official file that is read whole."""


def find_file(folder: Path, *patterns: str) -> Path | None:
    """The file that one of some patterns names, the first pattern before the second and the outer file first."""
    for pattern in patterns:
        found = sorted(folder.rglob(pattern), key=lambda path: (len(path.parts), str(path)))
        if files := [path for path in found if path.is_file()]:
            return files[0]
    return None


def need_file(folder: Path, *patterns: str) -> Path:
    """The same; raises where there is none."""
    found = find_file(folder, *patterns)
    if found is None:
        raise DataError(f"{folder}: none of {', '.join(patterns)} is in it; give the folder with the benchmark's files")
    return found


def read_json(path: Path, *keys: str) -> Any:
    """An official JSON file; with keys, one object that must have them."""
    if regular_size(path, error=DataError) > MAX_JSON:
        raise DataError(f"{path}: is larger than {MAX_JSON:,} bytes; is it the right file?")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: cannot be read as JSON ({first_line(error)})") from None
    for key in keys:
        if not isinstance(data, dict) or key not in data:
            raise DataError(f"{path}: has no `{key}`; is it the right file?")
    return data


def read_lines(path: Path) -> Iterator[Row]:
    """The objects of a JSON Lines file."""
    regular_size(path, error=DataError)
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            try:
                row = json.loads(line) if line.strip() else None
            except ValueError as error:
                raise DataError(f"{path}: line {number} is no JSON ({first_line(error)})") from None
            if row is not None:
                yield row


def field(row: Any, key: str, where: str, *kinds: type) -> Any:
    """A value of a row, of the given types."""
    if not isinstance(row, Mapping) or key not in row:
        raise DataError(f"{where}: has no `{key}`; is it a file of this benchmark?")
    value = row[key]
    if (isinstance(value, bool) and bool not in kinds) or not isinstance(value, kinds):
        wanted = " or ".join(kind.__name__ for kind in kinds)
        raise DataError(f"{where}: `{key}` is {value!r:.60}, expected {wanted}")
    return value


def ask(text: str, *images: Any) -> tuple[Message, ...]:
    """A question about images, which come first."""
    return (user(*map(Image, images), text),)


def literal(value: Any, where: str) -> Any:
    """A value that a column keeps as the text of a Python literal, such as a list of options."""
    if not isinstance(value, str):
        return value
    try:
        return ast.literal_eval(value)
    except (ValueError, SyntaxError, MemoryError, RecursionError) as error:
        raise DataError(f"{where}: {value!r:.60} is no list ({first_line(error)})") from None


def table_rows(folder: Path, *patterns: str) -> Iterator[Row] | None:
    """The rows of parquet or TSV files under a folder; None where there are none of these patterns."""
    for pattern in patterns:
        files = sorted(path for path in folder.rglob(pattern) if path.is_file())
        if files:
            return (row for path in files for row in (parquet_rows if path.suffix == ".parquet" else tsv_rows)(path))
    return None


def parquet_rows(path: Path) -> Iterator[Row]:
    """The rows of a parquet file; a column of images, sounds or videos gives sources, one or a list."""
    import pyarrow

    with open_table(path, DataError) as file:
        schema = file.schema_arrow
        media = [name for name in schema.names if _is_media(schema.field(name).type, pyarrow)]
        plain = [name for name in schema.names if name not in media]
        for group in range(file.metadata.num_row_groups):
            try:
                rows = file.read_row_group(group, columns=plain).to_pylist()
                cells = {name: cells_of(path, file, group, name, path.parent, len(rows)) for name in media}
            except MediaError as error:
                raise DataError(f"{path}: {error}") from None
            except Exception as error:  # pyarrow raises many types for damaged pages
                raise DataError(f"{path}: row group {group} is damaged ({first_line(error)[:160]})") from None
            for number, row in enumerate(rows):
                found = {name: column[number] for name, column in cells.items()}
                yield {**row, **{name: each[0] if len(each) == 1 else each or None for name, each in found.items()}}


def _is_media(kind: Any, pyarrow: Any) -> bool:
    """Whether a column holds bytes: binary, a struct with `bytes`, or a list of these."""
    if pyarrow.types.is_list(kind) or pyarrow.types.is_large_list(kind):
        kind = kind.value_type
    if pyarrow.types.is_struct(kind):
        return any(kind.field(number).name == "bytes" for number in range(kind.num_fields))
    return bool(pyarrow.types.is_binary(kind) or pyarrow.types.is_large_binary(kind))


def tsv_rows(path: Path) -> Iterator[Row]:
    """The rows of VLMEvalKit's TSV; its images, in base64, are unpacked into the cache folder and given as paths."""
    # As there, a short cell of `image` is the `index` of the row whose image it shares, a list holds several images,
    # and `image_path` names files beside the TSV.
    regular_size(path, error=DataError)
    before = csv.field_size_limit(MAX_CELL)
    name = hashlib.sha256(f"{path.resolve()}:{path.stat().st_mtime_ns}".encode()).hexdigest()[:24]
    unpacked = cache_folder() / "tsv" / name
    shared: dict[str, Any] = {}
    number = 1
    try:
        with path.open(encoding="utf-8", newline="") as file:
            for number, row in enumerate(csv.DictReader(file, delimiter="\t"), 2):
                where = f"{path}: line {number}"
                if None in row or None in row.values():
                    raise DataError(f"{where}: has more or fewer cells than the first line")
                if image := row.get("image"):
                    row["image"] = _tsv_image(row, image, shared, unpacked, where)
                elif files := row.get("image_path"):
                    files = literal(files, where) if files.startswith("[") else [files]
                    row["image"] = [path.parent / file for file in files]
                yield row
    except csv.Error as error:
        raise DataError(f"{path}: line {number + 1}: {error}; at most {MAX_CELL:,} characters a cell") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: is no UTF-8 text ({error.reason})") from None
    finally:
        csv.field_size_limit(before)


def _tsv_image(row: Row, cell: str, shared: dict[str, Any], unpacked: Path, where: str) -> Any:
    index = str(row.get("index", ""))
    if len(cell) < 64:
        if cell not in shared:
            raise DataError(f"{where}: `image` is {cell!r}, which is the index of no row before it")
        return shared[cell]
    parts = literal(cell, where) if cell.startswith("[") else [cell]
    shared[index] = [_unpack(part, unpacked / f"{index}_{place}", where) for place, part in enumerate(parts)]
    return shared[index]


def _unpack(text: Any, file: Path, where: str) -> Path:
    if not file.name.replace("_", "").replace("-", "").isalnum():
        raise DataError(f"{where}: the index {file.name!r} is no name")
    if not file.exists():
        try:
            data = base64.b64decode(text, validate=True)
        except (binascii.Error, TypeError, ValueError) as error:
            raise DataError(f"{where}: `image` is no base64 ({first_line(error)})") from None
        make_folder(file.parent)
        with writing(file):
            part = file.with_name(f".{file.name}.tmp")
            part.write_bytes(data)
            part.replace(file)
    return file
