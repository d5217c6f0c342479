"""Messages and settings -> the JSON of a request to OpenAI's chat API, media inside as base64.

An image goes out as the bytes it came in, if it is a still PNG, JPEG, WebP or GIF that is not too large; turning it
upright and scaling it is the server's part. Anything else that we can open goes as a PNG. Video parts are an extension
that vLLM, llama.cpp and others take and OpenAI does not; a server that does not says so itself.

Servers differ in small ways that only a refusal shows. What was learnt is kept, so that it costs one request.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from PIL import Image as PILImage

from polymodal.backends.base import check_messages
from polymodal.errors import ConfigError, MediaError, PolymodalError
from polymodal.generation.params import GenerationParams
from polymodal.media.image import open_image
from polymodal.media.source import describe, read_bytes
from polymodal.messages import Audio, Document, Image, Message, Source, Text, Video

Detail = Literal["auto", "low", "high"]
Json = dict[str, Any]

MAX_IMAGE = 20 * 2**20
MAX_SOUND = 25 * 2**20
MAX_VIDEO = 100 * 2**20
"""The most bytes of one part."""

_SENT_AS_THEY_ARE = {"PNG": "image/png", "JPEG": "image/jpeg", "WEBP": "image/webp", "GIF": "image/gif"}

_LIMITS = ("max_tokens", "max_completion_tokens")
"""Older servers know only the first; OpenAI's reasoning models refuse it and want the second."""


@dataclass(frozen=True)
class Accepts:
    """What a server takes, as far as it has shown."""

    limit: str = _LIMITS[0]  # The name of the most tokens to make
    stream_options: bool = True  # Whether a streamed answer may be asked to count its tokens
    zero_temperature: bool = True  # Whether temperature 0 may be asked for; reasoning models take nothing but their own


def learn(accepts: Accepts, refusal: str, body: Mapping[str, Any]) -> Accepts | None:
    """What to try next, after a refusal."""
    if "stream_options" in refusal and "stream_options" in body:
        return replace(accepts, stream_options=False)
    if "temperature" in refusal and body.get("temperature") == 0.0 and accepts.zero_temperature:
        return replace(accepts, zero_temperature=False)
    if accepts.limit in refusal:
        return replace(accepts, limit=_LIMITS[_LIMITS.index(accepts.limit) - 1])
    return None


def request_body(
    model: str, messages: list[Json], params: GenerationParams, accepts: Accepts, stream: bool, extra: Mapping[str, Any]
) -> Json:
    """Write a request."""
    for name, off in (("top_k", 0), ("repetition_penalty", 1.0)):
        if getattr(params, name) != off:
            raise ConfigError(
                f"{name} is no part of OpenAI's API; leave it out, or give it in `extra` to a server that takes it"
            )
    body: Json = {"model": model, "messages": messages, accepts.limit: params.max_new_tokens}
    if params.temperature > 0 or accepts.zero_temperature:
        body["temperature"] = params.temperature
    if params.top_p != 1.0:
        body["top_p"] = params.top_p
    if params.seed is not None:
        body["seed"] = params.seed
    if stops := [text for text in params.stop if text]:
        body["stop"] = stops
    if stream:
        body["stream"] = True
        if accepts.stream_options:
            body["stream_options"] = {"include_usage": True}
    return body | dict(extra)


def to_openai(messages: Sequence[Message], detail: Detail | None = None) -> list[Json]:
    """Write a conversation as OpenAI's `messages`."""
    check_messages(messages)
    return [{"role": m.role, "content": _content(m, index, detail)} for index, m in enumerate(messages)]


def _content(message: Message, index: int, detail: Detail | None) -> str | list[Json]:
    if not message.media:
        return message.text
    parts: list[Json] = []
    for part in message.parts:
        match part:
            case Text(text):
                if text:
                    parts.append({"type": "text", "text": text})
            case Image(source):
                image = {"url": _data_url(*image_bytes(source)), **({"detail": detail} if detail else {})}
                parts.append({"type": "image_url", "image_url": image})
            case Audio(source):
                kind, data = _sound(source)
                parts.append({"type": "input_audio", "input_audio": {"data": _base64(data), "format": kind}})
            case Video(source):
                parts.append({"type": "video_url", "video_url": {"url": _data_url(*_video(source))}})
            case Document():
                raise PolymodalError(
                    f"message {index + 1}: Document parts cannot be sent to an endpoint; give the pages as images"
                )
    return parts


def image_bytes(source: Source, limit: int = MAX_IMAGE) -> tuple[str, bytes]:
    """Read an image as it is to be sent."""
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
    data = buffer.getvalue()
    if len(data) > limit:
        raise MediaError(f"{describe(source)}: {len(data):,} bytes as a PNG, at most {limit:,} are sent; scale it down")
    return "image/png", data


def _sound(source: Source) -> tuple[str, bytes]:
    data = _read(source, MAX_SOUND)
    if data[:4] == b"RIFF" and data[8:12] == b"WAVE":
        return "wav", data
    if data[:3] == b"ID3" or (data[0] == 0xFF and len(data) > 1 and data[1] & 0xE6 == 0xE2):
        return "mp3", data
    raise MediaError(f"{describe(source)}: is neither WAV nor MP3, which is what endpoints take; convert it")


def _video(source: Source) -> tuple[str, bytes]:
    data = _read(source, MAX_VIDEO)
    if data[4:8] == b"ftyp":
        return ("video/quicktime" if data[8:12] == b"qt  " else "video/mp4"), data
    if data[:4] == b"\x1aE\xdf\xa3":
        return "video/webm", data
    raise MediaError(f"{describe(source)}: is neither MP4, QuickTime nor WebM; convert it to MP4")


def _read(source: Source, limit: int) -> bytes:
    if isinstance(source, PILImage.Image):
        raise MediaError(f"{describe(source)}: is an image; give it as an Image part")
    return read_bytes(source, limit=limit)


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


def _data_url(kind: str, data: bytes) -> str:
    return f"data:{kind};base64,{_base64(data)}"
