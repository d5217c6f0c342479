"""Media as parts of a message of OpenAI's chat API: base64 of what servers read, within limits of size.

A server is to see what a model of ours would. An image goes out as the bytes it came in if that is what they show
everywhere: an upright, opaque 8-bit JPEG or PNG that is not too large. Anything else (EXIF rotation, transparency, 16
bits, CMYK, WebP, GIF, ...) is opened here and drawn anew. A sound goes as it came if it is WAV or MP3, which is all
that `input_audio` may be; others are decoded and go as WAV.

A video goes whole as `video_url`, an extension that vLLM, SGLang and Qwen's own service read, or as frames, each an
image, the way GPT-4o is asked about one. "auto" sends it whole where it can: not where a part says which frames are
wanted, which has no place in the API, nor a kind of file that servers do not read, nor to a server that refused one.
A document goes page by page as images, or whole as a `file` part, which OpenAI takes of PDFs alone.
"""

import base64
import io
import wave
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from PIL import ExifTags
from PIL import Image as PILImage

from polymodal.errors import ConfigError, MediaError
from polymodal.media.audio import open_audio
from polymodal.media.image import open_image
from polymodal.media.source import describe, read_bytes
from polymodal.media.video import probe, sample_frames
from polymodal.media.window import open_window
from polymodal.messages import Audio, Document, Image, Media, Message, Source, Video
from polymodal.processing.document_pages import expand_documents

Detail = Literal["auto", "low", "high"]
Videos = Literal["auto", "url", "frames"]
Documents = Literal["pages", "file"]
Json = dict[str, Any]

MAX_IMAGE = 20 * 2**20
MAX_SOUND = 25 * 2**20
MAX_VIDEO = 100 * 2**20
MAX_DOCUMENT = 32 * 2**20
"""The most bytes of one part."""
MAX_REQUEST = 256 * 2**20
"""The most bytes of all media of a conversation, in base64."""
SOUND_RATE = 16_000
"""Samples a second of a sound that is sent as WAV; speech encoders hear no more."""
FRAME_SIDE = 1024
"""The longer side of a frame that is sent as an image, in pixels, at most."""

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


@dataclass(frozen=True)
class Sending:
    """How media are sent."""

    detail: Detail | None = None  # Of images, where a server knows it
    videos: Videos = "auto"  # Whole, or as frames
    documents: Documents = "pages"  # Page by page, or the file


SENDING = Sending()


def with_pages(messages: Sequence[Message], sending: Sending) -> Sequence[Message]:
    """A conversation with the pages of documents in their place, unless they are sent as files."""
    return expand_documents(messages) if sending.documents == "pages" else messages


def media_parts(part: Media, sending: Sending) -> Iterator[Json]:
    """Write one part; a video may become several."""
    match part:
        case Image(source):
            yield _image(image_bytes(source), sending)
        case Audio():
            yield _sound(*_sound_bytes(part))
        case Video(source):
            whole = _whole_video(part, sending.videos)
            if whole is not None:
                yield {"type": "video_url", "video_url": {"url": _data_url(*whole)}}
            else:
                yield from _frames(part, sending)
            if part.audio and probe(source, count=False).audio:
                yield _sound("wav", _as_wav(part))
        case Document():
            yield _document(part)


def size_of(message: Json) -> int:
    """The bytes of a written message's media."""
    if isinstance(message["content"], str):
        return 0
    fields = [value for part in message["content"] for value in part.values() if isinstance(value, dict)]
    return sum(len(text) for field in fields for text in field.values())


def _image(sent: tuple[str, bytes], sending: Sending) -> Json:
    detail = {"detail": sending.detail} if sending.detail else {}
    return {"type": "image_url", "image_url": {"url": _data_url(*sent), **detail}}


def image_bytes(source: Source, limit: int = MAX_IMAGE, lossy: bool = False) -> tuple[str, bytes]:
    """Read an image as it is to be sent."""
    if isinstance(source, PILImage.Image):
        opened = open_image(source)
    else:
        data = read_bytes(source)
        opened = open_image(source, name=describe(source))  # also the check that it is a whole image
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


def _sound(kind: str, data: bytes) -> Json:
    return {"type": "input_audio", "input_audio": {"data": _base64(data), "format": kind}}


