"""Frames of videos of every kind, equal to those of a full decode; and videos that are none."""

from __future__ import annotations

import base64
import contextlib
import io
import random
import re
import struct
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image as PILImage

from polymodal.errors import ConfigError, MediaError, PolymodalError
from polymodal.media import video_containers
from polymodal.media.image import PIXELS_SETTING
from polymodal.media.video import FramePlan, Frames, VideoLimits, plan_frames, probe, read_frames, sample_frames
from polymodal.messages import FileSlice, TableCell
from tests.media.makers import RATE, encoded, pattern

B_FRAMES = {"g": "12", "bf": "3"}
OPEN_GOP = {"g": "12", "x264-params": "open-gop=1:bframes=3:scenecut=0"}
UNEVEN = tuple(np.cumsum(np.random.default_rng(3).integers(10, 200, 50)).tolist())  # milliseconds


def full_decode(data: bytes) -> tuple[np.ndarray, list[float | None]]:
    """Every frame, the naive way."""
    with av.open(io.BytesIO(data)) as container:
        frames = [(frame.to_ndarray(format="rgb24"), frame.time) for frame in container.decode(video=0)]
    return np.stack([pixels for pixels, _ in frames]), [seconds for _, seconds in frames]


def animation(format: str, frames: int = 6, mode: str = "RGB") -> bytes:
    images = [PILImage.fromarray(pattern(10 * number)).convert(mode) for number in range(frames)]
    out = io.BytesIO()
    options: dict[str, Any] = {"duration": [50 + 30 * number for number in range(frames)]}
    options |= {"lossless": True} if format == "WEBP" else {}
    images[0].save(out, format, save_all=True, append_images=images[1:], **options)
    return out.getvalue()


KINDS: dict[str, Callable[[], bytes]] = {
    "mp4": lambda: encoded(options={"g": "12", "bf": "0"}),
    "mp4-b-frames": lambda: encoded(options=B_FRAMES),
    "mp4-open-gop": lambda: encoded(options=OPEN_GOP),
    "mp4-one-gop": lambda: encoded(options={"g": "1000", "x264-params": "scenecut=0"}),
    "mp4-intra-refresh": lambda: encoded(options={"g": "20", "x264-params": "intra-refresh=1:bframes=0"}),
    "mp4-variable": lambda: encoded(options=B_FRAMES, times=UNEVEN),
    "mp4-fragments": lambda: encoded(options=B_FRAMES, muxer={"movflags": "frag_keyframe+empty_moov"}),
    "mp4-fragments-after-index": lambda: encoded(options=B_FRAMES, muxer={"movflags": "frag_keyframe"}),
    "mp4-one-frame": lambda: encoded(frames=1),
    "mp4-mpeg4": lambda: encoded("mpeg4", options={"g": "12", "bf": "2"}),
    "mp4-with-sound": lambda: encoded(options=B_FRAMES, sound=True),
    "mp4-edit-list": lambda: edited(encoded(options=B_FRAMES)),
    "mkv-no-count": lambda: encoded(format="matroska", options=B_FRAMES),
    "mkv-variable": lambda: encoded(format="matroska", options=B_FRAMES, times=UNEVEN),
    "mkv-cut-off": lambda: cut(encoded(format="matroska", options=B_FRAMES), 0.6),
    "webm-a-frame-not-shown": lambda: hidden(encoded("libvpx", "webm", options={"g": "20", "deadline": "realtime"})),
    "mkv-equal-times": lambda: encoded(format="matroska", options=B_FRAMES, times=range(50), base=Fraction(1, 4000)),
    "webm-vp9": lambda: encoded("libvpx-vp9", "webm", options={"g": "12", "deadline": "realtime"}),
    "ts": lambda: encoded(format="mpegts", options=OPEN_GOP),
    "ts-from-the-middle": lambda: from_the_middle(encoded(format="mpegts", options=OPEN_GOP)),
    "mpeg-ps": lambda: encoded("mpeg2video", "mpeg", options={"g": "12", "bf": "2"}),
    "avi-mpeg4": lambda: encoded("mpeg4", "avi", options={"g": "12", "bf": "2"}),
    "avi-h264-no-times": lambda: encoded(format="avi", options=B_FRAMES),
    "h264-no-times": lambda: encoded(format="h264", options=B_FRAMES),
    "mjpeg-odd-size": lambda: encoded("mjpeg", "mov", width=63, height=47, pix_fmt="yuvj444p"),
    "h264-odd-size": lambda: encoded(width=63, height=47, pix_fmt="yuv444p"),
    "10-bit": lambda: encoded("ffv1", "matroska", options={"g": "10"}, pix_fmt="yuv420p10le"),
    "gif": lambda: animation("GIF"),
    "gif-one-frame": lambda: animation("GIF", frames=1),
    "apng": lambda: animation("PNG"),
}


