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
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from polymodal.data.readers.parquet import cells_of
from polymodal.errors import DataError, MediaError, first_line
from polymodal.media.source import open_table
from polymodal.utils.files import cache_folder, make_folder, regular_size, write_bytes

Row = dict[str, Any]


class TableRow(dict[str, Any]):
    """A row's values by column."""

    where = ""  # The file and the place in it, for error lines

    def text(self, *names: str, default: str | None = None) -> str:
        """A text or number under the first of some names that is there; the default where it is empty or "nan"."""
        value = next((self[name] for name in names if self.get(name) is not None), None)
        if value is None or value != value or (isinstance(value, str) and value.strip() in ("", "nan")):
            if default is None:
                problem = "is empty" if any(name in self for name in names) else "is not there"
                raise DataError(f"{self.where}: the column `{names[0]}` {problem}; is it a file of this benchmark?")
            return default
        return value if isinstance(value, str) else str(value)

    def images(self) -> list[Any]:
        """The sources in `image`, a list or one."""
        value = self.get("image")
        return value if isinstance(value, list) else [] if value is None or value == "" else [value]


def located(data: Any, where: str) -> TableRow:
    """A row of an official file."""
    if not isinstance(data, Mapping):
        raise DataError(f"{where}: expected an object, found {type(data).__name__}; is it a file of this benchmark?")
    row = TableRow(data)
    row.where = where
    return row


MAX_CELL = 48 * 2**20
"""The largest cell of a TSV: an image in base64."""
MAX_INDEX = 64
"""The longest cell of an image that is another row's index, as in VLMEvalKit."""
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


def file_in(folder: Path, *names: str) -> Path:
    """The first of some files that is there; the first of all where none is, so that reading it names it."""
    for name in names:
        if not Path(os.path.normpath(folder / name)).is_relative_to(os.path.normpath(folder)):
            raise DataError(f"{folder}: the file {name!r:.200} leaves the folder; its files must lie inside it")
    return next((folder / name for name in names if (folder / name).is_file()), folder / names[0])


def read_json(path: Path, *keys: str) -> Any:
    """An official JSON file; with keys, one object that must have them."""
    if regular_size(path, error=DataError) > MAX_JSON:
        raise DataError(f"{path}: is larger than {MAX_JSON:,} bytes; is it the right file?")
    try:
        data = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: cannot be read as JSON ({first_line(error)})") from None
    for key in keys:
        if not isinstance(data, dict) or key not in data:
            raise DataError(f"{path}: has no `{key}`; is it the right file?")
    return data


def text_lines(path: Path) -> Iterator[tuple[int, str]]:
    """The lines of a text file that are not blank, with their numbers from 1."""
    regular_size(path, error=DataError)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as UTF-8 text ({first_line(error)})") from None
    return ((number, line.rstrip("\r")) for number, line in enumerate(text.split("\n"), 1) if line.strip())


def read_lines(path: Path) -> Iterator[TableRow]:
    """The objects of a JSON Lines file."""
    regular_size(path, error=DataError)
    number = 0
    try:
        with path.open(encoding="utf-8-sig", newline="\n") as file:  # other ends of lines may stand in a text
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield located(json.loads(line), f"{path}: line {number}")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read ({first_line(error)})") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: line {number} is no JSON ({first_line(error)})") from None


def field(row: Any, key: str, where: str, *kinds: type) -> Any:
    """A value of a row, of the given types."""
    if not isinstance(row, Mapping) or key not in row:
        raise DataError(f"{where}: has no `{key}`; is it a file of this benchmark?")
    value = row[key]
    if (isinstance(value, bool) and bool not in kinds) or not isinstance(value, kinds):
        wanted = " or ".join(kind.__name__ for kind in kinds)
        raise DataError(f"{where}: `{key}` is {value!r:.60}, expected {wanted}")
    return value


def literal(value: Any, where: str) -> Any:
    """A value that a column keeps as the text of a Python literal, such as a list of options."""
    if not isinstance(value, str):
        return value
    try:
        return ast.literal_eval(value)
    except (ValueError, SyntaxError, MemoryError, RecursionError) as error:
        raise DataError(f"{where}: {value!r:.60} is no list ({first_line(error)})") from None


def table_rows(folder: Path, *patterns: str) -> Iterator[TableRow] | None:
    """The rows of parquet or TSV files under a folder; None where there are none of these patterns."""
    for pattern in patterns:
        files = sorted(path for path in folder.rglob(pattern) if path.is_file())
        if files:
            return (row for path in files for row in (parquet_rows if path.suffix == ".parquet" else tsv_rows)(path))
    return None


def need_rows(folder: Path, *patterns: str) -> Iterator[TableRow]:
    """The same; raises where there are none."""
    rows = table_rows(folder, *patterns)
    if rows is None:
        raise DataError(f"{folder}: none of {', '.join(patterns)} is in it; give the folder with this split's files")
    return rows


