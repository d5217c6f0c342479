"""Small videos, sounds and documents, good and bad, made by PyAV or byte by byte."""

from __future__ import annotations

import hashlib
import io
import struct
import tempfile
import wave
from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from typing import Any

import av
import numpy as np

RATE = 25
HELVETICA = b"/Font << /F1 << /Type /Font /Subtype /Type1 /BaseFont /Helvetica >> >>"


@lru_cache(maxsize=64)
def _encoded(
    codec: str, format: str, frames: int, width: int, height: int, options: Any, muxer: Any, more: Any
) -> bytes:
    """A video whose every frame is another; small blocks of colour that drift."""
    extra = dict(more)
    with tempfile.NamedTemporaryFile() as file:
        with av.open(file.name, "w", format=format, options=dict(muxer)) as container:
            stream = container.add_stream(codec, rate=RATE, options=dict(options))
            stream.width, stream.height = width, height
            stream.pix_fmt = extra.get("pix_fmt", "yuv420p")
            base = extra.get("base", Fraction(1, 1000) if "times" in extra else Fraction(1, RATE))
            if "times" in extra:
                stream.codec_context.time_base = stream.time_base = base
            if "ratio" in extra:
                stream.codec_context.sample_aspect_ratio = extra["ratio"]
            if "rotation" in extra:
                stream.set_display_rotation(extra["rotation"])
            sound = container.add_stream("aac", rate=8000) if extra.get("sound") else None
            for number in range(frames):
                frame = av.VideoFrame.from_ndarray(pattern(number, height, width), format="rgb24")
                frame.pts, frame.time_base = extra["times"][number] if "times" in extra else number, base
                container.mux(stream.encode(frame))
            container.mux(stream.encode())
            if sound is not None:
                silence = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
                silence.rate = 8000
                container.mux(sound.encode(silence))
                container.mux(sound.encode())
        return Path(file.name).read_bytes()


def encoded(
    codec: str = "libx264",
    format: str = "mp4",
    frames: int = 50,
    width: int = 64,
    height: int = 48,
    options: dict[str, str] | None = None,
    muxer: dict[str, str] | None = None,
    **extra: Any,
) -> bytes:
    packed = (tuple((given or {}).items()) for given in (options, muxer, extra))
    return _encoded(codec, format, frames, width, height, *packed)


def pattern(number: int, height: int = 48, width: int = 64) -> np.ndarray:
    rng = np.random.default_rng(number // 10)  # some frames are far apart, so that encoders use what they have
    blocks = rng.integers(0, 256, (height // 8 + 1, width // 8 + 1, 3)) + 7 * (number % 10)
    return np.kron(blocks % 256, np.ones((8, 8, 1), int))[:height, :width].astype(np.uint8)


def wav(data: np.ndarray, rate: int = 16_000, kind: int = 1, channels: int = 1, claim: int | None = None) -> bytes:
    """A WAV file as bytes; `kind` 1 is whole numbers, 3 floats."""
    raw, block = data.tobytes(), channels * data.itemsize
    size = len(raw) if claim is None else claim
    fmt = struct.pack("<IHHIIHH", 16, kind, channels, rate, (rate * block) % 2**32, block, 8 * data.itemsize)
    return b"RIFF" + struct.pack("<I", min(36 + size, 2**32 - 1)) + b"WAVEfmt " + fmt + b"data" + struct.pack(
        "<I", size
    ) + raw  # fmt: skip


def opus(seconds: float) -> bytes:
    """Ogg Opus of one packet over and over: a hundredth of a second of file lasts for many of sound."""
    out = io.BytesIO()
    with av.open(out, "w", format="ogg") as container:
        stream = container.add_stream("libopus", rate=48_000, layout="mono", options={"frame_duration": "60"})
        stream.codec_context.open()
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 2880), np.float32), format="flt", layout="mono")
        frame.sample_rate, frame.pts = 48_000, 0
        body = bytes(stream.encode(frame)[0])
        for number in range(int(seconds / 0.06)):
            packet = av.Packet(body)
            packet.pts = packet.dts = number * 2880
            packet.duration, packet.time_base, packet.stream = 2880, Fraction(1, 48_000), stream
            container.mux(packet)
    return out.getvalue()