def edited(data: bytes) -> bytes:
    """The same, to be shown from frame 17 on, as a phone's trim does it: decoded from the start, the rest not shown."""
    place = data.index(b"elst") + 16
    return (
        data[:place] + struct.pack(">i", struct.unpack(">i", data[place : place + 4])[0] + 17 * 512) + data[place + 4 :]
    )


def hidden(data: bytes) -> bytes:
    """The same with the tenth frame marked as not to be shown, as VP8's alternate references are."""
    with av.open(io.BytesIO(data)) as container:
        packet = bytes([*container.demux(video=0)][10])
    place = data.index(packet)
    return data[:place] + bytes([packet[0] & ~16]) + data[place + 1 :]


def from_the_middle(data: bytes) -> bytes:
    """A recording that begins between two key frames."""
    return data[len(data) // 188 // 3 * 188 :]


def cut(data: bytes, share: float) -> bytes:
    return data[: int(len(data) * share)]


@pytest.mark.parametrize("kind", KINDS)
def test_seeking_gives_the_frames_of_a_full_decode(kind: str) -> None:
    data = KINDS[kind]()
    expected, seconds = full_decode(data)
    total = len(expected)
    info = probe(data)
    assert (info.frames, info.height, info.width) == expected.shape[:3]
    everything = sample_frames(data, total)
    assert everything.indices == tuple(range(total))
    assert np.array_equal(everything.array, expected)
    for number in range(0, total, 4):  # each alone, so that every one is found by a seek of its own
        plan = FramePlan((number,), total, *expected.shape[1:3], times=(0.0,))
        assert np.array_equal(read_frames(data, plan).array[0], expected[number]), number
    if None not in seconds and "no-times" not in kind and "equal-times" not in kind:
        assert np.allclose(everything.times, np.array(seconds, float) - seconds[0], atol=1e-9)
    uneven = ("mp4-variable", "mkv-variable", "webm-a-frame-not-shown", "gif", "apng")
    assert info.variable == (kind in uneven)
    assert info.audio == (kind == "mp4-with-sound")


@pytest.mark.parametrize("kind", ["mp4-b-frames", "mkv-variable", "ts", "h264-no-times", "mp4-one-frame", "gif"])
@pytest.mark.parametrize("number", [1, 2, 8, 13])
def test_samples_are_those_of_the_usual_loop(kind: str, number: int) -> None:
    data = KINDS[kind]()
    expected, _ = full_decode(data)
    indices = np.linspace(0, len(expected) - 1, number, dtype=int)
    found = sample_frames(data, num_frames=number)
    assert found.indices == tuple(indices)
    assert np.array_equal(found.array, expected[indices])


def test_frames_are_images_and_an_array() -> None:
    frames = sample_frames(encoded())
    assert isinstance(frames, Frames) and len(frames) == 8
    assert frames.array.shape == (8, 48, 64, 3) and frames.array.dtype == np.uint8
    assert frames.times.shape == (8,) and frames.times[0] == 0
    assert [image.tobytes() for image in frames] == [pixels.tobytes() for pixels in frames.array]
    assert frames.images[3].tobytes() == frames[3].tobytes() == frames.array[3].tobytes()


def test_animated_webp() -> None:
    data = animation("WEBP")
    info = probe(data)
    assert (info.frames, info.height, info.width, info.variable) == (6, 48, 64, True)
    assert info.duration == pytest.approx(0.75)
    frames = sample_frames(data, 6)
    assert np.array_equal(frames.array, np.stack([pattern(10 * number) for number in range(6)]))
    assert np.allclose(frames.times, np.cumsum([0, 50, 80, 110, 140, 170]) / 1000)
    assert np.array_equal(sample_frames(data, times=[0.3]).array[0], pattern(30))
    with pytest.raises(MediaError, match="damaged or cut off"):
        sample_frames(cut(data, 0.7), 4)


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG"])
def test_transparency_is_white(format: str) -> None:
    clear = PILImage.new("RGBA", (16, 16), (0, 0, 0, 0))
    red = PILImage.new("RGBA", (16, 16), (255, 0, 0, 255))
    out = io.BytesIO()
    clear.save(out, format, save_all=True, append_images=[red], duration=100, disposal=2, lossless=True)
    frames = sample_frames(out.getvalue(), 2)
    assert frames.array[0].min() == 255
    assert frames.array[1].reshape(-1, 3).tolist() == [[255, 0, 0]] * 256


@pytest.mark.parametrize("rotation", [0, 90, 180, 270])
def test_rotation_is_applied(rotation: int) -> None:
    data = encoded("mpeg4", rotation=-rotation)
    raw, _ = full_decode(data)
    frames = sample_frames(data, 3)
    assert np.array_equal(frames.array, np.rot90(raw[[0, 24, 49]], -rotation // 90, axes=(1, 2)))
    info = probe(data, count=False)
    assert (info.rotation, info.height, info.width) == (rotation, *frames.array.shape[1:3])


@pytest.mark.parametrize(
    ("ratio", "size"), [(Fraction(4, 3), (48, 85)), (Fraction(1, 2), (96, 64)), (Fraction(1), (48, 64))]
)
def test_pixels_become_square(ratio: Fraction, size: tuple[int, int]) -> None:
    data = encoded(ratio=ratio)
    frames = sample_frames(data, 2)
    assert frames.array.shape[1:3] == size
    raw, _ = full_decode(data)
    expected = PILImage.fromarray(raw[0]).resize(size[::-1], PILImage.Resampling.BICUBIC)
    assert np.array_equal(frames.array[0], expected)


def test_frames_are_scaled_to_a_bound() -> None:
    data = encoded(width=128, height=96, rotation=90)
    assert sample_frames(data, 2, max_side=50).array.shape == (2, 50, 38, 3)
    assert sample_frames(data, 2, max_side=4000).array.shape == (2, 128, 96, 3)
    plan = plan_frames(data, 2, max_side=1)
    assert (plan.height, plan.width) == (1, 1)


def test_sources_of_every_kind(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    data = encoded()
    file = tmp_path / "clip"
    file.write_bytes(data)
    archive = tmp_path / "archive.tar"
    archive.write_bytes(bytes(512) + data + bytes(700))
    table = tmp_path / "table.parquet"
    parquet.write_table(pyarrow.table({"video": [data]}), table)
    url = f"data:video/mp4;base64,{base64.b64encode(data).decode()}"
    expected = sample_frames(data, 3).array
    sources = [file, str(file), file.as_uri(), url, bytearray(data), FileSlice(archive, 512, len(data), "clip.mp4")]
    for source in [*sources, TableCell(table, 0, 0, "video")]:
        assert np.array_equal(sample_frames(source, 3).array, expected), source


# Plans


def test_a_plan_needs_no_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    counted, uncounted = encoded(), encoded(format="matroska")
    decoded = 0

    class Counting(video_containers._Container):
        def _decode(self, *arguments: Any) -> Any:
            nonlocal decoded
            for frame in super()._decode(*arguments):
                decoded += 1
                yield frame

        def scan(self) -> Any:
            scans.append(self.name)
            return super().scan()

    monkeypatch.setattr(video_containers, "_Container", Counting)
    scans: list[str] = []
    plan = plan_frames(counted)
    assert (plan.indices, plan.total, plan.times, scans) == (tuple(np.linspace(0, 49, 8, dtype=int)), 50, None, [])
    plan = plan_frames(uncounted)
    assert plan.indices == tuple(np.linspace(0, 49, 8, dtype=int)) and len(scans) == 1
    assert plan.times == pytest.approx([index / RATE for index in plan.indices])
    assert decoded == 2  # one frame of each file, for its size and rotation
    decoded = 0
    sample_frames(encoded(options={"g": "10", "bf": "0", "x264-params": "scenecut=0"}), times=[0.42, 1.24])
    assert decoded <= 1 + 1 + 2 + 8  # frames 10 and 30 to 31, and what the decoder's threads are ahead


@pytest.mark.parametrize("format", ["mp4", "matroska"])
def test_fps_times_and_key_frames(format: str) -> None:
    data = encoded(format=format, options={"g": "10", "bf": "2", "x264-params": "scenecut=0"})
    assert plan_frames(data, fps=5).indices == tuple(range(0, 50, 5))
    assert plan_frames(data, fps=5, max_frames=4).indices == (0, 16, 32, 49)
    assert plan_frames(data, fps=0.01).indices == (0,)
    assert plan_frames(data, fps=50).indices == tuple(number // 2 for number in range(100))
    assert plan_frames(data, key_frames=True).indices == (0, 10, 20, 30, 40)
    assert plan_frames(data, key_frames=True, max_frames=2).indices == (0, 40)
    assert plan_frames(data, times=[1.99, 0.0, 0.05, 2.0, 0.04]).indices == (49, 0, 1, 49, 1)
    assert plan_frames(data, 3, segment=(0.4, 0.8)).indices == (10, 14, 19)
    assert plan_frames(data, 2, segment=(1.0, None)).indices == (25, 49)
    assert plan_frames(data, fps=5, segment=(0.5, 1.1)).indices == (13, 17, 22)
    assert plan_frames(data, key_frames=True, segment=(0.1, 1.0)).indices == (10, 20)
    assert plan_frames(data, 2, segment=(0.41, 0.42)).indices == (10, 10)  # shown all the while


def test_times_of_a_variable_rate() -> None:
    data = encoded(options=B_FRAMES, times=UNEVEN)
    shown = (np.array(UNEVEN) - UNEVEN[0]) / 1000
    frames = sample_frames(data, times=[float(shown[7]), float(shown[7] + shown[8]) / 2, float(shown[8]) - 0.001])
    assert frames.indices == (7, 7, 7)
    wanted = np.arange(0, shown[-1], 0.25)
    planned = plan_frames(data, fps=4)
    assert planned.indices[: len(wanted)] == tuple(np.searchsorted(shown, wanted + 1e-6) - 1)


def test_a_wrong_count_in_the_file_changes_nothing() -> None:
    data = encoded(format="avi", options={"g": "12", "bf": "0"})
    place = data.index(b"strh") + 8 + 32  # the stream header's count of frames
    wrong = data[:place] + struct.pack("<I", 5000) + data[place + 4 :]
    if probe(wrong, count=False).frames != 5000:
        pytest.skip("this ffmpeg counts by itself")
    plan = plan_frames(wrong, 4)
    assert plan.total == 5000
    for frames in (read_frames(wrong, plan), sample_frames(wrong, 4)):
        assert frames.indices == (0, 16, 32, 49)
        assert np.array_equal(frames.array, full_decode(data)[0][[0, 16, 32, 49]])


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"num_frames": 2, "fps": 1}, "give one of"),
        ({"num_frames": 0}, "0 frames are asked for"),
        ({"num_frames": 9, "max_frames": 8}, "from 1 to 8"),
        ({"times": []}, "0 frames are asked for"),
        ({"times": [1.0, 2.5]}, "2.5 seconds lie outside the video, which lasts 2.000"),
        ({"times": [-0.1]}, "lie outside"),
        ({"times": [float("nan")]}, "lie outside"),
        ({"fps": 0}, "must be a number above 0"),
        ({"fps": float("inf")}, "must be a number above 0"),
        ({"max_side": 0}, "1 or more"),
        ({"segment": (1, 1)}, "start before end"),
        ({"segment": (3, 4)}, "the video lasts 2.000"),
        ({"key_frames": True, "segment": (0.5, 0.6)}, "no key frame"),
    ],
)
def test_what_cannot_be_planned(arguments: dict[str, Any], expected: str, tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    path.write_bytes(encoded(options={"g": "1000", "x264-params": "scenecut=0"}))
    with pytest.raises(ConfigError, match=expected) as error:
        sample_frames(path, **arguments)
    assert str(error.value).startswith(f"{path}: ") and "\n" not in str(error.value)


def test_a_plan_for_another_file_is_refused() -> None:
    plan = plan_frames(encoded(format="matroska"), 4)
    with pytest.raises(MediaError, match="has 1 frames, 50 were planned"):
        read_frames(encoded(frames=1), plan)
    with pytest.raises(ConfigError, match="cannot be, of 50"):
        read_frames(encoded(), FramePlan((50,), 50, 48, 64))


# Bad files


def sound_only() -> bytes:
    out = io.BytesIO()
    with av.open(out, "w", format="mp4") as container:
        stream = container.add_stream("aac", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return out.getvalue()


def no_frames() -> bytes:
    """A movie with a video track that holds no sample."""
    data = encoded(muxer={"movflags": "frag_keyframe+empty_moov"})
    return data[: data.index(b"moof") - 4]


def still(format: str) -> bytes:
    out = io.BytesIO()
    PILImage.fromarray(pattern(0)).save(out, format)
    return out.getvalue()


BAD: dict[str, tuple[Callable[[], bytes], str]] = {
    "empty": (lambda: b"", "empty"),
    "text": (lambda: b"hello, world\n" * 50, "is not a video that can be read"),
    "zeros": (lambda: bytes(5000), "is not a video"),
    "noise": (lambda: np.random.default_rng(5).bytes(5000), "is not a video|damaged"),
    "png": (lambda: still("PNG"), "is a PNG image, not a video"),
    "jpeg": (lambda: still("JPEG"), "is a JPEG image, not a video"),
    "bmp": (lambda: still("BMP"), "is a BMP image, not a video"),
    "webp": (lambda: still("WEBP"), "is a WEBP image, not a video"),
    "pdf": (lambda: b"%PDF-1.7\n" + bytes(600), "is a PDF document"),
    "lfs": (lambda: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n", "Git LFS pointer"),
    "wav": (lambda: b"RIFF\x24\x08\x00\x00WAVEfmt " + bytes(2000), "sound but no video"),
    "sound": (sound_only, "sound but no video"),
    "no-frames": (no_frames, "no frame"),
    "header-only": (lambda: cut(encoded(), 0.02), "damaged or cut off"),
    "no-index": (lambda: encoded()[: encoded().index(b"moov") - 4], "damaged or cut off"),
    "hls": (
        lambda: b"#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:2,\n/etc/passwd\n#EXT-X-ENDLIST\n",
        "names other files",
    ),
    "concat": (lambda: b"ffconcat version 1.0\nfile /etc/passwd\n", "names other files"),
    "dash": (lambda: b'<?xml version="1.0"?>\n<MPD xmlns="urn:mpeg:dash:schema:mpd:2011"></MPD>', "names other files"),
    "sdp": (lambda: b"v=0\r\no=- 0 0 IN IP4 127.0.0.1\r\nm=video 1 RTP/AVP 96\r\n", "names other files"),
}


@pytest.mark.parametrize("kind", BAD)
@pytest.mark.parametrize("as_path", [True, False])
def test_bad_files_give_one_line(kind: str, as_path: bool, tmp_path: Path) -> None:
    make, expected = BAD[kind]
    data = make()
    file = tmp_path / "film.mp4"
    file.write_bytes(data)
    for act in (probe, sample_frames, plan_frames):
        with pytest.raises(MediaError, match=expected) as error:
            act(file if as_path else data)
            sample_frames(file if as_path else data)  # a plan alone may not see that nothing can be decoded
        assert str(file if as_path else f"video of {len(data)} bytes") in str(error.value) or not data
        assert "\n" not in str(error.value) and len(str(error.value)) < 400


def test_bad_places(tmp_path: Path) -> None:
    for source, expected in [
        (tmp_path / "none.mp4", "no such file"),
        (tmp_path, "is a directory"),
        (Path("/dev/zero"), "not a regular file"),
        ("https://example.org/film.mp4", "remote fetch is off"),
        ("rtsp://example.org/film", "cannot be read"),
        ("concat:a.mp4|b.mp4", "no such file"),
        (FileSlice(Path(__file__), 10, 10**9), "ends before it"),
        (PILImage.new("RGB", (4, 4)), "is an image, not a video"),
    ]:
        with pytest.raises(MediaError, match=expected):
            sample_frames(source)


@pytest.mark.parametrize("kind", ["hls", "concat"])
def test_nothing_but_the_file_itself_is_opened(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    secret = tmp_path / "secret.ts"
    secret.write_bytes(encoded(format="mpegts"))
    playlist = tmp_path / ("list.m3u8" if kind == "hls" else "list.ffconcat")
    playlist.write_text(
        f"#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:2,\n{secret}\n#EXT-X-ENDLIST\n"
        if kind == "hls"
        else f"ffconcat version 1.0\nfile {secret.name}\n",
        encoding="utf-8",
    )
    with av.open(str(playlist)) as container:  # what would happen without the guards
        assert sum(1 for _ in container.decode(video=0)) == 50
    with pytest.raises(MediaError, match="names other files"):
        sample_frames(playlist)
    monkeypatch.setattr(video_containers, "not_a_video", lambda head: None)  # one guard less
    with pytest.raises(MediaError, match="not a video that can be read"):
        sample_frames(playlist)
    monkeypatch.setattr(video_containers, "CONTAINERS", f"{video_containers.CONTAINERS},hls,concat")  # and another
    with pytest.raises(MediaError):
        sample_frames(playlist)


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        (VideoLimits(seconds=1.5), "lasts 2 seconds, at most 2 are allowed|lasts 2 seconds"),
        (VideoLimits(pixels=3000), r"64x48 pixels .*at most 3,000 are allowed"),
        (VideoLimits(bytes=1000), "at most 1,000 are allowed"),
        (VideoLimits(decoded=2**20 * 20), "have to be decoded"),
        (VideoLimits(packets=40), "more than 40 packets"),
        (VideoLimits(output=20_000), "8 frames of 64x48 take 73,728 bytes"),
    ],
)
@pytest.mark.parametrize("format", ["mp4", "matroska", "mpegts", "h264"])
def test_limits(limits: VideoLimits, expected: str, format: str, tmp_path: Path) -> None:
    file = tmp_path / "film"
    file.write_bytes(encoded(format=format, options={"g": "1000", "x264-params": "scenecut=0"}))
    with pytest.raises(MediaError, match=expected):
        sample_frames(file, limits=limits)


def test_bytes_in_memory_have_a_limit_too() -> None:
    with pytest.raises(MediaError, match="at most 1,000 are allowed"):
        sample_frames(encoded(), limits=VideoLimits(bytes=1000))


def test_limits_of_animations() -> None:
    for format in ("GIF", "WEBP"):
        data = animation(format)
        for limits in (VideoLimits(pixels=3000), VideoLimits(seconds=0.5), VideoLimits(decoded=2**21)):
            with pytest.raises(MediaError):
                sample_frames(data, limits=limits)


def test_ten_hours_are_refused_unless_allowed() -> None:
    data = encoded(frames=3, times=(0, 18_000_000, 35_999_960))
    with pytest.raises(MediaError, match=r"lasts 36,000 seconds, at most 21,600 are allowed"):
        sample_frames(data)
    assert sample_frames(data, limits=VideoLimits(seconds=40_000)).indices == (0, 0, 0, 0, 1, 1, 1, 2)


# Not with intra refresh: its key frames are not whole, which shows only in decoding.
@pytest.mark.parametrize(
    "kind", [kind for kind in KINDS if kind.startswith("mp4") and not re.search("frag|refr", kind)]
)
def test_the_index_of_an_mp4_is_enough(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data = KINDS[kind]()
    opened: list[int] = []
    plain = video_containers._Container._open
    monkeypatch.setattr(
        video_containers._Container, "_open", lambda self, *head: (opened.append(1), plain(self, *head))[1]
    )
    monkeypatch.setattr(video_containers._Container, "scan", None)
    total = plan_frames(data).total
    for number in range(total):
        assert read_frames(data, FramePlan((number,), total, 48, 64)).indices == (number,)
    assert len(opened) == total + 1


def test_fragments_are_seen() -> None:
    for kind in ("mp4", "mp4-fragments", "mp4-fragments-after-index", "ts"):
        data = KINDS[kind]()
        window = video_containers.Window(io.BytesIO(data), 0, len(data), "film")
        claimed, fragments = video_containers.read_boxes(window)
        assert fragments == ("fragments" in kind) and claimed == (0 if kind == "ts" else 50)


@pytest.mark.parametrize("fragments", [False, True])
def test_a_small_file_that_claims_two_billion_frames(fragments: bool) -> None:
    # ffmpeg makes room for all of them as soon as it opens such a file.
    muxer = {"movflags": "frag_keyframe+empty_moov"} if fragments else {}
    data = bytearray(encoded("mpeg4", muxer=muxer))
    claims = {"trun": (8,)} if fragments else {"stsz": (12,), "stsc": (16,), "stts": (12,)}
    for box, places in claims.items():
        for place in places:
            start = data.index(box.encode()) + place
            data[start : start + 4] = (2**31).to_bytes(4)
    with pytest.raises(MediaError, match="more than 4,000,000 packets"):
        sample_frames(bytes(data))


def test_the_users_pixel_limit_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(PIXELS_SETTING, "3000")
    with pytest.raises(MediaError, match="--max-pixels 3072"):
        sample_frames(encoded())


def test_size_is_checked_before_decoding() -> None:
    # Frames that claim 60,000 x 60,000 pixels in a file that claims 48 x 64: 10 GB each.
    data = bytearray(encoded("mjpeg", "avi", pix_fmt="yuvj420p"))
    for place in range(len(data) - 9):
        if data[place : place + 4] == b"\xff\xc0\x00\x11":
            data[place + 5 : place + 9] = struct.pack(">HH", 60000, 60000)
    start = time.monotonic()
    with pytest.raises(MediaError, match=r"of the frames|no frame of"):
        sample_frames(bytes(data), 2)
    assert time.monotonic() - start < 5
    data = bytearray(encoded("rawvideo", "avi", pix_fmt="yuv420p"))
    place = data.index(b"strf") + 12
    data[place : place + 8] = struct.pack("<ii", 60000, 60000)
    with pytest.raises(MediaError, match="no frame of at most 33,554,432 pixels"):
        sample_frames(bytes(data), 2)


@pytest.mark.parametrize("format", ["avi", "mov"])
def test_damage_in_the_middle_costs_no_more_than_its_frames(format: str) -> None:
    data = encoded("mjpeg", format, pix_fmt="yuvj420p")
    expected, _ = full_decode(data)
    starts = [place for place in range(len(data)) if data[place : place + 3] == b"\xff\xd8\xff"]
    broken = bytearray(data)
    broken[starts[20] : starts[21] - 10] = bytes(starts[21] - 10 - starts[20])
    with pytest.warns(UserWarning, match="1 of 50 frames are damaged"):
        frames = sample_frames(bytes(broken), 50)
    same = [number for number in range(50) if np.array_equal(frames.array[number], expected[number])]
    assert same == [number for number in range(50) if number != 20]
    assert frames.indices[20] in (19, 21)
    assert np.array_equal(frames.array[20], expected[frames.indices[20]])


@pytest.mark.parametrize("format", ["mp4", "matroska", "mpegts", "gif"])
def test_of_a_file_that_is_cut_off_the_frames_that_are_there_are_used(format: str) -> None:
    muxer = {"movflags": "faststart"} if format == "mp4" else {}
    if format == "gif":
        data = encoded("gif", "gif", pix_fmt="rgb8")
    else:
        data = encoded(format=format, options=B_FRAMES, muxer=muxer)
    expected, _ = full_decode(data)
    broken = cut(data, 0.6)
    there = probe(broken).frames
    assert there is not None and 20 < there < 45
    plan = plan_frames(broken, 6)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the very last may be in parts
        for frames in (sample_frames(broken, 6), read_frames(broken, plan)):
            assert len(frames) == 6 and there - 6 < frames.indices[-1] < there
            assert np.array_equal(frames.array[:5], expected[list(frames.indices[:5])])


def test_reading_has_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(video_containers.Window, "__post_init__", lambda self: setattr(self, "left", 20_000))
    for format in ("mp4", "matroska", "mpegts"):
        with pytest.raises(MediaError, match="over and over"):
            sample_frames(encoded(format=format, width=320, height=240, options={"b": "4M"}))


def test_of_an_mp4_only_what_lies_around_the_frames_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encoded("mpeg4", frames=400, width=320, height=240, options={"g": "10", "b": "20M"})
    amount = 0
    plain = video_containers.Window.read

    def counting(window: Any, count: int) -> bytes:
        nonlocal amount
        found = plain(window, count)
        amount += len(found)
        return found

    monkeypatch.setattr(video_containers.Window, "read", counting)
    frames = sample_frames(data, 3)
    assert amount < len(data) / 2
    assert np.array_equal(frames.array, full_decode(data)[0][[0, 199, 399]])
    assert np.allclose(frames.times, [0, 199 / RATE, 399 / RATE])


def test_memory_does_not_grow_with_the_video(tmp_path: Path) -> None:
    # 3 frames of 40 and of 400, in a fresh process each: the peak may differ by a few frames, never by the file.
    script = (
        "import resource, sys\nfrom polymodal.media.video import sample_frames\n"
        "sample_frames(sys.argv[1], 3)\nprint(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    )
    peaks = []
    for frames in (40, 400):
        file = tmp_path / f"{frames}.mkv"
        file.write_bytes(encoded("mpeg4", "matroska", frames, 640, 480, {"g": "400"}))
        done = subprocess.run([sys.executable, "-c", script, str(file)], capture_output=True, text=True, check=True)
        peaks.append(int(done.stdout))
    assert peaks[1] - peaks[0] < 30 * 1024  # kilobytes; 360 frames of RGB would be 330 MB


def test_nothing_is_printed(capfd: pytest.CaptureFixture[str]) -> None:
    for data in (
        cut(encoded(format="mpegts"), 0.5),
        cut(encoded(format="matroska"), 0.5),
        np.random.default_rng(1).bytes(900),
    ):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with contextlib.suppress(MediaError):
                sample_frames(data)
    assert capfd.readouterr() == ("", "")


# Fuzz; the long one is `python -m benchmarks.media_fuzz`.

FUZZED = (
    "mp4-b-frames",
    "mp4-fragments",
    "mkv-no-count",
    "ts",
    "avi-mpeg4",
    "webm-vp9",
    "gif",
    "apng",
    "h264-no-times",
)


@pytest.mark.parametrize("kind", [*FUZZED, "webp"])
def test_damaged_files_give_frames_or_one_line(kind: str) -> None:
    data = animation("WEBP") if kind == "webp" else KINDS[kind]()
    rng = random.Random(kind)
    outcomes = set()
    start = time.monotonic()
    for _ in range(25):
        damaged = bytearray(data[: rng.randrange(len(data)) if rng.random() < 0.3 else len(data)])
        for _ in range(rng.choice([0, 1, 3, 10, 50])):
            if damaged:
                place = rng.randrange(min(len(damaged), rng.choice([64, 1000, 10**9])))
                damaged[place] ^= 1 << rng.randrange(8)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                frames = sample_frames(bytes(damaged), 4, max_side=64)
            assert len(frames) == 4 and np.isfinite(frames.times).all()
            outcomes.add("frames")
        except PolymodalError as error:
            assert "\n" not in str(error) and len(str(error)) < 400
            outcomes.add("line")
    assert outcomes == {"frames", "line"}
    assert time.monotonic() - start < 30
