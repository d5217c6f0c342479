"""Readers for the JSON forms in which the field keeps conversations. Nothing is opened; sources are only located.

Three forms, told apart by their keys:

- LLaVA: `{"image": "a.jpg" | [...], "conversations": [{"from": "human", "value": "... <image> ..."}, ...]}`.
- `messages` beside lists of media (ms-swift, LLaMA-Factory, TRL): `{"images": [...], "messages": [...]}`, with
  `<image>` in the text or `{"type": "image"}` parts that take the next item of the list.
- OpenAI content parts: `{"role", "content": [{"type": "text", ...}, {"type": "image_url", ...}]}`.

Beside images stand `video(s)`, `audio(s)` and `document(s)`, with `<video>`, `<audio>` and `<document>`. An entry may
be an object that says more: `{"video": "a.mp4", "fps": 2}`, `{"path": "a.mp4", "num_frames": 4}` (Qwen's `nframes`,
`video_start` and `video_end` too), `{"document": "a.pdf", "pages": "1-3", "text": "layer"}`. LLaVA-Video writes
`<image>` for a video: so it is read where a record has no image and no `<video>`.

A turn may be spelled `from` and `value` or `role` and `content` in either list. A turn with `loss: false`, `weight: 0`
or `train: false` is shown and not trained. Reasoning and tools are read by `tools.py`. What would change the meaning
and cannot be followed is refused by name.

LLaVA writes an image as `<image>` and a newline. In that form one newline beside a placeholder belongs to the
placeholder: the one after it, or, where there is none, the one before it. The template's `image_newline_text` puts it
back for models that want it. Placeholders are resolved here, once, and counted; text that looks like one later is only
text.

Differences from LLaVA's loader: placeholders stay where they are (LLaVA moves them to the front), a conversation that
starts with the answer is an error (LLaVA drops the turn), and so is any difference between placeholders and media.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from polymodal.data.readers.base import MEDIA, SOURCES, kind_of, listed, media_keys, medium_of, settings_of, shown
from polymodal.data.readers.tools import CALLS, call_turn, check_turns, says_nothing, tools_of, turn_fields
from polymodal.errors import DataError
from polymodal.messages import Audio, Image, Media, Message, Part, Role, Text

_ROLES: dict[str, Role] = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "developer": "system",
    "tool": "tool",
    "tool_response": "tool",
    "observation": "tool",
    **dict.fromkeys(CALLS, "assistant"),
}

_PLACEHOLDER = re.compile(f"<({'|'.join(MEDIA)})>")
_NAMES = {
    "conversations": (("from", "role"), ("value", "content")),
    "messages": (("role", "from"), ("content", "value")),
}
_SYSTEM = ("system", "system_prompt")
_MARKS = ("loss", "weight", "train", "trainable", "loss_mask", "loss_weight", "loss_scale")
"""Keys of a turn that say whether it is trained."""
_MEDIA_KEYS = frozenset(key + s for key in MEDIA for s in ("", "s"))
_REFUSED_IN_TURNS = (
    *("reasoning_details", "thought", "function_call", "tools"),
    *("mask", "masked", "train_detail", *sorted(_MEDIA_KEYS)),
)
"""Keys of a turn that are part of what is said, for which there is no place; media stand beside the turns."""
_REFUSED_IN_RECORDS = ("functions", "chat_template_kwargs", "objects")
"""The same of a record."""
RECORD_KEYS = ("tools", *_REFUSED_IN_RECORDS)
"""Keys of a record that change what it means."""
_INSTEAD = {
    "function_call": "call it `tool_calls`, as OpenAI does now, or take it out",
    "functions": "call them `tools`, as OpenAI does now, or take them out",
    "tools": "put them beside the turns, or take them out",
    "thought": "call it `reasoning_content`, or take it out",
    "objects": "write each box into the text, as the numbers that your model is to say, or take them out",
}
_MAX_TEXT = 16 * 2**20

_KNOWN_KEYS = frozenset({"id", "kind", "source", "conversations", "messages", "tools", *_SYSTEM} | _MEDIA_KEYS)


@dataclass(frozen=True)
class Record:
    """One conversation of a dataset."""

    id: str  # The record's id; the file's name and the record's number where it has none
    messages: tuple[Message, ...]  # The conversation
    kind: str = ""  # What sort of question it is, for scores per kind
    source: str = ""  # Where the record came from
    # The record's other fields, such as `answers` or `kinds`, as they were
    extra: Mapping[str, Any] = field(default_factory=dict)


class _Pool:
    """A record's media lists, taken from in order."""

    def __init__(self, record: Mapping[str, Any], image_root: Path, where: str, said: str = "") -> None:
        self._where = where
        self._items: dict[str, list[Media]] = {}
        self._keys: dict[str, str] = {}
        self._taken = dict.fromkeys(MEDIA, 0)
        for kind in MEDIA:
            keys = media_keys(record, kind)
            if len(keys) > 1:  # one of them may say that there is none
                keys = [key for key in keys if listed(record[key])] or keys[:1]
            if len(keys) > 1:
                raise DataError(f"{where}: the record has both `{kind}` and `{kind}s`; keep one")
            for key in keys:
                entries = listed(record[key])
                if names := _named(entries):
                    problem = (
                        f"names its media by placeholder ({', '.join(names)}); write <{kind}> in the text and a list"
                    )
                    raise DataError(f"{where}: `{key}` {problem}", "placeholder-count")
                items = [
                    medium_of(kind, entry, image_root, f"{where}: `{key}`[{i}]") for i, entry in enumerate(entries)
                ]
                self._keys[kind], self._items[kind] = key, items
        only_videos = self._items.get("video") and not self._items.get("image") and "<video>" not in said
        self.image = "video" if only_videos else "image"  # What `<image>` in a text stands for

    def holds(self, kind: str) -> bool:
        """Whether a placeholder of this kind means a medium; `<video>` in a record without videos is text."""
        return kind == "image" or kind in self._items

    def take(self, kind: str) -> Media | None:
        """Give the next item; None when there are too few, which `finish` reports with both counts."""
        number = self._taken[kind]
        self._taken[kind] += 1
        items = self._items.get(kind, [])
        return items[number] if number < len(items) else None

    def finish(self) -> None:
        """Check that every item was asked for exactly once."""
        for kind, taken in self._taken.items():
            given = len(self._items.get(kind, []))
            if taken != given:
                problem = f"no `{kind}` key; add the key or take them out"
                if kind in self._keys:
                    problem = f"{given} items in `{self._keys[kind]}`; make the counts equal"
                raise DataError(f"{self._where}: {taken} <{kind}> placeholders but {problem}", "placeholder-count")