def pdf(objects: Sequence[bytes], trailer: bytes = b"") -> bytes:
    """A PDF of these objects, the first its catalogue."""
    out, places = b"%PDF-1.4\n", []
    for number, body in enumerate(objects, 1):
        places.append(len(out))
        out += b"%d 0 obj\n%s\nendobj\n" % (number, body)
    table = b"".join(b"%010d 00000 n \n" % place for place in places)
    head = b"xref\n0 %d\n0000000000 65535 f \n" % (len(objects) + 1)
    tail = b"trailer\n<< /Size %d /Root 1 0 R %s>>\nstartxref\n%d\n%%%%EOF\n" % (len(objects) + 1, trailer, len(out))
    return out + head + table + tail


def stream(data: bytes, entries: bytes = b"") -> bytes:
    return b"<< /Length %d %s>>\nstream\n%s\nendstream" % (len(data), entries, data)


def one_page(content: bytes, box: bytes = b"0 0 200 100", resources: bytes = b"", more: Sequence[bytes] = ()) -> bytes:
    return pdf([
        b"<< /Type /Catalog /Pages 2 0 R >>",
        b"<< /Type /Pages /Kids [3 0 R] /Count 1 >>",
        b"<< /Type /Page /Parent 2 0 R /MediaBox [%s] /Contents 4 0 R /Resources << %s >> >>" % (box, resources),
        stream(content),
        *more,
    ])  # fmt: skip


def many_pages(count: int) -> bytes:
    kids = b" ".join(b"%d 0 R" % (number + 3) for number in range(count))
    page = b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 72 72] >>"
    pages = b"<< /Type /Pages /Kids [%s] /Count %d >>" % (kids, count)
    return pdf([b"<< /Type /Catalog /Pages 2 0 R >>", pages, *[page] * count])


def encrypted(password: bytes) -> bytes:
    """A PDF of one page under the oldest of its ciphers, 40-bit RC4."""

    def rc4(key: bytes, data: bytes) -> bytes:
        box, j, out = list(range(256)), 0, bytearray()
        for i in range(256):
            j = (j + box[i] + key[i % len(key)]) % 256
            box[i], box[j] = box[j], box[i]
        i = j = 0
        for byte in data:
            i, j = (i + 1) % 256, (j + box[(i + 1) % 256]) % 256
            box[i], box[j] = box[j], box[i]
            out.append(byte ^ box[(box[i] + box[j]) % 256])
        return bytes(out)

    fill = bytes.fromhex("28bf4e5e4e758a4164004e56fffa01082e2e00b6d0683e802f0ca9fe6453697a")
    padded = (password + fill)[:32]
    owner = rc4(hashlib.md5((b"owner" + fill)[:32]).digest()[:5], padded)
    key = hashlib.md5(padded + owner + (0xFFFFFFFC).to_bytes(4, "little") + bytes(16)).digest()[:5]
    entries = b"<%s> /U <%s> /P -4" % (owner.hex().encode(), rc4(key, fill).hex().encode())
    page = b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 72 72] >>"
    return pdf(
        [b"<< /Type /Catalog /Pages 2 0 R >>", b"<< /Type /Pages /Kids [3 0 R] /Count 1 >>", page],
        b"/ID [<%s> <%s>] /Encrypt << /Filter /Standard /V 1 /R 2 /O %s >> " % (b"00" * 16, b"00" * 16, entries),
    )


def clip(path: Path, frames: int = 9, side: int = 48, rate: int = 4, sound: bool = False) -> Path:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=rate)
        stream.width = stream.height = side
        stream.pix_fmt = "yuv420p"
        voice = container.add_stream("pcm_s16le", rate=16000, layout="mono") if sound else None
        if voice is not None:
            frame = av.AudioFrame.from_ndarray(np.ones((1, 16000), np.int16), format="s16", layout="mono")
            frame.sample_rate = 16000
            container.mux(voice.encode(frame))
        for number in range(frames):
            array = np.full((side, side, 3), 20, np.uint8)
            array[:, number * side // frames : (number + 1) * side // frames] = 230
            container.mux(stream.encode(av.VideoFrame.from_ndarray(array)))
        container.mux(stream.encode())
    return path


def tone(path: Path, seconds: float = 0.5, pitch: float = 440.0) -> Path:
    time = np.arange(int(16000 * seconds)) / 16000
    with wave.open(str(path), "wb") as file:
        file.setparams((1, 2, 16000, 0, "NONE", ""))
        file.writeframes((8000 * np.sin(2 * np.pi * pitch * time)).astype("<i2").tobytes())
    return path
