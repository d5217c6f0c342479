"""A conversation is a list of messages; a message is a list of parts.

The same types go into every verb (train, chat, serve, eval) and come out of every model. Nothing is decoded here:
a part only says where its bytes are. `media/` turns sources into arrays, `processing/` turns messages into tokens.
Readers for the field's JSON formats live in `data/readers/`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

from polymodal.errors import PolymodalError

if TYPE_CHECKING:
    from PIL import Image as PILImage

Role: TypeAlias = Literal["system", "user", "assistant", "tool"]
"""Who speaks; a tool says what came of the assistant's call."""


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
    """A video clip; which frames are taken is the model's own choice where nothing is said."""

    source: Source
    num_frames: int | None = None  # As many, evenly spread, the first and the last among them
    fps: float | None = None  # Instead: so many a second
    times: tuple[float, ...] | None = None  # Instead: those shown at these seconds
    key_frames: bool = False  # Instead: those that the file stores whole
    start: float | None = None  # Seconds: only frames from here on
    end: float | None = None  # Seconds: only frames before this
    audio: bool | None = None  # Whether its sound is given too


@dataclass(frozen=True)
class Audio:
    """A sound, or that of a video."""

    source: Source
    start: float | None = None  # Seconds: only what is heard from here on
    end: float | None = None  # Seconds: only what is heard before this


@dataclass(frozen=True)
class Document:
    """A document of pages: a PDF, a TIFF or one image."""

    source: Source
    pages: str | None = None  # Which, from 1: "1-3,7", or "5-" for the fifth and all after it; all where None
    text: Literal["none", "layer", "ocr"] = "none"  # What is read beside each page: the PDF's own text, or by OCR


Part: TypeAlias = Text | Image | Video | Audio | Document
Media: TypeAlias = Image | Video | Audio | Document


@dataclass(frozen=True)
class Message:
    """What one side says in one turn: a role and its parts, in order."""

    role: Role
    parts: tuple[Part, ...]
    train: bool = True  # Whether a loss is taken on it, where it is an answer
    # What else chat templates read, by their names for it; JSON values, as OpenAI and transformers write them.
    reasoning_content: str = ""  # What the assistant thought before it spoke
    tool_calls: tuple[Mapping[str, Any], ...] = ()  # {"type": "function", "function": {"name", "arguments"}}
    tool_call_id: str = ""  # Of a tool's message: the call that it answers
    name: str = ""  # Of a tool's message: the function that was called
    tools: tuple[Mapping[str, Any], ...] = ()  # Of a conversation's first message: the functions that may be called

    @property
    def text(self) -> str:
        """All text parts joined, media left out."""
        return "".join(part.text for part in self.parts if isinstance(part, Text))

    @property
    def media(self) -> tuple[Media, ...]:
        """The media parts, in order."""
        return tuple(part for part in self.parts if not isinstance(part, Text))

    @property
    def fields(self) -> dict[str, Any]:
        """What is given of reasoning and tools, by name."""
        names = ("reasoning_content", "tool_calls", "tool_call_id", "name", "tools")
        return {name: value for name in names if (value := getattr(self, name))}


def with_ocr(part: Media) -> Media:
    """An image or document with what OCR reads on it; other media, and pages with another text, as they are."""
    if isinstance(part, Image):
        return Document(part.source, text="ocr")
    return replace(part, text="ocr") if isinstance(part, Document) and part.text == "none" else part


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


Conversation: TypeAlias = "str | Message | Sequence[Message | Mapping[str, Any] | Part | str]"
"""What a model can be asked: messages, ours or dictionaries as OpenAI and transformers have them; or one question, as a
text or as the parts of a user message."""

_ROLES = {"human": "user", "gpt": "assistant", "developer": "system"}
_PARTS: dict[str, Any] = {
    **dict.fromkeys(("image", "image_url", "input_image"), Image),
    **dict.fromkeys(("video", "video_url", "input_video"), Video),
    **dict.fromkeys(("audio", "audio_url", "input_audio"), Audio),
    **dict.fromkeys(("document", "document_url", "file", "input_file"), Document),
}
_SOURCES = ("url", "path", "file_data", "file_url")
_SPELT = {"nframes": "num_frames", "video_start": "start", "video_end": "end"}  # Qwen's names
_NUMBER = (int, float)
_SETTINGS: dict[Any, dict[str, tuple[Any, str]]] = {
    Video: {
        "num_frames": (int, "a whole number above 0"),
        **dict.fromkeys(("fps", "end"), (_NUMBER, "a number above 0")),
        "start": (_NUMBER, "a number, 0 or more"),
        "times": ((list, tuple), "a list of seconds, 0 or more each"),
        **dict.fromkeys(("key_frames", "audio"), (bool, "true or false")),
    },
    Document: {"pages": (str, 'a text such as "1-3,7"'), "text": (str, '"none", "layer" or "ocr"')},
}
"""What a dictionary may say of a part, of which type, and how to put it right."""
_REMARKS = ("type", "id", "uuid", "name", "filename", "title", "format", "mime_type", "detail", "cache_control")
"""What it may say that is nothing to a model here."""