def _named(entries: list[Any]) -> list[str]:
    """The names in MiniCPM's form, {"<image_00>": path}."""
    lone = entries[0] if len(entries) == 1 and isinstance(entries[0], dict) else {}
    return [str(key) for key in lone] if all(str(key).startswith("<") for key in lone) else []


def read_llava(record: Mapping[str, Any], image_root: Path, where: str) -> list[Message]:
    """Read a LLaVA record."""
    return _conversation(record, "conversations", image_root, where)


def read_messages(record: Mapping[str, Any], image_root: Path, where: str) -> list[Message]:
    """Read a record of `messages` with its media beside them in `images`, `videos` and `audios`."""
    return _conversation(record, "messages", image_root, where)


def _conversation(record: Mapping[str, Any], key: str, image_root: Path, where: str) -> list[Message]:
    turns = record.get(key)
    if not isinstance(turns, list) or not turns:
        raise DataError(f"{where}: `{key}` must be a list of turns, found {kind_of(turns)}", "no-turns")
    pool = _Pool(record, image_root, where, str(turns) if record.get("video") or record.get("videos") else "")
    messages = _leading_system(record, where)
    for index, turn in enumerate(turns):
        spot = f"{where}: {key}[{index}]"
        role, train = _speaker(turn, _NAMES[key][0], spot)
        text_key = spelled(turn, _NAMES[key][1], spot)
        content = turn.get(text_key)
        fields = turn_fields(turn, role, spot)
        parts: tuple[Part, ...]
        if turn.get(spelled(turn, _NAMES[key][0])) in CALLS:
            parts, fields["tool_calls"] = (), call_turn(content, spot)
        elif "tool_calls" in fields and not content:
            parts = (Text(""),) if content == "" else ()  # templates may tell them apart
        elif isinstance(content, str):
            parts = tuple(_split(content, role, pool, spot, newline=key == "conversations"))
        elif key == "conversations" and not isinstance(content, list):
            raise DataError(f"{spot}: `{text_key}` must be text, found {kind_of(content)}")
        else:
            parts = _parts(content, role, spot, image_root, pool)
        messages.append(Message(role, parts, train, **fields))
    pool.finish()
    check_turns(messages, where)
    return messages


def spelled(turn: Mapping[str, Any], names: Sequence[str], spot: str = "") -> str:
    """Which of two names a turn uses; the first where it has neither."""
    found = [name for name in names if turn.get(name) is not None]
    if len(found) > 1 and turn[found[0]] != turn[found[1]]:
        raise DataError(f"{spot}: has both `{found[0]}` and `{found[1]}`, which differ; keep one")
    return found[0] if found else names[0]


