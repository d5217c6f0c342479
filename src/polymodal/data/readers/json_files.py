"""JSON files: rows of conversations in a list or as JSON Lines, and the large official files walked as a stream.

Rows come one after the other with their line and text, and a broken row costs one row: training stops at the first,
`data check` reads on. After a broken element of a list the next object that is a row (and not a turn inside one) is
looked for. Lists that follow one another are all read, objects over several lines too, and a list of turns is a row.
A `]` or `,` that ends a list too early is a broken row, and a key that comes twice in an object breaks its row.

The official files of VQA and caption datasets are one object around a list of half a million elements, which takes
gigabytes as Python objects. ijson goes through them element by element. Unlike Python's parser it refuses NaN, Infinity
and integers beyond 64 bits, and takes half of a surrogate pair for a question mark.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Callable, Iterator
from io import BufferedReader
from pathlib import Path
from typing import Any, TypeAlias

import ijson

from polymodal.data.readers.base import Options, RawRow, broken, open_file
from polymodal.errors import DataError

LIST, LINES = "list", "lines"
_SPACE = re.compile(r"[ \t\r\n]*")
_NEXT_OBJECT = re.compile(r"\}\s*,\s*(?=\{)|\n\s*(?=\{)")
_INVALID = re.compile("[\udc80-\udcff]")
_AHEAD = 1 << 20
"""How far a value of JSON Lines is looked for beyond its line; for the first line it is the whole file."""
_DEEPEST = 1000  # as in Python's own parser
_ROWS = frozenset({"conversations", "messages"})
_STRING = re.compile(rb'"[^"]*"')
_UNMARKED = bytes(set(range(256)) - set(b'"[]{}'))


class _Unique(dict[str, Any]):
    """An object of JSON whose keys differ."""

    def __setitem__(self, key: str, value: Any) -> None:
        if key in self:
            raise _twice(key)
        super().__setitem__(key, value)


class _TwiceError(ValueError):
    pass


def _twice(key: str) -> _TwiceError:
    return _TwiceError(f"the key {key!r} comes twice in one object; keep one")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise _twice(next(key for key in keys if keys.count(key) > 1))
    return found


_DECODER = json.JSONDecoder(object_pairs_hook=_unique)
# Without use_float the parser in C ends the process at a number of 5,000 digits.
_SAFE: dict[str, Any] = {"use_float": True, "buf_size": 1 << 16}
_Found: TypeAlias = "tuple[int, str, Any, DataError | None]"
"""The line that a row begins on, its text, what it says, and why that cannot be known."""


def file_form(path: Path) -> str:
    """Tell a JSON list of rows from JSON Lines by its first element."""
    with open_file(path) as file:
        while block := file.read(4096):
            if first := block.removeprefix(codecs.BOM_UTF8).lstrip()[:1]:
                return LIST if first == b"[" and not _begins_with_turn(path) else LINES
    raise DataError(f"{path}: the file holds no records")


def _begins_with_turn(path: Path) -> bool:
    keys: dict[str, None] = {}
    try:
        for place, event, value in events(path):
            if place == "item" and event == "map_key":
                keys[value] = None
            elif place == "item" and event != "start_map":
                break
    except DataError:
        pass  # said where the rows are read
    return _is_turn(keys)


def _is_turn(value: Any) -> bool:
    return isinstance(value, dict) and ("role" in value or "from" in value) and _ROWS.isdisjoint(value)


def read_rows(path: Path, options: Options, form: str = "") -> Iterator[RawRow]:
    """Read rows in LLaVA's form, with `messages`, or with OpenAI's content parts; each as its keys say for form ""."""
    is_list = file_form(path) == LIST
    for number, (line, text, data, fault) in enumerate(_of_lists(path) if is_list else _of_lines(path)):
        where = f"{path}: record {number}" if is_list else f"{path}: line {line}"
        if fault is not None:
            hint = f" (line {line})" if is_list else "; expected a JSON list, or one object a line"
            yield broken(where, f"{fault}{hint}", fault.code, line=line, text=text)
            continue
        if isinstance(data, list) and data and (form == "openai" or _is_turn(data[0])):
            is_llava = form == "llava" or (not form and "from" in data[0])
            data = {"conversations" if is_llava else "messages": data}
        about = {"line": line, "text": text, "form": form, "kind": "conversation", "id": f"{path.stem}-{number}"}
        yield RawRow(where, data, **about)  # type: ignore[arg-type]


def parse_json(text: str) -> Any:
    """Parse a text that is one value; raises `ValueError` or `RecursionError`."""
    return _DECODER.decode(text)


def _of_lines(path: Path) -> Iterator[_Found]:
    line = 1
    with open_file(path) as file:
        while raw := file.readline():  # by \n alone: U+2028 may stand inside a string
            text, lines = raw.decode("utf-8-sig" if line == 1 else "utf-8", "surrogateescape").strip("\r\n"), 1
            if text.strip():
                try:
                    yield line, text, parse_json(text), _not_utf8(text)
                except (ValueError, RecursionError) as error:
                    spread, data = _over_lines(file, raw, -1 if line == 1 else _AHEAD)
                    lines = spread.count("\n") or 1
                    text = spread.strip() or text
                    yield line, text, data, _not_utf8(text) or (None if spread else _not_json(error))
            line += lines


def _over_lines(file: BufferedReader, raw: bytes, ahead: int) -> tuple[str, Any]:
    """Read a value that begins with a line and goes on in the next ones; "" and the file where it was for none."""
    back = file.tell()
    text = (raw + file.read(ahead)).decode("utf-8", "surrogateescape")
    try:
        data, end = _DECODER.raw_decode(text, _skip(text, len(text) - len(text.lstrip("\ufeff"))))
        rest, newline, _ = text[end:].partition("\n")
        spread = text[: end + len(rest + newline)]
        if not rest.strip() and len(spread) > len(raw.decode("utf-8", "surrogateescape")):
            file.seek(back - len(raw) + len(spread.encode("utf-8", "surrogateescape")))
            return spread.removeprefix("\ufeff"), data
    except (ValueError, RecursionError):
        pass
    file.seek(back)
    return "", None


def _of_lists(path: Path) -> Iterator[_Found]:
    with open_file(path) as file:
        text = file.read().decode("utf-8-sig", "surrogateescape")
    line, counted, position, fault, inside = 1, 0, _skip(text, 0), None, False
    while position < len(text):
        line += text.count("\n", counted, position)
        counted = position
        mark = text[position]
        if mark == "]" and inside:
            position, inside = _skip(text, position + 1), False
        elif mark == "[" and not inside and not _turns_follow(text, position):
            position, inside = _skip(text, position + 1), True
        elif mark in ",]" and not inside:
            problem = f"more follows after the end of a list: take out the `]` before it, or this `{mark}`"
            yield line, mark, None, DataError(problem, "broken-json")
            position, inside = _skip(text, position + 1), mark == ","
        else:
            end, data, fault = _element(text, position, ",]" if inside else ",][{")
            yield line, text[position:end], data, fault
            position = _skip(text, end)
            if inside and text[position : position + 1] == ",":
                position = _skip(text, position + 1)
    if inside and fault is None:
        line += text.count("\n", counted)
        yield line, "", None, DataError("the list is not closed: its end is missing", "broken-json")


def _turns_follow(text: str, start: int) -> bool:
    """Whether the list that begins here is one conversation."""
    try:
        return _is_turn(_DECODER.raw_decode(text, _skip(text, start + 1))[0])
    except (ValueError, RecursionError):
        return False


def _element(text: str, start: int, follows: str) -> tuple[int, Any, DataError | None]:
    """Parse one value: its end, what it says, and why that cannot be known."""
    try:
        data, end = _DECODER.raw_decode(text, start)
        after = _skip(text, end)
        if text[after : after + 1] in follows:
            return end, data, _not_utf8(text[start:end])
        error: Exception = json.JSONDecodeError("Expecting ',' delimiter", text, after)
    except (ValueError, RecursionError) as found:
        error = found
    return _resume(text, start), None, _not_json(error)


def _resume(text: str, start: int) -> int:
    """Where a broken element ends: before the next object that is a row, or at the end of the list."""
    for match in _NEXT_OBJECT.finditer(text, start):
        try:
            data, end = _DECODER.raw_decode(text, match.end())
        except (ValueError, RecursionError):
            continue
        after = _skip(text, end)
        is_turn = not isinstance(data, dict) or not {"from", "role", "type"}.isdisjoint(data)
        if not is_turn and text[after : after + 1] in (",", "]"):
            return match.end()
    return max(start + 1, len(text.rstrip().removesuffix("]")))


def _skip(text: str, position: int) -> int:
    match = _SPACE.match(text, position)
    return match.end() if match else position


def _not_utf8(text: str) -> DataError | None:
    found = _INVALID.search(text)
    return None if found is None else DataError(f"not UTF-8 text (character {found.start() + 1})", "not-utf8")


def _not_json(error: Exception) -> DataError:
    if isinstance(error, json.JSONDecodeError):
        return DataError(f"not valid JSON: {error.msg} (column {error.colno})", "broken-json")
    if isinstance(error, _TwiceError):
        return DataError(str(error), "broken-json")
    what = "a number has too many digits" if isinstance(error, ValueError) else "the JSON is nested too deeply"
    return DataError(what, "broken-json")


def elements(path: Path, key: str) -> Iterator[Any]:
    """The elements of the list that a file's object has under a key, one after the other."""
    return _walk(path, lambda file: ijson.items(file, f"{key}.item", map_type=_Unique, **_SAFE), key)


