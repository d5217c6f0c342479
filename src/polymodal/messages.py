"""A conversation is a list of messages; a message is a list of parts.

The same types go into every verb (train, chat, serve, eval) and come out of every model. Nothing is decoded here:
a part only says where its bytes are. `media/` turns sources into arrays, `processing/` turns messages into tokens.
Readers for the field's JSON formats live in `data/readers/`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeAlias

if TYPE_CHECKING:
    from PIL import Image as PILImage

Role: TypeAlias = Literal["system", "user", "assistant"]
"""Who speaks."""


@dataclass(frozen=True)
class FileSlice:
    """Bytes that lie inside a file, such as a member of an uncompressed tar archive."""

    path: Path  # The file
    offset: int  # Its first byte
    size: int  # Bytes
    name: str = ""  # What errors call it beside the file's name


@dataclass(frozen=True)
class TableCell:
    """Bytes that lie in a cell of a parquet file; read with the row group that holds them."""

    path: Path  # The parquet file
    group: int  # Row group, from 0
    row: int  # Row inside the group, from 0
    column: str  # Binary, or a struct with `bytes`, or a list of either
    item: int = -1  # Position in the cell's list, from 0; -1 where the cell is no list
    root: Path | None = None  # Where there are no `bytes`: the folder that `path` in the cell may not leave


Source: TypeAlias = "str | Path | bytes | FileSlice | TableCell | PILImage.Image"
"""Where media come from: a path, a `data:` URL, raw file bytes, a place in an archive, or an image in memory."""


@dataclass(frozen=True)
class Text:
    """A run of text. Special tokens typed inside it stay plain text."""

    text: str


@dataclass(frozen=True)
class Image:
    """An image."""

    source: Source


@dataclass(frozen=True)
class Video:
    """A video clip."""

    source: Source


@dataclass(frozen=True)
class Audio:
    """A sound."""

    source: Source


@dataclass(frozen=True)
class Document:
    """A document of pages."""

    source: Source


Part: TypeAlias = Text | Image | Video | Audio | Document
Media: TypeAlias = Image | Video | Audio | Document


@dataclass(frozen=True)
class Message:
    """What one side says in one turn: a role and its parts, in order."""

    role: Role
    parts: tuple[Part, ...]

    @property
    def text(self) -> str:
        """All text parts joined, media left out."""
        return "".join(part.text for part in self.parts if isinstance(part, Text))

    @property
    def media(self) -> tuple[Media, ...]:
        """The media parts, in order."""
        return tuple(part for part in self.parts if not isinstance(part, Text))


def _message(role: Role, parts: Sequence[Part | str]) -> Message:
    return Message(role, tuple(Text(part) if isinstance(part, str) else part for part in parts))


def user(*parts: Part | str) -> Message:
    """Make a user message.

    Args:
        *parts: Its parts, in order; plain strings become `Text` parts.

    Returns:
        The message.
    """
    return _message("user", parts)


def assistant(*parts: Part | str) -> Message:
    """Make an assistant message.

    Args:
        *parts: Its parts, in order; plain strings become `Text` parts.

    Returns:
        The message.
    """
    return _message("assistant", parts)


def system(*parts: Part | str) -> Message:
    """Make a system message.

    Args:
        *parts: Its parts, in order; plain strings become `Text` parts.

    Returns:
        The message.
    """
    return _message("system", parts)
