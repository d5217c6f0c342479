"""Messages -> the JSON of OpenAI's chat API, images, sounds and videos inside as base64.

An image goes out as the bytes it came in, if it is a still PNG, JPEG, WebP or GIF that is not too large; turning it
upright and scaling it is the server's part. Anything else that we can open goes as a PNG. Video parts are an extension
that vLLM, llama.cpp and others take and OpenAI does not; a server that does not says so itself.
"""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Sequence
from typing import Any, Literal

from polymodal.errors import MediaError, PolymodalError
from polymodal.messages import Audio, Image, Message, Source, Text, Video

Detail = Literal["auto", "low", "high"]

MAX_IMAGE = 20 * 2**20
MAX_SOUND = 25 * 2**20
MAX_VIDEO = 100 * 2**20
"""The most bytes of one part."""

_SENT_AS_THEY_ARE = {"PNG": "image/png", "JPEG": "image/jpeg", "WEBP": "image/webp", "GIF": "image/gif"}
_SURROGATE = re.compile("[\ud800-\udfff]")


def to_openai(messages: Sequence[Message], detail: Detail | None = None) -> list[dict[str, Any]]:
    """Write a conversation as OpenAI's `messages`."""
    return [{"role": m.role, "content": _content(m, index, detail)} for index, m in enumerate(messages)]


def _content(message: Message, index: int, detail: Detail | None) -> str | list[dict[str, Any]]:
    if _SURROGATE.search(message.text):
        raise PolymodalError(
            f"message {index + 1}: the text holds half of a surrogate pair, which is no character; mend its encoding"
        )
    if not message.media:
        return message.text
    if message.role != "user":
        raise PolymodalError(
            f"message {index + 1}: images, sounds and videos must stand in a user's message, not the {message.role}'s"
        )
    parts: list[dict[str, Any]] = []
    for part in message.parts:
        if isinstance(part, Text):
            if part.text:
                parts.append({"type": "text", "text": part.text})
        elif isinstance(part, Image):
            image: dict[str, Any] = {"url": _data_url(*image_bytes(part.source))}
            parts.append({"type": "image_url", "image_url": {**image, **({"detail": detail} if detail else {})}})
        elif isinstance(part, Audio):
            kind, data = _sound(part.source)
            sound = {"data": base64.b64encode(data).decode("ascii"), "format": kind}
            parts.append({"type": "input_audio", "input_audio": sound})
        elif isinstance(part, Video):
            parts.append({"type": "video_url", "video_url": {"url": _data_url(*_video(part.source))}})
        else:
            raise PolymodalError(
                f"message {index + 1}: {type(part).__name__} parts cannot be sent to an endpoint; "
                "give the pages as images"
            )
    return parts


def image_bytes(source: Source, limit: int = MAX_IMAGE) -> tuple[str, bytes]:
    """Read an image as it is to be sent."""
    from PIL import Image as PILImage

    from polymodal.media.image import open_image
    from polymodal.media.source import describe, read_bytes

    if isinstance(source, PILImage.Image):
        opened = open_image(source)
    else:
        data = read_bytes(source)
        opened = open_image(data, name=describe(source))  # also the check that it is a whole image
        with PILImage.open(io.BytesIO(data)) as image:
            kind = _SENT_AS_THEY_ARE.get(image.format or "")
            moves = getattr(image, "is_animated", False)
        if kind is not None and not moves and len(data) <= limit:
            return kind, data
    buffer = io.BytesIO()
    opened.save(buffer, "PNG")
    return "image/png", _within(buffer.getvalue(), limit, describe(source))


def _sound(source: Source) -> tuple[str, bytes]:
    data, name = _read(source, MAX_SOUND)
    if data[:4] == b"RIFF" and data[8:12] == b"WAVE":
        return "wav", data
    if data[:3] == b"ID3" or (data[0] == 0xFF and len(data) > 1 and data[1] & 0xE6 == 0xE2):
        return "mp3", data
    raise MediaError(f"{name}: is neither WAV nor MP3, which is what endpoints take; convert it")


def _video(source: Source) -> tuple[str, bytes]:
    data, name = _read(source, MAX_VIDEO)
    if data[4:8] == b"ftyp":
        return ("video/quicktime" if data[8:12] == b"qt  " else "video/mp4"), data
    if data[:4] == b"\x1aE\xdf\xa3":
        return "video/webm", data
    raise MediaError(f"{name}: is neither MP4, QuickTime nor WebM; convert it to MP4")


def _read(source: Source, limit: int) -> tuple[bytes, str]:
    from PIL import Image as PILImage

    from polymodal.media.source import describe, read_bytes

    name = describe(source)
    if isinstance(source, PILImage.Image):
        raise MediaError(f"{name}: is an image; give it as an Image part")
    return read_bytes(source, limit=limit), name


def _within(data: bytes, limit: int, name: str) -> bytes:
    if len(data) > limit:
        raise MediaError(f"{name}: {len(data):,} bytes as a PNG, at most {limit:,} are sent; scale it down")
    return data


def _data_url(kind: str, data: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode('ascii')}"
