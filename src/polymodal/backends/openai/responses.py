"""What an OpenAI-compatible server sends: server-sent events, chat-completion objects, error objects.

Nothing a server sends is trusted: sizes are limited, types are checked, and its words are cleaned before they are
shown.
Lines are split as bytes and decoded whole, so that a character is never cut; `str.splitlines`, which HTTP clients use,
would also break JSON at U+2028 and its like.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Iterable, Iterator
from typing import Any

from polymodal.errors import EndpointError

MAX_EVENT = 8 * 2**20
"""The longest event, in bytes."""

_LINE_END = re.compile(rb"\r\n|\n|\r(?!\Z)")  # a carriage return at the end may be half of a pair


def read_events(chunks: Iterable[bytes]) -> Iterator[str]:
    """Read the data of server-sent events."""
    rest, data, size = b"", [], 0
    for chunk in chunks:
        *lines, rest = _LINE_END.split(rest + chunk)
        for line in lines:
            if line:
                data += _data_of(line)
                size += len(line)
            elif data:
                yield "\n".join(data)
            if not line:
                data, size = [], 0
        if size + len(rest) > MAX_EVENT:
            raise EndpointError(f"the server sent an event of more than {MAX_EVENT:,} bytes")
    data += _data_of(rest.rstrip(b"\r"))
    if data:
        yield "\n".join(data)


def _data_of(line: bytes) -> list[str]:
    """The data in one line, as a list of none or one; a byte order mark may stand before it."""
    field, _, value = line.removeprefix(b"\xef\xbb\xbf").partition(b":")
    value = value.removeprefix(b" ")
    return [value.decode("utf-8", "replace")] if field == b"data" and value else []


def parse_object(text: str | bytes) -> dict[str, Any]:
    """Read one JSON object."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        found = None
    if isinstance(found, list) and len(found) == 1:  # Gemini wraps its errors so
        found = found[0]
    if not isinstance(found, dict):
        shown = text[:200].decode("utf-8", "replace") if isinstance(text, bytes) else text[:200]
        raise EndpointError(f"the server sent no chat completion but: {clean(shown, 80)!r}")
    return found


def text_of(event: dict[str, Any]) -> str:
    """The answer's text in a completion or a piece of one; what a refusing model says is its answer."""
    said = _choice(event).get("delta") or _choice(event).get("message")
    if not isinstance(said, dict):
        return ""
    content = said.get("content") or said.get("refusal") or ""
    if isinstance(content, list):  # parts
        content = "".join(str(part.get("text") or "") for part in content if isinstance(part, dict))
    return content if isinstance(content, str) else ""


def finish_of(event: dict[str, Any]) -> str | None:
    """Why the answer ended, where this piece says so."""
    reason = _choice(event).get("finish_reason")
    return str(reason) if reason is not None else None


def is_completion(event: dict[str, Any]) -> bool:
    """Whether an object has an answer in it, be it an empty one."""
    return bool(_choice(event))


def _choice(event: dict[str, Any]) -> dict[str, Any]:
    choices = event.get("choices")
    found = choices[0] if isinstance(choices, list) and choices else {}
    return found if isinstance(found, dict) else {}


def error_of(document: Any) -> str:
    """What an error object says, in any of the forms that servers use; "" where it is none."""
    if isinstance(document, list):
        document = document[0] if document else None
    if not isinstance(document, dict):
        return ""
    found = document.get("error") or document.get("message") or document.get("detail")
    if isinstance(found, dict):
        found = found.get("message") or found.get("code") or found.get("type") or "no reason given"
    return found if isinstance(found, str) else json.dumps(found) if found else ""


def clean(text: str, limit: int = 300) -> str:
    """Make a server's words fit for one line on a terminal."""
    kept = "".join(
        " " if c.isspace() else c for c in text[: 4 * limit] if c.isspace() or unicodedata.category(c)[0] != "C"
    )
    line = " ".join(kept.split())
    return line if len(line) <= limit else f"{line[: limit - 3]}..."
