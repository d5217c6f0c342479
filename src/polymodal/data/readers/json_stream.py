"""Walk through a large JSON file, one element at a time, without holding it whole.

The official files of VQA data sets are one object around a list of half a million elements; their annotations take
gigabytes as Python objects. Here the members of the outermost object (or list) come one after the other, and a member
that is a list comes element by element.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from polymodal.errors import DataError

_CHUNK = 1 << 20
_MAX_ELEMENT = 256 * 2**20
"""The longest element in characters; a file that lost a quote would otherwise be read whole, again and again."""

_DECODER = json.JSONDecoder()
_SPACE = re.compile(r"[ \t\r\n]*")
_ENDS = frozenset(" \t\r\n,]}:")


@dataclass(frozen=True)
class Item:
    """One element."""

    key: str  # The outer object's key that it stands under; "" in an outer list
    index: int  # Its place in the list under that key; -1 where the value is no list
    value: Any  # The value


def stream(path: Path) -> Iterator[Item]:
    """Yield the elements of a JSON file in order."""
    try:
        with path.open("rb") as file:
            yield from _walk(_Text(file, path))
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None


def _walk(text: _Text) -> Iterator[Item]:
    first = text.peek()
    if first == "[":
        yield from _elements(text, "")
    elif first == "{":
        text.take("{")
        while text.peek() != "}":
            key = text.value()
            if not isinstance(key, str):
                raise text.failure("expected a key in quotes")
            text.take(":")
            if text.peek() == "[":
                yield from _elements(text, key)
            else:
                yield Item(key, -1, text.value())
            if text.peek() == ",":
                text.take(",")
            elif text.peek() != "}":
                raise text.failure("expected ',' or '}'")
        text.take("}")
    else:
        raise text.failure("expected a JSON object or list")
    if text.peek():
        raise text.failure("more follows after the end")


def _elements(text: _Text, key: str) -> Iterator[Item]:
    text.take("[")
    index = 0
    while text.peek() != "]":
        yield Item(key, index, text.value())
        index += 1
        if text.peek() == ",":
            text.take(",")
        elif text.peek() != "]":
            raise text.failure("expected ',' or ']'")
    text.take("]")


class _Text:
    """The file's text, read a piece at a time."""

    def __init__(self, file: BinaryIO, path: Path) -> None:
        self._file = file
        self._path = path
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self._bytes = 0
        self._buffer = ""
        self._position = 0
        self._line, self._column = 1, 1
        self._ended = False

    def peek(self) -> str:
        """The next character that is no space; "" at the end."""
        while True:
            found = _SPACE.match(self._buffer, self._position)
            self._position = found.end() if found else self._position
            if self._position < len(self._buffer) or self._ended:
                return self._buffer[self._position : self._position + 1]
            self._fill()

    def take(self, character: str) -> None:
        """Step over a character that must come next."""
        if self.peek() != character:
            raise self.failure(f"expected {character!r}")
        self._position += 1

    def value(self) -> Any:
        """Parse the next value, reading on until it is whole."""
        self.peek()
        while True:
            try:
                value, end = _DECODER.raw_decode(self._buffer, self._position)
            except json.JSONDecodeError as error:
                # Where text is missing, the error is at the end of the buffer or at the start of a string.
                open_string = error.msg.startswith("Unterminated")
                if self._ended or (not open_string and error.pos < len(self._buffer) - 16):
                    self._position = error.pos
                    raise self.failure(error.msg) from None
            except (RecursionError, ValueError) as error:
                what = "nested too deeply" if isinstance(error, RecursionError) else "a number is too long"
                raise self.failure(what) from None
            else:
                # A number may go on after the buffer: "0." reads as 0. What else follows is for the caller to refuse.
                if self._ended or self._buffer[end : end + 1] in _ENDS or end < len(self._buffer) - 16:
                    self._position = end
                    return value
            if len(self._buffer) - self._position > _MAX_ELEMENT:
                raise self.failure(f"an element is longer than {_MAX_ELEMENT:,} characters; a quote may be missing")
            self._fill()

    def failure(self, problem: str) -> DataError:
        """The error for the present position."""
        self._forget()
        return DataError(f"{self._path}: not valid JSON: {problem} (line {self._line} column {self._column})")

    def _forget(self) -> None:
        """Drop what was read, keeping count of lines."""
        passed = self._buffer[: self._position]
        lines = passed.count("\n")
        self._line += lines
        self._column = len(passed) - passed.rfind("\n") if lines else self._column + len(passed)
        self._buffer, self._position = self._buffer[self._position :], 0

    def _fill(self) -> None:
        self._forget()
        data = self._file.read(max(_CHUNK, len(self._buffer)))  # doubles, so that long elements stay linear
        self._ended = not data
        kept = len(self._decoder.getstate()[0])
        try:
            self._buffer += self._decoder.decode(data, final=self._ended)
        except UnicodeDecodeError as error:
            at = self._bytes - kept + error.start
            raise DataError(f"{self._path}: not UTF-8 text (byte {at}); save it as UTF-8") from None
        self._bytes += len(data)
