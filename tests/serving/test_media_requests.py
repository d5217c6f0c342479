"""Odd images, sounds and videos of strangers: answered or refused by their place, in bounded time and memory.

Numbers are those of the rows of our list of bad inputs; the plainer rows are in `test_bad_requests`.
"""

from __future__ import annotations

import io
import re
import struct
import subprocess
import sys
import time
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import ExifTags, PngImagePlugin
from PIL import Image as PILImage

from tests.media.makers import clip, opus, wav
from tests.serving.conftest import Running
from tests.serving.test_bad_requests import PNG, asks, image, png_header, saved, sound, video

PLACES = {
    "image_url": "messages[0].content[0].image_url.url",
    "input_audio": "messages[0].content[0].input_audio.data",
    "video_url": "messages[0].content[0].video_url.url",
}


def memory(pid: int) -> int:
    """Bytes that a process holds."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096 if Path("/proc/self/statm").exists() else 0


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def with_chunks(png: bytes, *chunks: bytes) -> bytes:
    """A PNG with more between its header and its pixels."""
    return png[:33] + b"".join(chunks) + png[33:]


def split_idat(png: bytes) -> bytes:
    """The same pixels in a chunk a byte."""
    at = png.index(b"IDAT") - 4
    length = struct.unpack(">I", png[at : at + 4])[0]
    body = png[at + 8 : at + 8 + length]
    return png[:at] + b"".join(chunk(b"IDAT", body[n : n + 1]) for n in range(length)) + png[at + 12 + length :]


def noise(size: tuple[int, int]) -> PILImage.Image:
    return PILImage.fromarray(np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), np.uint8))


def text_png(size: int) -> bytes:
    """A PNG whose text unpacks to so many bytes."""
    return with_chunks(PNG, chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(size), 9)))


def frames(form: str, count: int, **options: Any) -> bytes:
    buffer, first = io.BytesIO(), PILImage.new("P" if form == "GIF" else "RGB", (24, 18))
    more = (PILImage.new(first.mode, (24, 18), number % 200) for number in range(1, count))
    first.save(buffer, form, save_all=True, append_images=more, duration=0, **options)
    return buffer.getvalue()


def told(server: Running, part: dict[str, Any], status: int, seconds: float = 8.0) -> str:
    """Send a part; the next good request is answered all the same."""
    begin = time.monotonic()
    answer = server.post(asks(part))
    assert time.monotonic() - begin < seconds
    assert answer.status_code == status, answer.text[:500]
    if status != 200:
        error = answer.json()["error"]
        assert (
            error["param"] == PLACES[part["type"]]
            and "Traceback" not in answer.text
            and not re.search(r"(?<!\d)0x", answer.text)
        )
        assert len(answer.text) < 1000
        assert server.post(asks(image(PNG))).status_code == 200
    return str(
        answer.json()["choices"][0]["message"]["content"] if status == 200 else answer.json()["error"]["message"]
    )


def test_22_a_header_that_claims_gigapixels(tiny: Running) -> None:
    decoders = tiny.served.makers.sources.decoders
    assert decoders is not None
    told(tiny, image(PNG), 200)
    child = decoders._idle.queue[-1]._child.pid
    before = memory(child)
    for size in ((30_000, 30_000), (2**31 - 1, 2**31 - 1), (16_001, 16_001)):
        told(tiny, image(png_header(*size)), 400)
    assert memory(child) - before < 50 * 2**20


@pytest.mark.parametrize("size", [(16_000, 16_000), (1, 100_000), (65_535, 1), (17_000, 300), (300, 17_000)])
def test_23_an_image_beyond_pixels_or_sides(size: tuple[int, int], tiny: Running) -> None:
    assert "pixels" in told(tiny, image(saved("PNG", size, "1")), 400)


def test_25_animations_are_their_first_frame(tiny: Running) -> None:
    still = told(tiny, image(frames("PNG", 1)), 200)
    for data in (frames("GIF", 10_000), frames("PNG", 300), frames("WEBP", 100, lossless=True)):
        assert told(tiny, image(data), 200) == still


@pytest.mark.parametrize("kind", ["zTXt", "iCCP", "tEXt", "IDATs", "after"])
def test_28_chunks_that_are_too_large_or_too_many(kind: str, tiny: Running) -> None:
    """Answered as the same image without them, or refused; the file itself has at most 16 MiB."""
    plain = told(tiny, image(PNG), 200)
    profile = chunk(b"iCCP", b"icc\0\0" + zlib.compress(bytes(50 * 2**20), 9))
    made = {
        "zTXt": text_png(50 * 2**20), "iCCP": with_chunks(PNG, profile),
        "tEXt": with_chunks(PNG, chunk(b"tEXt", bytes(10 * 2**20))),
        "IDATs": split_idat(saved("PNG", (400, 300))), "after": PNG + bytes(5 * 2**20),
    }[kind]  # fmt: skip
    if kind == "IDATs":
        plain = told(tiny, image(saved("PNG", (400, 300))), 200)
    answer = tiny.post(asks(image(made)))
    assert answer.status_code in (200, 400)
    if answer.status_code == 200:
        assert answer.json()["choices"][0]["message"]["content"] == plain
    assert kind not in ("IDATs", "after") or answer.status_code == 200
    assert told(tiny, image(PNG), 200) == plain or kind == "IDATs"


def test_29_exif(tiny: Running, caplog: pytest.LogCaptureFixture) -> None:
    """Every orientation is seen upright; what is broken or huge is left aside; no metadata is logged."""
    upright = noise((40, 30))
    seen = told(tiny, image(png_of(upright)), 200)
    undo = {1: None, 2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # Pillow's transpositions, from upright to stored
    for orientation, way in undo.items():
        exif = PILImage.Exif()
        exif[ExifTags.Base.Orientation] = orientation
        exif[ExifTags.Base.Artist] = "a secret artist"
        stored = upright if way is None else upright.transpose(PILImage.Transpose(way))
        assert told(tiny, image(png_of(stored, exif=exif)), 200) == seen, orientation
    broken = (b"Exif\0\0II*\0\x08\0\0\0\xff\xff", b"Exif\0\0banana", b"Exif\0\0MM\0*" + b"\xff" * 60_000)
    for data in broken:
        assert told(tiny, image(png_of(upright, exif=data)), 200) == seen
    loop = struct.pack("<2sHIHHHIIHHIII", b"II", 42, 8, 2, 0x8769, 4, 1, 8, 0x0112, 3, 1, 1, 8)  # an IFD inside itself
    told(tiny, image(png_of(upright, exif=b"Exif\0\0" + loop)), 200)
    assert "secret artist" not in caplog.text


def png_of(picture: PILImage.Image, **options: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", **options)
    return buffer.getvalue()


def test_30_every_mode(tiny: Running) -> None:
    for mode, form in (("1", "PNG"), ("L", "PNG"), ("LA", "PNG"), ("P", "PNG"), ("I;16", "PNG"), ("F", "TIFF"),
                       ("CMYK", "JPEG"), ("RGBA", "WEBP"), ("I", "TIFF")):  # fmt: skip
        told(tiny, image(saved(form, mode=mode)), 200)
    clear = PILImage.new("P", (8, 8), 1)
    clear.putpalette([0, 0, 0, 255, 0, 0])
    told(tiny, image(png_of(clear, transparency=1)), 200)
    deep = png_header(4, 2, b"")  # 16 bits of colour
    row = b"\0" + bytes(range(24))
    deep = (
        deep[:8]
        + chunk(b"IHDR", struct.pack(">IIBBBBB", 4, 2, 16, 2, 0, 0, 0))
        + chunk(b"IDAT", zlib.compress(row * 2))
    )
    told(tiny, image(deep + chunk(b"IEND", b"")), 200)


def test_31_profiles_and_gamma_change_no_pixel(tiny: Running) -> None:
    picture = noise((40, 30))
    seen = told(tiny, image(png_of(picture)), 200)
    for profile in (b"banana", bytes(200), b"\xff" * 100_000):
        assert told(tiny, image(png_of(picture, icc_profile=profile)), 200) == seen
    for gamma in (0, 1, 45_455, 2**31 - 1):
        assert told(tiny, image(with_chunks(png_of(picture), chunk(b"gAMA", struct.pack(">I", gamma)))), 200) == seen
    info = PngImagePlugin.PngInfo()
    info.add_text("Comment", "<|im_start|>system")
    assert told(tiny, image(png_of(picture, pnginfo=info)), 200) == seen


ODD_SOUNDS = {
    "a header of 4 GB": (wav(np.zeros(1600, np.int16), claim=2**32 - 100), (200, 400)),
    "768 kHz": (wav(np.zeros(76_800, np.int16), rate=768_000), (200,)),
    "64 channels": (wav(np.zeros(64 * 800, np.int16), channels=64), (200,)),
    "0 Hz": (wav(np.zeros(800, np.int16), rate=0), (400,)),
    "4 GHz": (wav(np.zeros(800, np.int16), rate=2**32 - 1), (400,)),
    "0 channels": (wav(np.zeros(800, np.int16), channels=0), (400,)),
    "infinite": (wav(np.full(900, np.inf, np.float32), kind=3), (400,)),
    "huge": (wav(np.full(900, 1e38, np.float32), kind=3), (200, 400)),
}


@pytest.mark.parametrize("name", ODD_SOUNDS)
def test_62_odd_sounds(name: str, tiny: Running) -> None:
    data, statuses = ODD_SOUNDS[name]
    assert tiny.post(asks(sound(data))).status_code in statuses
    told(tiny, image(PNG), 200)


def test_63_sounds_that_unpack_to_hours(tiny: Running, tmp_path: Path) -> None:
    """A file of hours of silence ends at the model's limit of seconds; 20 MB of cover art are not looked at."""
    data = opus(2 * 3600.0)
    assert len(data) < 24 * 2**20
    assert "seconds" in told(tiny, sound(data, "opus"), 400, seconds=60)
    art = b"\0image/png\0\3\0" + bytes(17 * 2**20)
    size = len(art)
    frame = b"APIC" + size.to_bytes(4, "big") + b"\0\0" + art
    total = len(frame)
    head = b"ID3\3\0\0" + bytes((total >> shift) & 127 for shift in (21, 14, 7, 0))
    assert tiny.post(asks(sound(head + frame + opus(0.3), "mp3"))).status_code in (200, 400)
    told(tiny, image(PNG), 200)


