"""One row of a data file, before it is a conversation, and the few things that every reader needs."""

import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any, TypeAlias

from polymodal.errors import DataError, PolymodalError
from polymodal.media.source import from_file_url
from polymodal.messages import Audio, Document, FileSlice, Image, Media, TableCell, Video, part_settings
from polymodal.utils.files import regular_size

SHORT_ANSWER = "Answer the question using a single word or phrase."
"""What LLaVA-1.5 writes after a question whose answer is short (Liu et al. 2023, arXiv:2310.03744, section 3.2)."""

CAPTION = "Provide a one-sentence caption for the provided image."
"""What LLaVA-1.5 asks where the answer is a caption; the "plain" template of stage 1 leaves it out."""

KINDS = {
    **dict.fromkeys((".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm"), "image"),
    **dict.fromkeys((".mp4", ".m4v", ".webm", ".mkv", ".mov", ".avi", ".mpg", ".mpeg", ".flv", ".wmv"), "video"),
    **dict.fromkeys((".wav", ".mp3", ".flac", ".ogg", ".oga", ".opus", ".m4a", ".aac", ".aiff", ".wma"), "audio"),
    ".pdf": "document",
}
"""What the names of files mean, in folders and archives."""

PACKED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")
"""How files begin that gzip, bzip2, xz and zstd wrote."""

Medium: TypeAlias = "str | Path | FileSlice | TableCell"
"""Text is a path that is still to be located (and may be refused); the others are located already."""
Shown: TypeAlias = "Medium | dict[str, Any]"
"""An image, or a content part such as `{"type": "video", "video": ...}`."""

MEDIA: dict[str, type[Media]] = {"image": Image, "video": Video, "audio": Audio, "document": Document}
SOURCES = ("path", "url", "file", "file_data")
"""Where an object may say where a medium is, besides under its kind."""
_SAID_OF_IT = frozenset(
    {f"{side}_pixels" for side in ("min", "max", "total")}
    | {"min_frames", "max_frames", "duration", "width", "height", "resized_width", "resized_height", "bytes"}
)
"""What an object may say that is the model's own choice, or a remark."""
_OF_SOUNDS = ("start", "end", "offset", "audio_start", "audio_end")
"""What it may say of a sound that cannot be followed."""


@dataclass(frozen=True)
class RawRow:
    """One row."""

    where: str  # File and row, as errors name it
    data: Any  # The row as a record: an object with `conversations` or `messages`. None for a broken row
    error: DataError | None = None  # What is wrong with a broken row, in one line that starts with `where`
    line: int = 0  # The line it begins on in a JSON file, counted from 1; 0 elsewhere
    text: str = ""  # Its text in a JSON file, unchanged (bytes that are not UTF-8 are surrogates); "" elsewhere
    form: str = ""  # The only form that is meant ("llava", "messages", "openai"), or ""
    kind: str = ""  # Of a row that names none
    id: str = ""  # Of a row that names none
    # The rest is filled in by `iter_rows`.
    number: int = -1  # Counted from 0 over all files of the source, broken rows too
    root: Path = Path()  # The folder that media paths are relative to and may not leave
    source: str = ""  # Of a row that names none


@dataclass(frozen=True)
class Options:
    """What a reader is told."""

    root: Path  # The folder that media paths are relative to and may not leave
    annotations: Path | None = None  # The second file, of formats that have two
    prompt: str | None = None  # The question of captions, or what follows each question; the format's own when None


Reader: TypeAlias = Callable[[Path, Options], Iterator[RawRow]]
"""Yields every row of one file, broken ones too; raises `DataError` where the file as a whole cannot be used."""


class Layout:
    """Where a dataset's images lie under the root: people unpack archives with and without their folders."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._choice: int | None = None

    def choose(self, *names: str) -> str:
        """Pick an image's name; the first image decides for all, so that millions are not looked for."""
        if self._choice is None:
            there = [index for index, name in enumerate(names) if (self._root / name).is_file()]
            self._choice = there[0] if there else 0
        return names[self._choice]


@contextmanager
def open_file(path: Path) -> Iterator[BufferedReader]:
    """Open a data file."""
    regular_size(path, error=DataError)
    try:
        with path.open("rb") as file:
            yield file
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None


def broken(where: str, problem: str, code: str = "broken-row", **fields: Any) -> RawRow:
    """Make the row that stands for a broken one."""
    return RawRow(where, None, DataError(f"{where}: {problem}", code), **fields)


def as_parts(kind: str, items: Sequence[Any]) -> list[dict[str, Any]]:
    """Make media into the parts that `dialogue` takes."""
    return [{"type": kind, kind: item} for item in items]


def dialogue(media: Sequence[Shown], turns: Sequence[tuple[str, str]], **fields: Any) -> dict[str, Any]:
    """Make a record of images, or parts, and then questions with answers. Text is text: `<image>` means nothing."""
    messages: list[dict[str, Any]] = []
    for index, (question, answer) in enumerate(turns):
        parts = [item if isinstance(item, dict) else {"type": "image", "image": item} for item in media]
        parts = parts if index == 0 else []
        if question:
            parts.append({"type": "text", "text": question})
        messages.append({"role": "user", "content": parts})
        messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    return {**fields, "messages": messages}