def as_messages(given: Conversation) -> list[Message]:
    """Read a conversation in any of the forms that people write."""
    parts = (str, Text, Image, Video, Audio, Document)
    try:
        items: list[Any] = [given] if isinstance(given, (Message, Mapping, *parts)) else [*given]
    except TypeError:
        raise PolymodalError(f"a conversation is a text or a list of messages, not {_kind(given)}") from None
    if items and all(isinstance(item, parts) for item in items):
        return [user(*items)]
    return [_as_message(item, f"message {number}") for number, item in enumerate(items, start=1)]


def _as_message(item: Any, where: str) -> Message:
    """Read one message."""
    role: Any
    content: Any
    if isinstance(item, Mapping):
        role, content = item.get("role", item.get("from")), item.get("content", item.get("value"))
        known = ("role", "from", "content", "value", "name", "id")
        if unknown := [key for key, value in item.items() if value and key not in known]:
            raise PolymodalError(f"{where}: {unknown[0]!r} cannot be given to a model here; leave it out")
    elif isinstance(item, Message):
        role, content = item.role, item.parts
    else:
        raise PolymodalError(f"{where}: expected a Message or a dictionary with role and content, not {_kind(item)}")
    role = _ROLES.get(str(role), role)
    known = get_args(Role) if isinstance(item, Message) else ("system", "user", "assistant")
    if role not in known:
        raise PolymodalError(f"{where}: the role {role!r} is none of {', '.join(known)}")
    if not isinstance(content, str | list | tuple):
        raise PolymodalError(f"{where}: its content must be a text or a list of parts, not {_kind(content)}")
    found = tuple(_as_part(part, where) for part in ([content] if isinstance(content, str) else content))
    return replace(item, parts=found) if isinstance(item, Message) else Message(role, found)


def _as_part(part: Any, where: str) -> Part:
    """Read one part of a message."""
    if isinstance(part, Text | Image | Video | Audio | Document):
        return part
    if isinstance(part, str):
        return Text(part)
    if not isinstance(part, Mapping):
        raise PolymodalError(f"{where}: expected a part such as Text or Image, not {_kind(part)}")
    kind = part.get("type") or next((key for key in part if key in _PARTS), next(iter(part), None))
    if kind in ("text", "input_text", "output_text") and isinstance(part.get("text"), str):
        return Text(part["text"])
    value = next((part[key] for key in (kind, *_SOURCES) if part.get(key) is not None), None)
    within: Mapping[str, Any] = value if isinstance(value, Mapping) else {}
    if within is value:  # {"url": ...}, a file's {"file_data": ...}, or a sound's {"data": ..., "format": ...}
        packed = f"data:audio/{within.get('format')};base64,{within['data']}" if within.get("data") else None
        value = next((within[key] for key in _SOURCES if within.get(key)), packed)
    if kind not in _PARTS or value is None or isinstance(value, list | tuple | int | float):
        raise PolymodalError(
            f"{where}: a part of type {kind!r} cannot be read; give text, or an image, video, sound or document with "
            "its source (a file that was uploaded to a server, and a list of frames, cannot be read here)"
        )
    said = {key: said for key, said in {**within, **part}.items() if key not in (kind, *_SOURCES)}
    return _PARTS[kind](value, **part_settings(_PARTS[kind], said, f"{where}: part {kind!r}"))


def part_settings(kind: Any, said: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Read what a dictionary says of a video or a document; for other parts nothing is to be said."""
    known, found = _SETTINGS.get(kind, {}), dict[str, Any]()
    for name, value in said.items() if known else ():
        key = _SPELT.get(name, name)
        if name in _REMARKS:
            continue
        if key not in known:
            raise PolymodalError(f"{where}: {name!r} is no setting of it; there are {', '.join(known)}")
        if value is None:
            continue
        if key == "pages" and type(value) is int:
            value = str(value)
        elif key == "num_frames" and isinstance(value, float) and value.is_integer():
            value = int(value)
        types, remedy = known[key]
        numbers = [] if isinstance(value, bool | str) else [*value] if isinstance(value, list | tuple) else [value]
        right = isinstance(value, types) and (types is bool or not isinstance(value, bool))
        right = right and all(type(one) in _NUMBER and 0 <= one < float("inf") for one in numbers)
        right = right and (key in ("start", "times") or 0 not in numbers) and value != []
        if not right or (key == "text" and value not in ("none", "layer", "ocr")):
            raise PolymodalError(f"{where}: {name} is {value!r:.60}; it must be {remedy}")
        found[key] = tuple(map(float, value)) if key == "times" else value
    ways = [name for name in ("num_frames", "fps", "times", "key_frames") if found.get(name)]
    if len(ways) > 1:
        raise PolymodalError(f"{where}: give one of num_frames, fps, times and key_frames, not {' and '.join(ways)}")
    if found.get("end") is not None and found["end"] <= found.get("start", 0):
        raise PolymodalError(f"{where}: it ends at {found['end']:g} seconds and starts at {found['start']:g}")
    return found


def said_of(part: Media) -> dict[str, Any]:
    """What a part says beside its source, such as which frames or pages; nothing where it leaves all to the model."""
    settings = {field.name: getattr(part, field.name) for field in fields(part) if field.name != "source"}
    return {name: value for name, value in settings.items() if value != getattr(type(part), name)}


def _kind(value: Any) -> str:
    return "nothing" if value is None else type(value).__name__
