"""Where a benchmark's rows come from: its official files, parquet of the Hugging Face dataset, or VLMEvalKit's TSV.

A row knows its place, and is asked for a column by all the names that the forms of a benchmark have for it. A column of
media holds sources (`messages.Source`) that nothing has read yet. What is missing or cannot be used is said with the
file, the row and the column.
"""

import ast
import base64
import binascii
import csv
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from string import ascii_uppercase
from typing import Any, TypeVar

from polymodal.data.readers.parquet import cells_of
from polymodal.errors import DataError, MediaError, first_line
from polymodal.media.source import open_table
from polymodal.utils.files import cache_folder, make_folder, regular_size, write_bytes

T = TypeVar("T")


class Row(dict[str, Any]):
    """A row's values by column."""

    def __init__(self, data: Any, where: str) -> None:
        if not isinstance(data, Mapping):
            raise DataError(f"{where} is {data!r:.60}, expected an object; is it a file of this benchmark?")
        super().__init__(data)
        self.where = where  # the file and the place in it, for error lines

    def named(self, *names: str) -> str:
        """The first of some names that the row has a value under."""
        there = [name for name in names if name in self]
        return next((name for name in there if self[name] is not None), (*there, names[0])[0])

    def value(self, kind: type[T], *names: str) -> T:
        """A value as it is, of a type."""
        value: T = field(self, self.named(*names), self.where, kind)
        return value

    def text(self, *names: str, default: str | None = None) -> str:
        """What a cell says, a text or a number; the default where it is empty or "nan"."""
        name = self.named(*names)
        value = self.get(name)
        if value is None or value != value or (isinstance(value, str) and value.strip() in ("", "nan")):
            if default is None:
                problem = "is empty" if name in self else "is not there"
                raise DataError(f"{self.where}: the column `{name}` {problem}; is it a file of this benchmark?")
            return default
        return str(value)

    def id(self, *names: str) -> str:
        """The number that a benchmark knows a question or an image by, as text."""
        name = self.named(*names)
        value = field(self, name, self.where, int, str)
        if not str(value).isdecimal():
            raise DataError(f"{self.where}: `{name}` is {value!r:.60}, expected a number")
        return str(int(value))

    def texts(self, *names: str, secret: bool = False) -> tuple[str, ...]:
        """One text or several; where they are secret the column may be missing, or have empty ones."""
        name = self.named(*names)
        given = self.get(name)
        if secret and (given is None or given == "" or (isinstance(given, list) and not any(given))):
            return ()
        value = field(self, name, self.where, list, str)
        if isinstance(value, str):  # of a TSV
            value = literal(value, self.where) if value.startswith("[") else [value]
        if not value:
            raise DataError(f"{self.where}: `{name}` is empty")
        return tuple(field({name: text}, name, self.where, str) for text in value)

    def options(self, *names: str, least: int = 1) -> dict[str, str]:
        """Options by letter: a list under one of some names, or the columns A, B, ... until one is empty."""
        options = {}
        name = self.named(*names) if names else ""
        if self.get(name) not in (None, ""):
            texts = literal(self[name], f"{self.where}: `{name}`")
            if not isinstance(texts, list | tuple) or len(texts) > len(ascii_uppercase):
                raise DataError(f"{self.where}: `{name}` is {texts!r:.60}, expected a list of options")
            options = dict(zip(ascii_uppercase, map(str, texts)))
        for letter in ascii_uppercase if not options else ():
            if not (text := self.text(letter, default="")):
                break
            options[letter] = text
        if len(options) < least:
            raise DataError(f"{self.where}: has no options in {' or '.join((*names, 'A, B, ...'))}")
        return options

    def images(self) -> list[Any]:
        """The sources in `image`, a list or one."""
        value = self.get("image")
        return value if isinstance(value, list) else [] if value is None or value == "" else [value]

    def image(self) -> Any:
        """The one image of a row."""
        if len(images := self.images()) != 1:
            problem = f"`image` holds {len(images)} images, expected one"
            raise DataError(f"{self.where}: {problem}; is it a file of this benchmark?")
        return images[0]


def field(row: Any, key: str, where: str, *kinds: type) -> Any:
    """A value of an object, of the given types."""
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


MAX_CELL = 48 * 2**20
"""The largest cell of a TSV: an image in base64."""
MAX_INDEX = 64
"""The longest cell of an image that is another row's index, as in VLMEvalKit."""
MAX_JSON = 2 * 2**30
"""The largest official file that is read whole."""


Form = str | tuple[str, Callable[[Path], Iterable[Row]]]
"""The files of a form, as a pattern, and what reads one of them where that is no table."""