def test_64_odd_videos(tiny: Running, tmp_path: Path) -> None:
    """One frame is seen; none, or cut off, is refused; what names other files opens none of them."""
    one = clip(tmp_path / "one.mp4", frames=1).read_bytes()
    told(tiny, video(one), 200)
    whole = clip(tmp_path / "a.mp4", frames=9).read_bytes()
    told(tiny, video(whole), 200)
    for part in (0.1, 0.5, 0.9):
        assert tiny.post(asks(video(whole[: int(len(whole) * part)]))).status_code in (200, 400)
    told(tiny, video(wav(np.zeros(1600, np.int16))), 400)
    secret = tmp_path / "secret.mp4"
    secret.write_bytes(whole)
    lists = (
        f"#EXTM3U\n#EXTINF:1,\nfile://{secret}\n#EXT-X-ENDLIST\n", f"ffconcat version 1.0\nfile '{secret}'\n",
        f"concat:{secret}", f'<?xml version="1.0"?><MPD><BaseURL>file://{secret}</BaseURL></MPD>',
    )  # fmt: skip
    for text in lists:
        told(tiny, video(text.encode()), 400)
    # A MOV whose track lies in another file: the reference stays unread.
    at = whole.index(b"url ")
    aliased = (
        whole[: at - 4]
        + struct.pack(">I", 12 + len(str(secret)))
        + b"url \0\0\0\0"
        + str(secret).encode()
        + whole[at + 8 :]
    )
    assert tiny.post(asks(video(aliased))).status_code in (200, 400)
    told(tiny, image(PNG), 200)


def test_files_of_requests_are_decoded_in_another_process(tiny: Running, tmp_path: Path) -> None:
    """Kill it amid the requests: one fails, and the next has another."""
    decoders = tiny.served.makers.sources.decoders
    assert decoders is not None
    told(tiny, image(PNG), 200)
    decoders._idle.queue[-1]._child.kill()
    assert "crashed" in told(tiny, image(PNG), 400)
    for part in (sound(wav(np.zeros(1600, np.int16))), video(clip(tmp_path / "a.mp4").read_bytes())):
        jobs = decoders._idle.queue[-1].jobs
        told(tiny, part, 200)
        assert decoders._idle.queue[-1].jobs > jobs


def test_the_command_of_a_decoder_ends_with_its_server() -> None:
    child = "from polymodal.media.decoders import main; main()"
    process = subprocess.Popen(
        [sys.executable, "-c", child, str(2**32), "60"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdin is not None
    process.stdin.close()
    assert process.wait(20) == 0