def parquet_rows(path: Path) -> Iterator[TableRow]:
    """The rows of a parquet file; a column of images, sounds or videos gives sources, one or a list."""
    with open_table(path, DataError) as file:
        import pyarrow

        schema = file.schema_arrow
        sources = [name for name in schema.names if _is_media(schema.field(name).type, pyarrow)]
        plain = [name for name in schema.names if name not in sources]
        before = 0
        for group in range(file.metadata.num_row_groups):
            try:
                rows = file.read_row_group(group, columns=plain).to_pylist() if plain else []
                rows = rows or [{} for _ in range(file.metadata.row_group(group).num_rows)]
                cells = {name: cells_of(path, file, group, name, path.parent, len(rows)) for name in sources}
            except MediaError as error:
                raise DataError(f"{path}: {error}") from None
            except Exception as error:  # pyarrow raises many types for damaged pages
                raise DataError(f"{path}: row group {group} is damaged ({first_line(error)[:160]})") from None
            for number, row in enumerate(rows):
                found = {name: column[number] for name, column in cells.items()}
                media = {name: each[0] if len(each) == 1 else each or None for name, each in found.items()}
                yield located({**row, **media}, f"{path}: row {before + number}")
            before += len(rows)


def _is_media(kind: Any, pyarrow: Any) -> bool:
    """Whether a column holds bytes: binary, a struct with `bytes`, or a list of these."""
    types = pyarrow.types
    within = (types.is_list, types.is_large_list, types.is_fixed_size_list, types.is_dictionary)
    while any(test(kind) for test in within):
        kind = kind.value_type
    if types.is_struct(kind):
        return any(kind.field(number).name == "bytes" for number in range(kind.num_fields))
    return bool(types.is_binary(kind) or types.is_large_binary(kind))


def tsv_rows(path: Path) -> Iterator[TableRow]:
    """The rows of VLMEvalKit's TSV; its images, in base64, are unpacked into the cache folder and given as paths."""
    # As there, a short cell of `image` is the `index` of the row whose image it shares, a list holds several images,
    # and `image_path` names files beside the TSV. Rows are kept until the last, since that index may come later.
    regular_size(path, error=DataError)
    csv.field_size_limit(max(csv.field_size_limit(), MAX_CELL))
    rows: list[tuple[str, Row]] = []
    images: dict[str, list[Path]] = {}
    number = 1
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, delimiter="\t", strict=True)  # else an open quote swallows what follows
            for row in reader:
                number, where = reader.line_num, f"{path}: line {reader.line_num}"
                if None in row or None in row.values():
                    raise DataError(f"{where}: has more or fewer cells than the first line")
                image, files, index = row.get("image"), row.get("image_path"), str(row.get("index", ""))
                if image and len(image) > MAX_INDEX:
                    images[index] = row["image"] = [_unpack(part, where) for part in _cell_list(image, where)]
                elif files and not image:
                    row["image"] = [_beside(path, name, where) for name in _cell_list(files, where)]
                rows.append((where, row))
    except csv.Error as error:
        raise DataError(f"{path}: after line {number}: {error}; at most {MAX_CELL:,} characters a cell") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as UTF-8 text ({first_line(error)})") from None
    for where, row in rows:
        if isinstance(image := row.get("image"), str) and image:
            if image not in images:
                raise DataError(f"{where}: `image` is {image!r}, which is the index of no row with an image")
            row["image"] = images[image]
        yield located(row, where)


def _cell_list(cell: str, where: str) -> list[Any]:
    """The parts of a cell that may hold a list."""
    parts = literal(cell, where) if cell.startswith("[") else [cell]
    return list(parts) if isinstance(parts, list | tuple) else [parts]


def _beside(path: Path, name: Any, where: str) -> Path:
    """A file beside a TSV."""
    folder = path.absolute().parent
    file = Path(os.path.normpath(folder / str(name)))  # links in the folder are followed, as in training data
    if not isinstance(name, str) or "\0" in name or not file.is_relative_to(folder):
        raise DataError(f"{where}: `image_path` {str(name)!r:.80} leaves the folder of {path.name}")
    return file


def _unpack(text: Any, where: str) -> Path:
    """The file of an image in base64, named by its content, whichever row or table it stands in."""
    if not isinstance(text, str):
        raise DataError(f"{where}: `image` holds {text!r:.60}, not base64")
    name = hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()[:32]
    file = cache_folder() / "tsv" / name[:2] / name
    if not file.exists():
        try:
            data = base64.b64decode("".join(text.split()), validate=True)
        except (binascii.Error, ValueError) as error:
            raise DataError(f"{where}: `image` is no base64 ({first_line(error)})") from None
        make_folder(file.parent)
        write_bytes(file, data)
    return file