def read_openai(messages: Sequence[Any], where: str, image_root: Path | None = None) -> list[Message]:
    """Read OpenAI chat messages, as a request holds them. Text is text: `<image>` in it means nothing."""
    if not isinstance(messages, list | tuple) or not messages:
        raise DataError(f"{where}: expected a list of messages, found {kind_of(messages)}")
    result = []
    for index, turn in enumerate(messages):
        spot = f"{where}[{index}]"
        role, train = _speaker(turn, ("role",), spot)
        content, fields = turn.get("content"), turn_fields(turn, role, spot)
        parts: tuple[Part, ...] = ()
        if isinstance(content, str):
            parts = (Text(content),) if content or "tool_calls" in fields else ()
        elif content or "tool_calls" not in fields:
            parts = _parts(content, role, spot, image_root, None)
        result.append(Message(role, parts, train, **fields))
    return result


def read_record(record: Any, image_root: Path, where: str, *, default_id: str = "", form: str = "") -> Record:
    """Read a record in whichever form it is."""
    if not isinstance(record, dict):
        raise DataError(f"{where}: expected a JSON object, found {kind_of(record)}", "not-an-object")
    if "conversations" in record and "messages" in record:
        raise DataError(f"{where}: the record has both `conversations` and `messages`; keep one", "unknown-form")
    wanted = {"llava": "conversations", "messages": "messages", "openai": "messages"}.get(form)
    if wanted is not None and wanted not in record:
        found = ", ".join(sorted(map(str, record))) or "no keys"
        raise DataError(f"{where}: expected `{wanted}` (format {form}), found {found}", "unknown-form")
    if form == "openai":
        if beside := [key for kind in MEDIA for key in media_keys(record, kind)]:
            raise DataError(f"{where}: format openai has media in its content parts, not in `{beside[0]}`")
        messages = read_openai(record["messages"], f"{where}: messages", image_root)
        check_turns(messages, where)
    elif "conversations" in record:
        messages = read_llava(record, image_root, where)
    elif "messages" in record:
        messages = read_messages(record, image_root, where)
    else:
        found = ", ".join(sorted(map(str, record))) or "no keys"
        rows = [
            key for key, value in record.items() if isinstance(value, list) and value and isinstance(value[0], dict)
        ]
        hint = f"; where the rows are its list `{rows[0]}`, give that list alone" if len(rows) == 1 else ""
        raise DataError(f"{where}: expected `conversations` (LLaVA) or `messages`, found {found}{hint}", "unknown-form")
    _check_followed(record, messages, where)
    messages[0] = replace(messages[0], tools=tools_of(record, where))
    _check_said(messages, where)
    labels = {}
    for key in ("kind", "source"):
        value = record.get(key)
        if not isinstance(value, str | None):
            raise DataError(f"{where}: `{key}` must be text, found {kind_of(value)}")
        labels[key] = value or ""
    given = record.get("id")
    known = _KNOWN_KEYS if media_keys(record, "document") else _KNOWN_KEYS - {"document", "documents"}
    extra = {key: value for key, value in record.items() if key not in known}
    return Record(default_id if given is None else str(given), tuple(messages), **labels, extra=extra)


def _leading_system(record: Mapping[str, Any], where: str) -> list[Message]:
    """The system message that ShareGPT-like records keep in a field of its own."""
    key = spelled({name: record.get(name) or None for name in _SYSTEM}, _SYSTEM, where)
    value = record.get(key)
    if value is None or value == "":
        return []
    if not isinstance(value, str):
        raise DataError(f"{where}: `{key}` must be text, found {kind_of(value)}")
    return [Message("system", (Text(value),))]


def _speaker(turn: Any, names: Sequence[str], spot: str) -> tuple[Role, bool]:
    """Who says a turn, and whether it is trained."""
    if not isinstance(turn, dict):
        raise DataError(f"{spot}: expected an object with `{names[0]}`, found {kind_of(turn)}")
    key = spelled(turn, names, spot)
    name = turn.get(key)
    role = _ROLES.get(name) if isinstance(name, str) else None
    if role is None:
        raise DataError(f"{spot}: unknown role `{key}`: {shown(name)}; known: {', '.join(_ROLES)}", "unknown-role")
    for key in _REFUSED_IN_TURNS:
        if not says_nothing(turn.get(key)):
            raise DataError(f"{spot}: `{key}` {_cannot(key)}", "unsupported-key")
    marks = {key: turn[key] for key in _MARKS if turn.get(key) is not None}
    for key, value in marks.items():
        if value not in (0, 1) or (value and role != "assistant"):
            hint = "only an answer is trained" if value == 1 else "give true or false, 1 or 0"
            raise DataError(f"{spot}: `{key}`: {shown(value)} cannot be followed; {hint}", "unsupported-key")
    if len(set(map(bool, marks.values()))) > 1:
        raise DataError(f"{spot}: {' and '.join(f'`{key}`' for key in marks)} contradict each other; keep one")
    return role, role != "assistant" or all(marks.values())


def _cannot(key: str) -> str:
    return f"cannot be followed; {_INSTEAD.get(key, 'write it into the text, or take it out')}"