def caption_of(media: Sequence[Shown], text: str, options: Options, **fields: Any) -> dict[str, Any]:
    """Make a record of a caption."""
    kinds = {item["type"] if isinstance(item, dict) else "image" for item in media}
    asked = CAPTION.replace("image", kinds.pop()) if len(kinds) == 1 else CAPTION
    return dialogue(media, [(asked if options.prompt is None else options.prompt, text)], **fields)


def question_of(
    media: Sequence[Shown], question: str, answer: str, options: Options, default: str = SHORT_ANSWER, **fields: Any
) -> dict[str, Any]:
    """Make a record of a question, with the prompt after it on a line of its own."""
    prompt = default if options.prompt is None else options.prompt
    return dialogue(media, [(f"{question}\n{prompt}" if prompt else question, answer)], **fields)


def object_of(value: Any) -> dict[str, Any]:
    """An object as it is; an empty one for what is none, so that its fields are found to be missing."""
    return value if isinstance(value, dict) else {}


def text_of(value: Any) -> str:
    """The text without outer space; "" for what is no text."""
    return value.strip() if isinstance(value, str) else ""


def best_answer(answers: Any) -> str:
    """Choose what is trained on where several people answered."""
    if not isinstance(answers, list):
        return text_of(answers)
    texts = [text_of(item.get("answer") if isinstance(item, dict) else item) for item in answers]
    counts = Counter(text for text in texts if text)
    return counts.most_common(1)[0][0] if counts else ""  # equal counts keep the order of the list


def media_keys(record: Mapping[str, Any], kind: str) -> list[str]:
    """The keys under which a record has media of a kind; a `document` may also be a text, which is none."""
    keys = [key for key in (kind, kind + "s") if record.get(key) is not None]
    return [key for key in keys if kind != "document" or not any(map(_is_prose, listed(record[key])))]


def _is_prose(entry: Any) -> bool:
    return isinstance(entry, str) and entry[:5] != "data:" and Path(entry[-9:]).suffix.lower() not in KINDS


def listed(value: Any) -> list[Any]:
    """What a record has in a media key, as a list; null, "" and lists of these mean none."""
    entries = value if isinstance(value, list) else [value]
    return [] if all(entry is None or entry == "" for entry in entries) else entries


def medium_of(kind: str, given: Any, image_root: Path | None, at: str, *, of_part: bool = False) -> Media:
    """Make a medium of where it is, or of an object that says this and more (`part_settings`)."""
    keys, said = (f"{kind}_url", kind, *SOURCES), dict[str, Any]()
    while isinstance(given, dict):  # also {"video_url": {"url": ...}}, and datasets' {"path": ..., "bytes": None}
        key = next((key for key in keys if given.get(key) is not None), "path")
        said |= {name: value for name, value in given.items() if name not in keys}
        at, given, of_part = f"{at}: `{key}`" if of_part else at, given.get(key), False
    return MEDIA[kind](_source(given, image_root, at), **settings_of(kind, said, at))


def settings_of(kind: str, given: Mapping[str, Any], at: str) -> dict[str, Any]:
    """What an object says of its medium."""
    said = {name: value for name, value in given.items() if value is not None and name not in _SAID_OF_IT}
    if kind == "audio" and (cut := [name for name in _OF_SOUNDS if said.get(name)]):
        raise DataError(f"{at}: `{cut[0]}` of a sound cannot be followed; cut the file", "unsupported-key")
    try:
        return part_settings(MEDIA[kind], said, at)
    except PolymodalError as error:
        raise DataError(str(error)) from None


def _source(value: Any, image_root: Path | None, at: str) -> str | Path | FileSlice | TableCell:
    """Locate a medium: a URL as it is, a path inside the root (links in it are followed), what a reader has located."""
    if isinstance(value, Path | FileSlice | TableCell):
        return value
    if not isinstance(value, str) or not value:
        raise DataError(f"{at} must be a path or URL, found {kind_of(value)}")
    if value[:5].lower() == "data:" or re.match(r"https?://", value, re.IGNORECASE):
        return value
    value = from_file_url(value, at, DataError)
    if "\0" in value:
        raise DataError(f"{at}: {value!r} is not a path")
    if image_root is None:
        raise DataError(f"{at}: local files cannot be named here; send the file as a data: URL")
    root = os.path.abspath(image_root)
    path = os.path.normpath(os.path.join(root, value))
    if path != root and not path.startswith(root.rstrip(os.sep) + os.sep):  # both are normalised
        raise DataError(
            f"{at}: {shown(value)} leaves the folder {image_root}; media must lie inside it", "outside-root"
        )
    return Path(path)


def shown(value: Any) -> str:
    """A value for an error line."""
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:120]}...{text[-60:]}"


def kind_of(value: Any) -> str:
    """Name a JSON value for an error line."""
    if value is None:
        return "nothing"
    for cls, name in ((dict, "object"), (list, "list"), (str, "text")):
        if isinstance(value, cls):
            return name if value else f"empty {name}"
    return type(value).__name__
