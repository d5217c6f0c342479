"""Messages and settings -> the JSON of a request to OpenAI's chat API, media inside as base64.

A server is to see what a model of ours would. An image goes out as the bytes it came in if that is what they show
everywhere: an upright, opaque 8-bit JPEG or PNG that is not too large. Anything else (EXIF rotation, transparency, 16
bits, CMYK, WebP, GIF, ...) is opened here and drawn anew. Video parts are an extension that vLLM, llama.cpp and others
take and OpenAI does not; a server that does not says so itself.

Servers differ in small ways that only a refusal shows. What was learnt is kept, so that it costs one request.
"""

import base64
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from PIL import ExifTags
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

MAX_DRAWN = 3_500_000
"""Bytes that an image drawn anew is to keep to, if a JPEG of good quality can; some servers take 5 MB in base64."""

_DRAWN: tuple[tuple[str, dict[str, int]], ...] = (
    ("PNG", {}),
    ("JPEG", {"quality": 95, "subsampling": 0}),
    ("JPEG", {"quality": 85}),
)
"""How it is drawn: the first that is small enough."""

_SENT_AS_THEY_ARE = {"PNG": "image/png", "JPEG": "image/jpeg", "MPO": "image/jpeg"}
"""By Pillow's name; MPO is what cameras write: a JPEG, and further ones behind it that a reader of JPEG never sees."""

_LIMITS = ("max_tokens", "max_completion_tokens")
"""Older servers know only the first; OpenAI's reasoning models refuse it and want the second."""


@dataclass(frozen=True)
class Accepts:
    """What a server takes, as far as it has shown."""

    limit: str = _LIMITS[0]  # The name of the most tokens to make
    most_tokens: int | None = None  # The most that it makes
    stream_options: bool = True  # Whether a streamed answer may be asked to count its tokens
    zero_temperature: bool = True  # Whether temperature 0 may be asked for; reasoning models take nothing but their own


def learn(accepts: Accepts, refusal: str, body: Mapping[str, Any]) -> Accepts | None:
    """What to try next, after a refusal."""
    if "stream_options" in refusal and "stream_options" in body:
        return replace(accepts, stream_options=False)
    if "temperature" in refusal and body.get("temperature") == 0.0 and accepts.zero_temperature:
        return replace(accepts, zero_temperature=False)
    if not _NAMES_LIMIT.search(refusal):
        return None
    if "context" not in refusal and (most := _most_tokens(refusal, body.get(accepts.limit))) is not None:
        return replace(accepts, most_tokens=most)
    other = _LIMITS[_LIMITS.index(accepts.limit) - 1]
    if accepts.limit in refusal and (other in refusal or _UNKNOWN.search(refusal)) and not _TOO_MANY.search(refusal):
        return replace(accepts, limit=other)
    return None


_NAMES_LIMIT = re.compile(r"max[_ ]?((new|output|completion)[_ ]?)?tokens", re.IGNORECASE)
_UNKNOWN = re.compile(
    r"not support|unsupported|unknown|unrecogni[sz]ed|unexpected|extra|not (permitted|allowed)|deprecated"
    r"|invalid (parameter|field|argument|key|property)",
    re.IGNORECASE,
)
_TOO_MANY = re.compile(
    r"too (large|many|big|high|long)|at most|exceed|\brange\b|less than|greater than|maximum|context|大|超过",
    re.IGNORECASE,
)
_MOST = re.compile(
    r"(?:[\[(]\s*\d+\s*,|\bbetween \d+ and|\bfrom \d+(?: \(inclusive\))? to|(?<![\w.-])\d+\s*(?:~|–|to)"
    r"|\brange\D{0,20}\d+\s*-|\bat most|\bup to|\bno more than|\bless than or equal to|<=|≤"
    r"|(?P<below>\bless than|\bbelow|<)|(?:exceed|maximum|limit|max\b|超过|不大于|最大)\D{0,60}?)"
    r"\s*(?P<most>\d+)(?P<open>\s*\(exclusive\)|\s*\))?",
    re.IGNORECASE,
)
"""Words before the most tokens of an answer, in the refusals of servers."""


def _most_tokens(refusal: str, asked: Any) -> int | None:
    """The most tokens that a refusal allows; None where it names no number below what was asked for."""
    if not isinstance(asked, int):
        return None
    plain = re.sub(r"(?<![\[(\d])\d{1,3}(?:,\d{3})+\b", lambda m: m[0].replace(",", ""), refusal)  # not "[1,512]"
    plain = re.sub(rf"\b{asked}\s*>", "at most", plain)  # "256 > 100"
    for found in _MOST.finditer(plain):
        most = int(found["most"]) - bool(found["below"] or (found["open"] or "").endswith("(exclusive)"))
        if 1 <= most < asked:
            return most
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
    most = min(params.max_new_tokens, accepts.most_tokens or params.max_new_tokens)
    body: Json = {"model": model, "messages": messages, accepts.limit: most}
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
    for number, message in enumerate(messages, start=1):
        if message.role == "assistant" and not message.text.strip():
            # Most servers refuse such a turn, and with it every later question of the conversation.
            raise PolymodalError(
                f"message {number}: the assistant's turn says nothing, which servers refuse; take it and its question "
                "out, or write what was said"
            )
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
    lossy = False
    if isinstance(source, PILImage.Image):
        opened = open_image(source)
    else:
        data = read_bytes(source)
        opened = open_image(data, name=describe(source))  # also the check that it is a whole image
        with PILImage.open(io.BytesIO(data)) as image:
            kind, lossy = _SENT_AS_THEY_ARE.get(image.format or ""), image.format in ("JPEG", "MPO")
            if kind is not None and len(data) <= limit and _shows_everywhere(image, data):
                return kind, data
    for form, options in _DRAWN[lossy:]:  # what was a JPEG would be several times larger as a PNG
        buffer = io.BytesIO()
        opened.save(buffer, form, **options)
        data = buffer.getvalue()
        if len(data) <= min(limit, MAX_DRAWN):
            return f"image/{form.lower()}", data
    if len(data) <= limit:
        return "image/jpeg", data
    raise MediaError(f"{describe(source)}: {len(data):,} bytes as a JPEG, at most {limit:,} are sent; scale it down")


def _shows_everywhere(image: PILImage.Image, data: bytes) -> bool:
    """Whether every reader of JPEG and PNG shows the same as `open_image`."""
    try:
        upright = image.getexif().get(ExifTags.Base.Orientation, 1) == 1
    except Exception:  # damaged metadata, of which readers may make anything
        return False
    still = image.format == "MPO" or not getattr(image, "is_animated", False)
    deep = image.format == "PNG" and data[24] > 8  # bits, in the header; Pillow opens 16 of colour as 8
    return upright and still and not deep and image.mode in ("RGB", "L") and not image.has_transparency_data


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