def members(path: Path) -> Iterator[tuple[str, Any]]:
    """The keys and values of a file's object, one after the other; none where it is a list."""
    return _walk(path, lambda file: ijson.kvitems(file, "", map_type=_Unique, **_SAFE))


def events(path: Path) -> Iterator[tuple[str, str, Any]]:
    """What a parser meets in a file: where it is ("data.item"), the event ("map_key") and its value."""
    return _walk(path, lambda file: ijson.parse(file, **_SAFE))


def _walk(path: Path, parse: Callable[[_Shallow], Iterator[Any]], key: str = "") -> Iterator[Any]:
    count = 0
    with open_file(path) as file:
        if file.peek(3).startswith(codecs.BOM_UTF8):
            file.read(3)
        if file.peek(1).lstrip()[:1] not in b"{[":
            raise DataError(f"{path}: not valid JSON: expected an object or a list", "broken-json")
        try:
            for count, found in enumerate(parse(_Shallow(file, path)), start=1):  # noqa: B007
                yield found
        except (ijson.JSONError, UnicodeDecodeError) as error:  # the second for surrogates written as UTF-8
            said = error.args[0] if isinstance(error, ijson.JSONError) else b""
            raise _refused(path, said, f" after {count} elements of `{key}`" if key else "") from None
        except _TwiceError as error:
            raise DataError(f"{path}: {error} (element {count})", "broken-json") from None


