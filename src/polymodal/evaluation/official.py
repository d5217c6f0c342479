"""What the benchmarks' modules share: official files turned into the columns that parquet has.

The forms of a benchmark name their columns differently; readers ask for a column by all the names that it has.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from polymodal.errors import DataError
from polymodal.evaluation.files import Row, field, find_file, literal, parquet_rows, read_json, tsv_rows

WHERE = " where"
"""A column in which a reader says a row's place, where that is not the file's row of the same number."""


def rows_in(
    folder: Path, official: Mapping[str, Callable[[Path], Iterable[Row]]], *tables: str
) -> Iterator[tuple[str, Row]]:
    """The rows of the first form whose files a folder holds, each with its place: official files, or all of a table."""
    readers = {**official, **{name: parquet_rows if name.endswith(".parquet") else tsv_rows for name in tables}}
    for pattern, read in readers.items():
        first = find_file(folder, pattern)
        if first is None:
            continue
        shards = sorted(path for path in folder.rglob(pattern) if path.is_file()) if "*" in pattern else [first]
        if other := next((file for file in shards if file.parent != first.parent), None):
            raise DataError(f"{pattern} is in {first.parent} and in {other.parent}; give the folder of this benchmark")
        for file in shards:
            for number, row in enumerate(read(file)):
                yield row.get(WHERE) or f"{file}: row {number}", row
        return
    raise DataError(f"{folder}: none of {', '.join(readers)} is in it; give the folder with the benchmark's files")


def json_list(path: Path, key: str = "") -> list[Row]:
    """The objects that an official JSON file lists, under a key or as a whole."""
    rows = field(read_json(path, key) if key else {"": read_json(path)}, key, str(path), list)
    return [object_of(row, f"{path}: row {number}") for number, row in enumerate(rows)]


def object_of(value: Any, where: str) -> Row:
    """A value that is an object of JSON."""
    if not isinstance(value, dict):
        raise DataError(f"{where} is {value!r:.60}, expected an object")
    return value


def named(row: Row, *names: str) -> str:
    """The first of some names that a column has in the forms of a benchmark which this row has."""
    return next((name for name in names if name in row), names[0])


def id_of(row: Row, where: str, *names: str) -> str:
    """The number that a benchmark knows a question or an image by, as text."""
    name = named(row, *names)
    value = field(row, name, where, int, str)
    if not str(value).isdecimal():
        raise DataError(f"{where}: `{name}` is {value!r:.60}, expected a number")
    return str(int(value))


def text_of(row: Row, where: str, *names: str) -> str:
    """A column of texts."""
    return str(field(row, named(row, *names), where, str))


def texts_of(row: Row, where: str, *names: str, secret: bool = False) -> tuple[str, ...]:
    """A column of one text or several; where they are secret it may be missing, or have empty ones."""
    name = named(row, *names)
    given = row.get(name)
    if secret and (given is None or given == "" or (isinstance(given, list) and not any(given))):
        return ()
    value = field(row, name, where, list, str)
    if isinstance(value, str):  # of a TSV
        value = literal(value, where) if value.startswith("[") else [value]
    if not value:
        raise DataError(f"{where}: `{name}` is empty")
    return tuple(field({name: text}, name, where, str) for text in value)


def image_of(row: Row, where: str) -> Any:
    """The one image of a row."""
    images = row.get("image") or ()
    images = images if isinstance(images, list | tuple) else [images]
    if len(images) != 1:
        raise DataError(f"{where}: `image` holds {len(images)} images, expected one; is it a file of this benchmark?")
    return images[0]


def keyed(path: Path, rows: Iterable[Row], key: str) -> Callable[[Any], Row]:
    """Look-up among rows by a key that each has for itself."""
    found: dict[str, Row] = {}
    for number, row in enumerate(rows):
        name = str(field(row, key, f"{path}: row {number}", int, str))
        if name in found:
            raise DataError(f"{path}: row {number}: `{key}` {name} comes twice; take one of the two out")
        found[name] = row

    def look_up(name: Any) -> Row:
        if str(name) not in found:
            raise DataError(f"{path}: has nothing about `{key}` {name}; is it of the same split?")
        return found[str(name)]

    return look_up


def with_images(folder: Path, path: Path, rows: Sequence[Row], column: str = "image") -> list[Row]:
    """Put paths in `image` for the names in a column of an official file: all from where most of the first ones lie."""
    names = [text_of(row, f"{path}: row {number}", column) for number, row in enumerate(rows)]
    for name in names:
        if ".." in PurePosixPath(name).parts or PurePosixPath(name).is_absolute():
            raise DataError(f"{path}: the image {name!r} leaves the folder")
    first, best, chosen, short = names[:50], 0, folder, False
    for place in _folders(folder):
        for bare in (False, True):  # documents/x.png may lie in spdocvqa_images/x.png
            count = sum((place / (name.rpartition("/")[2] if bare else name)).is_file() for name in first)
            if count > best:
                best, chosen, short = count, place, bare
        if best == len(first):
            break
    if names and not best:
        raise DataError(f"{folder}: neither {names[0]} nor the images after it are in it; put them into a folder there")
    shown = (name.rpartition("/")[2] if short else name for name in names)
    return [{**row, "image": chosen / name} for row, name in zip(rows, shown)]


def _folders(folder: Path) -> Iterator[Path]:
    """A folder and all below it, through links too, each once."""
    seen = set()
    for place, below, _ in os.walk(folder, followlinks=True):
        below[:] = sorted(below)
        if (real := os.path.realpath(place)) in seen:
            below.clear()
        else:
            seen.add(real)
            yield Path(place)