def _check_followed(record: Mapping[str, Any], messages: Sequence[Message], where: str) -> None:
    """Refuse a record's keys that change what it means and that nothing here can do."""
    for key in _REFUSED_IN_RECORDS:
        value = record.get(key)
        if says_nothing(value):
            continue
        if key == "objects":  # of ms-swift; elsewhere the name is given to notes that change nothing
            filled = any(name in message.text for message in messages for name in ("<bbox>", "<ref-object>"))
            if not filled and not (isinstance(value, dict) and not {"bbox", "ref"}.isdisjoint(value)):
                continue
        raise DataError(f"{where}: `{key}` {_cannot(key)}", "unsupported-key")


def _check_said(messages: Sequence[Message], where: str) -> None:
    """Every turn says something, and none says more than can be read in reasonable time."""
    size = sum(len(message.text) + (len(json.dumps(message.fields)) if message.fields else 0) for message in messages)
    if size > _MAX_TEXT:
        raise DataError(
            f"{where}: {size:,} characters of text, at most {_MAX_TEXT:,} are allowed; split it", "too-long"
        )
    for number, message in enumerate(messages, start=1):
        if message.media or message.text.strip() or message.tool_calls:
            continue
        if message.role == "user" or (message.role == "assistant" and message.train):
            code = "empty-question" if message.role == "user" else "empty-answer"
            raise DataError(f"{where}: turn {number} ({message.role}) says nothing; write it or take it out", code)


def _split(text: str, role: Role, pool: _Pool, spot: str, *, newline: bool) -> Iterator[Part]:
    """Cut text at its placeholders."""
    position = 0
    for match in _PLACEHOLDER.finditer(text):
        kind = match[1]
        if not pool.holds(kind):
            continue
        if role != "user" and (role, kind) != ("assistant", "image"):
            problem = f"<{kind}> in a turn of the {role}; media can only be in the user's turns, images in answers too"
            raise DataError(f"{spot}: {problem}", "misplaced-medium")
        before = text[position : match.start()]
        position = match.end()
        if newline and text.startswith("\n", position):
            position += 1
        elif newline and before.endswith("\n"):
            before = before[:-1]
        if before:
            yield Text(before)
        item = pool.take(pool.image if kind == "image" else kind)
        if item is not None:
            yield item
    if position < len(text):
        yield Text(text[position:])


def _parts(content: Any, role: Role, spot: str, image_root: Path | None, pool: _Pool | None) -> tuple[Part, ...]:
    """Read a list of content parts."""
    if not isinstance(content, list):
        raise DataError(f"{spot}: `content` must be text or a list of parts, found {kind_of(content)}")
    parts: list[Part] = []
    for index, entry in enumerate(content):
        at = f"{spot}.content[{index}]"
        part = _part(entry, at, image_root, pool)
        if not isinstance(part, Text) and role != "user" and (role != "assistant" or not isinstance(part, Image)):
            problem = f"media in a turn of the {role}; media can only be in the user's turns, images in answers too"
            raise DataError(f"{at}: {problem}", "misplaced-medium")
        if part is not None and part != Text(""):
            parts.append(part)
    return tuple(parts)


def _part(entry: Any, at: str, image_root: Path | None, pool: _Pool | None) -> Part | None:
    """Read one content part; None for a medium that the pool ran out of."""
    if isinstance(entry, str):
        return Text(entry)
    if not isinstance(entry, dict):
        raise DataError(f"{at}: expected an object with `type`, found {kind_of(entry)}")
    kind = entry.get("type")
    if kind in ("text", "input_text", "output_text"):
        if not isinstance(entry.get("text"), str):
            raise DataError(f"{at}: `text` must be text, found {kind_of(entry.get('text'))}")
        return Text(entry["text"])
    if kind == "input_audio":
        sound = entry.get("input_audio")
        if not isinstance(sound, dict) or not isinstance(sound.get("data"), str):
            raise DataError(f"{at}: `input_audio` must be an object with `data` (base64) and `format`")
        return Audio(f"data:audio/{sound.get('format', 'wav')};base64,{sound['data']}")
    name = str(kind).removeprefix("input_").removesuffix("_url")
    name = "document" if name == "file" else name
    if name not in MEDIA:
        known = "text, image_url, image, video_url, video, audio_url, audio, input_audio, document, file"
        raise DataError(f"{at}: unknown part type {shown(kind)}; known: {known}")
    if any(entry.get(key) is not None for key in (f"{name}_url", name, *SOURCES)):
        return medium_of(name, entry, image_root, at, of_part=True)
    if pool is not None and pool.holds(name):
        item = pool.take(name)
        said = settings_of(name, entry, at)
        return replace(item, **said) if item is not None and said else item
    raise DataError(f"{at}: the {name} has no source; give `{name}_url`, `{name}`, `url` or `path`")