class _Shallow:
    """A file that is refused where its brackets nest too deeply: ijson's memory grows with the square of the depth."""

    def __init__(self, file: BufferedReader, path: Path) -> None:
        self._file, self._path, self._depth, self._open = file, path, 0, b""

    def read(self, size: int) -> bytes:
        """Read a block, counting the brackets outside strings; all of it in C, since the files are large."""
        data = self._file.read(size)
        text = (self._open + data).replace(rb"\\", b"").replace(rb"\"", b"")
        # Two quotes side by side hold no bracket, whether they are one string or part two.
        marks = _STRING.sub(b"", text.translate(None, _UNMARKED).replace(b'""', b""))
        brackets, quote, _ = marks.partition(b'"')
        self._open = quote + (b"\\" if text.endswith(b"\\") else b"")
        deep = 0
        while deep < _DEEPEST and (b"[]" in brackets or b"{}" in brackets):
            brackets = brackets.replace(b"[]", b"").replace(b"{}", b"")
            deep += 1
        opened = brackets.count(b"[") + brackets.count(b"{")
        if self._depth + opened + deep > _DEEPEST:
            raise DataError(f"{self._path}: not valid JSON: nested too deeply", "broken-json")
        self._depth += 2 * opened - len(brackets)
        return data


def _refused(path: Path, said: str | bytes, place: str) -> DataError:
    """The error for what ijson says: a line with the reason, then the text around the place; bytes if no UTF-8."""
    text = said.decode("utf-8", "backslashreplace") if isinstance(said, bytes) else said
    reason, _, rest = text.partition("\n")
    around = " ".join(rest.partition("(right here)")[0].split())
    place += f", near {around!r}" if around else ""
    if isinstance(said, bytes):
        return DataError(f"{path}: not UTF-8 text{place}; save it as UTF-8", "not-utf8")
    return DataError(f"{path}: not valid JSON: {reason.rstrip('.')}{place}", "broken-json")
