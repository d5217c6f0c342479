"""What an OpenAI-compatible server says: events of a stream, answers and errors in the forms that servers use."""

import codecs
import io
import itertools
import json
import unicodedata
from collections.abc import Iterable, Iterator
from typing import Any

from polymodal.errors import EndpointError

Event = dict[str, Any]

MAX_EVENT = 8 * 2**20
"""The longest event of a streamed answer, in bytes."""

_SAYS = ("error", "errors", "message", "detail", "error_msg", "errorMessage", "msg", "status_msg", "text")
_NUMBERS = ("code", "error_code", "status_code", "status", "type")
"""Where the objects of servers say what went wrong, and its number."""


def read_events(chunks: Iterable[bytes]) -> Iterator[str]:
    """Read the data of server-sent events; errors in any of the forms that servers use become `{"error": ...}`."""
    # By hand, since a parser that keeps to the standard drops what llama.cpp (`error: {...}`) and proxies (bare JSON)
    # say of a failure. Servers forget the empty line after the last event, and some begin with a byte order mark.
    data: list[str] = []
    failed, size = False, 0
    for line in _lines(itertools.chain(chunks, [b"\n\n"])):
        name, colon, value = line.partition(":")
        value = value.removeprefix(" ")
        size += len(line)
        if size > MAX_EVENT:
            raise EndpointError(f"the server sent an event of more than {MAX_EVENT:,} bytes")
        if not line:
            if text := "\n".join(data):
                yield json.dumps({"error": parsed(text) or text}) if failed else text
            data, failed, size = [], False, 0
        elif name == "data":
            data.append(value)
        elif name == "event":
            failed = "error" in value.lower()
        elif name.lower() in ("error", "exception"):
            data.append(value)
            failed = True
        elif not colon or not name.replace("-", "_").isidentifier():
            data += [line] if name and name not in ("id", "retry") else []


def _lines(chunks: Iterable[bytes]) -> Iterator[str]:
    """Cut a stream into lines, which end in any of three ways."""
    decoder = io.IncrementalNewlineDecoder(codecs.getincrementaldecoder("utf-8-sig")("replace"), translate=True)
    parts, size = [""], 0
    for chunk in chunks:
        *ended, rest = decoder.decode(chunk).split("\n")
        for end in ended:
            yield "".join([*parts, end])
            parts, size = [], 0
        parts.append(rest)
        size += len(rest)
        if size > MAX_EVENT:
            raise EndpointError(f"the server sent an event of more than {MAX_EVENT:,} bytes")


def text_of(event: Event) -> str:
    """The answer's text in a completion or a piece of one; what a refusing model says is its answer."""
    message = _message(event)
    content = message.get("content") or message.get("refusal") or ""
    if isinstance(content, list):  # parts
        content = "".join(str(part.get("text") or "") for part in content if isinstance(part, dict))
    return content if isinstance(content, str) else ""


def thinks(event: Event) -> bool:
    """Whether a completion or a piece of one holds thoughts, which are no answer."""
    message = _message(event)
    parts = message["content"] if isinstance(message.get("content"), list) else []
    return any(message.get(key) for key in ("reasoning_content", "reasoning", "reasoning_details", "thinking")) or any(
        isinstance(part, dict) and part.get("type") in ("thinking", "reasoning") for part in parts
    )


def finish_of(event: Event) -> str | None:
    """Why the answer ended, where this piece says so."""
    reason = choice(event).get("finish_reason")
    reason = reason.get("type") if isinstance(reason, dict) else reason
    return str(reason) if reason else None


def _message(event: Event) -> dict[str, Any]:
    message = choice(event).get("delta") or choice(event).get("message")
    return message if isinstance(message, dict) else {}


def choice(event: Event) -> dict[str, Any]:
    """The first of the answers that were asked for; others (`n`) are not mixed into it."""
    choices = event.get("choices")
    choices = [c for c in choices if isinstance(c, dict)] if isinstance(choices, list) else []
    return next((c for c in choices if not c.get("index")), {})


def parsed(text: str) -> Any:
    """A JSON document; None where it is none."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return found[0] if isinstance(found, list) and found else found  # Gemini wraps its errors so


def trouble(event: Event) -> Any:
    """What of a piece of an answer is an error, in any of the forms that servers use; None where it is none."""
    base = event.get("base_resp")  # MiniMax
    if isinstance(base, dict) and base.get("status_code"):
        return base
    for holder in (event, choice(event)):
        if holder.get("error"):
            error = holder["error"]
            return error["error"] if isinstance(error, dict) and error.get("error") else error
    if event.get("object") == "error" or event.get("type") == "error" or event.get("error_code"):
        return event
    # No answer in it, and words: nothing but an error has those.
    spoken = any(event.get(key) for key in _SAYS if key != "text")
    return event if spoken and not event.get("choices") else None


def code_of(error: Any) -> int | None:
    """The HTTP status that an error names."""
    found = [str(error.get(key)) for key in _NUMBERS] if isinstance(error, dict) else []
    return next((int(code) for code in found if code.isdecimal() and len(code) == 3), None)


def words_of(document: Any) -> str:
    """What an error object says, in any of the forms that servers use; "" where it is none."""
    if isinstance(document, dict) and document:
        found = next((document[key] for key in (*_SAYS, *_NUMBERS) if document.get(key)), None)
        return words_of(found) or json.dumps(document)
    return document if isinstance(document, str) else json.dumps(document) if document else ""


def clean(text: str, limit: int = 300) -> str:
    """Make a server's words fit for one line on a terminal."""
    kept = "".join(
        " " if c.isspace() else c for c in text[: 4 * limit] if c.isspace() or unicodedata.category(c)[0] != "C"
    )
    line = " ".join(kept.split())
    return line if len(line) <= limit else f"{line[: limit - 3]}..."