def rows_in(folder: Path, *forms: Form) -> Iterator[Row]:
    """The rows of the first form whose files a folder holds: tables, or official files with what reads them."""
    patterns = []
    for form in forms:
        reader = parquet_rows if str(form).endswith(".parquet") else tsv_rows
        pattern, read = form if isinstance(form, tuple) else (form, reader)
        patterns.append(pattern)
        files = _files(folder, pattern)[: None if "*" in pattern else 1]
        other = next((file for file in files if file.parent != files[0].parent), None)
        if other is not None and "*" not in pattern.rpartition("/")[0]:  # where folders are named, they are one
            raise DataError(f"{pattern} is in {files[0].parent} and {other.parent}; give the folder of this benchmark")
        for file in files:
            yield from read(file)
        if files:
            return
    raise DataError(f"{folder}: none of {', '.join(patterns)} is in it; give the folder with the benchmark's files")


def _files(folder: Path, pattern: str) -> list[Path]:
    """The files of a pattern anywhere under a folder, the outer ones first."""
    found = (path for path in folder.rglob(pattern) if path.is_file())
    return sorted(found, key=lambda path: (len(path.parts), path))


def find_file(folder: Path, *patterns: str) -> Path | None:
    """The file that one of some patterns names, the first pattern before the second and the outer file first."""
    return next((file for pattern in patterns for file in _files(folder, pattern)), None)


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


def find_images(folder: Path, rows: Sequence[Row], column: str = "image") -> Sequence[Row]:
    """Put paths in `image` for the names in a column of an official file: all from where most of the first ones lie."""
    names = [row.value(str, column) for row in rows]
    for row, name in zip(rows, names):
        if ".." in PurePosixPath(name).parts or PurePosixPath(name).is_absolute():
            raise DataError(f"{row.where}: the image {name!r} leaves the folder")
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
    for row, name in zip(rows, names):
        row["image"] = chosen / (name.rpartition("/")[2] if short else name)
    return rows


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


def json_rows(path: Path, key: str = "", each: str = "row") -> list[Row]:
    """The objects that an official JSON file lists, under a key or as a whole."""
    listed = field(read_json(path, key) if key else {"": read_json(path)}, key, str(path), list)
    return [Row(value, f"{path}: {each} {number}") for number, value in enumerate(listed)]


def keyed(path: Path, key: str, name: str) -> Callable[[Any], Row]:
    """Look-up among the objects that an official JSON file lists, by a value that each has for itself."""
    found: dict[str, Row] = {}
    for row in json_rows(path, key):
        value = str(field(row, name, row.where, int, str))
        if value in found:
            raise DataError(f"{row.where}: `{name}` {value} comes twice; take one of the two out")
        found[value] = row

    def look_up(value: Any) -> Row:
        if str(value) not in found:
            raise DataError(f"{path}: has nothing about `{name}` {value}; is it of the same split?")
        return found[str(value)]

    return look_up


def text_lines(path: Path) -> Iterator[tuple[int, str]]:
    """The lines of a text file that are not blank, with their numbers from 1."""
    regular_size(path, error=DataError)
    try:
        with path.open(encoding="utf-8-sig", newline="\n") as file:  # other ends of lines may stand in a text
            yield from ((number, line.rstrip("\r\n")) for number, line in enumerate(file, 1) if line.strip())
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as UTF-8 text ({first_line(error)})") from None


def read_lines(path: Path) -> Iterator[Row]:
    """The objects of a JSON Lines file."""
    for number, line in text_lines(path):
        try:
            data = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}: line {number} is no JSON ({first_line(error)})") from None
        if not isinstance(data, dict):
            problem = f"expected an object, found {type(data).__name__}"
            raise DataError(f"{path}: line {number}: {problem}; is it the right file?")
        yield Row(data, f"{path}: line {number}")


def parquet_rows(path: Path) -> Iterator[Row]:
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
                yield Row({**row, **media}, f"{path}: row {before + number}")
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


def tsv_rows(path: Path) -> Iterator[Row]:
    """The rows of VLMEvalKit's TSV; its images, in base64, are unpacked into the cache folder and given as paths."""
    # As there, a short cell of `image` is the `index` of the row whose image it shares, a list holds several images,
    # and `image_path` names files beside the TSV. Rows are kept until the last, since that index may come later.
    regular_size(path, error=DataError)
    csv.field_size_limit(max(csv.field_size_limit(), MAX_CELL))
    rows: list[tuple[str, dict[str, Any]]] = []
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
        yield Row(row, where)


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
