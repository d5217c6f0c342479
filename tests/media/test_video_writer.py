"""Videos with sound, written and read back."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from polymodal.errors import ConfigError, MediaError, PolymodalError
from polymodal.media.audio import open_audio
from polymodal.media.video import probe, sample_frames
from polymodal.media.video_writer import write_video

RATE = 16_000


def film(count: int = 12, height: int = 48, width: int = 64) -> np.ndarray:
    """Slow ramps of colour whose brightness rises frame by frame."""
    rows, columns = np.mgrid[:height, :width]
    frames = [np.stack([columns * 2 + 8 * n, rows * 3, np.full_like(rows, 15 * n)], axis=-1) for n in range(count)]
    return np.stack(frames).clip(0, 255).astype(np.uint8)


def tune(seconds: float, rate: int = RATE) -> np.ndarray:
    """A rising tone that swells, so that it fits itself at one place alone."""
    at = np.arange(round(seconds * rate)) / rate
    return (0.5 * np.sin(2 * np.pi * (200 + 150 * at) * at) * (0.5 + 0.5 * np.sin(8 * at))).astype(np.float32)


@pytest.mark.parametrize("ending", [".mp4", ".webm"])
@pytest.mark.parametrize("rate", [16_000, 22_050, 48_000, 44_100, 12_345])
def test_frames_and_sound_come_back(ending: str, rate: int, tmp_path: Path) -> None:
    frames, sound, file = film(), tune(1.2, rate), tmp_path / f"film{ending}"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert write_video(file, frames, 10, sound, rate) == pytest.approx(1.2)
    info = probe(file)
    assert (info.height, info.width, info.frames, info.audio) == (48, 64, 12, True)
    assert info.rate == pytest.approx(10) and info.duration == pytest.approx(1.2, abs=0.01)
    read = sample_frames(file, num_frames=12)
    assert np.allclose(read.times, np.arange(12) / 10, atol=0.002)
    error = np.abs(read.array.astype(int) - frames).mean(axis=(1, 2, 3))
    assert error.max() < 4  # two frames that follow each other differ by 7
    heard = open_audio(file, sample_rate=rate, video=True).samples
    assert abs(len(heard) / rate - 1.2) < 0.1
    length = min(len(heard), len(sound))
    assert np.corrcoef(heard[:length], sound[:length])[0, 1] > 0.99


def test_what_is_inside(tmp_path: Path) -> None:
    import av

    for ending, names in ((".mp4", ("h264", "aac")), (".webm", ("vp9", "opus"))):
        write_video(tmp_path / f"a{ending}", film(3), 25, tune(0.12))
        with av.open(str(tmp_path / f"a{ending}")) as container:
            video, audio = container.streams.video[0], container.streams.audio[0]
            assert video.codec_context.name in (names[0], f"lib{names[0]}") and video.pix_fmt == "yuv420p"
            assert names[1] in audio.codec_context.name


def test_silent_videos_and_frames_one_by_one(tmp_path: Path) -> None:
    file = tmp_path / "silent.MP4"
    assert write_video(str(file), iter(film(5)), 29.97) == pytest.approx(5 / 29.97)
    info = probe(file)
    assert info.frames == 5 and not info.audio and info.rate == pytest.approx(29.97, abs=0.01)
    assert write_video(tmp_path / "one.webm", film(1), 0.5) == 2.0


@pytest.mark.parametrize(("height", "width"), [(47, 63), (1, 1), (33, 64), (2, 3)])
def test_odd_sides_get_an_edge(height: int, width: int, tmp_path: Path) -> None:
    for ending in (".mp4", ".webm"):
        with pytest.warns(UserWarning, match=f"{width} × {height} pixels.*even sides"):
            write_video(tmp_path / f"odd{ending}", film(2, height, width), 10)
        info = probe(tmp_path / f"odd{ending}")
        assert (info.height, info.width) == (height + height % 2, width + width % 2)
        read = sample_frames(tmp_path / f"odd{ending}", num_frames=2).array
        assert np.abs(read[:, :height, :width].astype(int) - film(2, height, width)).mean() < 8
        assert np.abs(read[:, height - 1].astype(int) - read[:, -1]).mean() < 8  # repeated, not black


def test_a_sound_that_is_longer_holds_the_last_frame(tmp_path: Path) -> None:
    for ending in (".mp4", ".webm"):
        file = tmp_path / f"long{ending}"
        with pytest.warns(UserWarning, match=r"frames take 0\.40 s and the sound 1\.25 s; the last frame stays"):
            assert write_video(file, film(4), 10, tune(1.25)) == pytest.approx(1.3)
        read = sample_frames(file, num_frames=13).array
        assert np.abs(read[3:].astype(int) - film(4)[3]).mean() < 4
        assert open_audio(file, video=True).seconds == pytest.approx(1.3, abs=0.07)


def test_a_sound_that_is_shorter_is_followed_by_silence(tmp_path: Path) -> None:
    for ending in (".mp4", ".webm"):
        file = tmp_path / f"short{ending}"
        with pytest.warns(UserWarning, match=r"frames take 1\.20 s and the sound 0\.50 s; silence follows"):
            assert write_video(file, film(), 10, tune(0.5)) == pytest.approx(1.2)
        heard = open_audio(file, video=True)
        assert heard.seconds == pytest.approx(1.2, abs=0.07)
        assert np.abs(heard.samples[round(0.6 * RATE) :]).max() < 0.01 < np.abs(heard.samples[: RATE // 4]).max()


def test_a_gif(tmp_path: Path) -> None:
    from PIL import Image

    file = tmp_path / "a.gif"
    assert write_video(file, film(4), 8) == 0.5
    with Image.open(file) as image:
        assert image.n_frames == 4
        times = []
        for number in range(4):
            image.seek(number)
            times.append(image.info["duration"])
            assert np.abs(np.asarray(image.convert("RGB")).astype(int) - film(4)[number]).mean() < 8
    assert sum(times) == 500
    with pytest.warns(UserWarning, match="no sound"):
        write_video(file, film(2), 8, tune(0.25))
    with pytest.raises(ConfigError, match="at most 50"):
        write_video(file, film(2), 60)


BAD: dict[str, tuple[dict[str, Any], type[PolymodalError], str]] = {
    "ending": ({"path": "a.avi"}, ConfigError, "mp4"),
    "no ending": ({"path": "a"}, ConfigError, "mp4"),
    "no frames": ({"frames": np.zeros((0, 8, 8, 3), np.uint8)}, MediaError, "no frame"),
    "floats": ({"frames": np.zeros((2, 8, 8, 3))}, ConfigError, "frame 1 is float64"),
    "grey": ({"frames": np.zeros((2, 8, 8), np.uint8)}, ConfigError, "H, W, 3"),
    "empty": ({"frames": np.zeros((2, 0, 8, 3), np.uint8)}, ConfigError, "frame 1"),
    "sizes": ({"frames": [*film(1, 8, 8), *film(1, 8, 16)]}, ConfigError, "frame 2"),
    "large": ({"frames": np.zeros((1, 2, 9000, 3), np.uint8)}, ConfigError, "9000 × 2"),
    "fps 0": ({"fps": 0}, ConfigError, "0 frames a second"),
    "fps nan": ({"fps": float("nan")}, ConfigError, "nan frames a second"),
    "fps": ({"fps": 10_000}, ConfigError, "10000 frames"),
    "stereo": ({"sound": np.zeros((2, 100), np.float32)}, ConfigError, r"float32 \[S\]"),
    "integers": ({"sound": np.zeros(100, np.int16)}, ConfigError, "int16"),
    "no numbers": ({"sound": np.full(100, np.nan, np.float32)}, MediaError, "no numbers"),
    "rate": ({"sound": np.zeros(100, np.float32), "sample_rate": 0}, ConfigError, "0 samples a second"),
}


@pytest.mark.parametrize(("values", "error", "words"), BAD.values(), ids=BAD.keys())
def test_what_is_no_video(values: dict[str, Any], error: type[PolymodalError], words: str, tmp_path: Path) -> None:
    given: dict[str, Any] = {"path": "a.mp4", "frames": film(2, 8, 8), "fps": 10} | values
    with pytest.raises(error, match=words):
        write_video(**given | {"path": tmp_path / given["path"]})
    assert not list(tmp_path.iterdir())


def test_nothing_half_written(tmp_path: Path) -> None:
    file = tmp_path / "film.mp4"
    file.write_bytes(b"the old one")

    def breaks() -> Any:
        yield from film(3)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_video(file, breaks(), 10)
    assert file.read_bytes() == b"the old one" and list(tmp_path.iterdir()) == [file]
    with pytest.raises(PolymodalError, match="cannot be written"):
        write_video(tmp_path / "absent" / "film.mp4", film(2), 10)