def _sound_bytes(part: Audio) -> tuple[str, bytes]:
    """A sound as it came where servers read that, else as WAV."""
    source = part.source
    if isinstance(source, PILImage.Image):
        raise MediaError(f"{describe(source)}: is an image; give it as an Image part")
    with closing((window := open_window(source, 2**31, describe(source), MAX_VIDEO)).file):
        head = window.read(12)
    if (part.start, part.end) != (None, None):
        return "wav", _as_wav(part)
    if head[:4] == b"RIFF" and head[8:12] == b"WAVE":
        return "wav", _read(source, MAX_SOUND)
    if head[:3] == b"ID3" or (head[0] == 0xFF and len(head) > 1 and head[1] & 0xE6 == 0xE2):
        return "mp3", _read(source, MAX_SOUND)
    return "wav", _as_wav(part)


def _as_wav(part: Audio | Video) -> bytes:
    """A sound, or a video's, or the piece of it that is asked for, as WAV of 16 bits."""
    most = MAX_SOUND // (2 * SOUND_RATE)
    segment = (part.start, part.end)
    samples = open_audio(part.source, sample_rate=SOUND_RATE, video=True, segment=segment, max_seconds=most).samples
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(SOUND_RATE)
        file.writeframes(np.rint(samples.clip(-1, 1) * 32767).astype("<i2").tobytes())
    return buffer.getvalue()


def _whole_video(part: Video, videos: Videos) -> tuple[str, bytes] | None:
    """A video's bytes and type; None where its frames are to be sent."""
    chosen = part.num_frames or part.fps or part.times or part.key_frames or part.start is not None
    if videos == "frames" or (videos == "auto" and (chosen or part.end is not None)):
        return None
    if chosen or part.end is not None:
        raise ConfigError(
            f"{describe(part.source)}: a video that is sent whole (videos='url') cannot say which frames are wanted; "
            "leave that out, or send frames (videos='frames')"
        )
    try:
        data = _read(part.source, MAX_VIDEO)
    except MediaError as error:
        if videos == "auto" and error.code == "too-many-pixels":
            return None
        raise
    if data[4:8] == b"ftyp":
        return ("video/quicktime" if data[8:12] == b"qt  " else "video/mp4"), data
    if data[:4] == b"\x1aE\xdf\xa3":
        return "video/webm", data
    if videos == "auto":
        return None
    raise MediaError(f"{describe(part.source)}: is neither MP4, QuickTime nor WebM; convert it to MP4")


def _frames(part: Video, sending: Sending) -> Iterator[Json]:
    """Frames as images, after a line that says when each is shown."""
    segment = None if part.start is None and part.end is None else (part.start or 0.0, part.end)
    frames = sample_frames(
        part.source,
        part.num_frames,
        fps=part.fps,
        times=part.times,
        key_frames=part.key_frames,
        segment=segment,
        max_side=FRAME_SIDE,
    )
    shown = ", ".join(f"{time:.1f}" for time in frames.times)
    yield {"type": "text", "text": f"{len(frames)} frames of a video, shown at {shown} seconds:"}
    for frame in frames:
        yield _image(image_bytes(frame, lossy=True), sending)


def _document(part: Document) -> Json:
    """A PDF as a file."""
    name = describe(part.source)
    data = _read(part.source, MAX_DOCUMENT)
    if b"%PDF-" not in data[:1024]:
        raise MediaError(f"{name}: is not a PDF, which is all that is sent as a file; send pages (documents='pages')")
    if part.pages is not None or part.text != "none":
        raise ConfigError(
            f"{name}: a document that is sent as a file cannot say which pages or text are wanted; leave that out, or "
            "send pages (documents='pages')"
        )
    url = _data_url("application/pdf", data)
    return {"type": "file", "file": {"filename": "document.pdf", "file_data": url}}


def _read(source: Source, limit: int) -> bytes:
    if isinstance(source, PILImage.Image):
        raise MediaError(f"{describe(source)}: is an image; give it as an Image part")
    return read_bytes(source, limit=limit)


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


def _data_url(kind: str, data: bytes) -> str:
    return f"data:{kind};base64,{_base64(data)}"
