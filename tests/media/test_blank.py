"""Grey videos and silence: as their originals in everything but what is seen and heard."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image as PILImage

from polymodal.errors import MediaError
from polymodal.media.audio import open_audio
from polymodal.media.blank import grey_video, silence
from polymodal.media.video import probe, sample_frames

av = pytest.importorskip("av")


def clip(path: Path, codec: str, times: list[int], **options: str) -> Path:
    """Frames of noise at hundredths of a second, with a tone."""
    rng = np.random.default_rng(0)
    with av.open(str(path), "w") as file:
        video = file.add_stream(codec, rate=100, options=options)
        audio = file.add_stream("pcm_s16le", rate=8000, layout="mono")
        video.height, video.width, video.time_base = 48, 64, Fraction(1, 100)
        video.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        for time in times:
            frame = av.VideoFrame.from_ndarray(rng.integers(0, 256, (48, 64, 3), dtype=np.uint8), format="rgb24")
            frame.pts = time
            file.mux(video.encode(frame))
        tone = np.full((1, 80 * (times[-1] + 1)), 9000, np.int16)
        sound = av.AudioFrame.from_ndarray(tone, format="s16", layout="mono")
        sound.sample_rate = 8000
        for packets in (video.encode(), audio.encode(sound), audio.encode()):
            file.mux(packets)
    return path


@pytest.mark.parametrize(
    ("name", "codec", "times", "options"),
    [
        ("even.mkv", "mpeg4", list(range(0, 250, 10)), {"g": "5"}),
        ("uneven.mkv", "mpeg4", [0, 3, 4, 60, 61, 150, 151, 199], {"g": "3"}),
        ("one.mkv", "mpeg4", [0], {}),
        ("whole.mkv", "mjpeg", list(range(0, 90, 30)), {}),
        ("odd.mkv", "mpeg4", list(range(0, 100, 4)), {"bf": "2"}),
    ],
)
def test_a_grey_video_gives_as_many_frames_at_the_same_times(
    name: str, codec: str, times: list[int], options: dict[str, str], tmp_path: Path
) -> None:
    source = clip(tmp_path / name, codec, times, **options)
    grey = grey_video(source)
    seen, hidden = probe(source), probe(grey)
    assert (hidden.height, hidden.width, hidden.frames) == (seen.height, seen.width, seen.frames)
    assert hidden.duration == pytest.approx(seen.duration, abs=1e-3) and not hidden.audio
    asked: list[dict[str, Any]] = [{}, {"num_frames": 5}, {"fps": 7.0}, {"key_frames": True}, {"times": (0.0,)}]
    asked += [{"segment": (0.0, 0.5), "num_frames": 3}]
    for how in asked:
        expected, found = sample_frames(source, **how), sample_frames(grey, **how)
        assert found.indices == expected.indices and found.array.shape == expected.array.shape
        np.testing.assert_allclose(found.times, expected.times, atol=1e-6)
        assert (found.array == 128).all()


def test_animations(tmp_path: Path) -> None:
    frames = [PILImage.new("RGB", (33, 17), colour) for colour in ("red", "blue", "lime")]
    for form in ("gif", "webp"):
        frames[0].save(tmp_path / f"a.{form}", save_all=True, append_images=frames[1:], duration=[100, 300, 50])
        found = sample_frames(grey_video(tmp_path / f"a.{form}"), 3)
        assert found.array.shape == (3, 17, 33, 3) and (found.array == 128).all()
        assert found.times.tolist() == pytest.approx([0.0, 0.1, 0.4])


def test_its_sound_is_silence_of_the_same_length(tmp_path: Path) -> None:
    source = clip(tmp_path / "a.mkv", "mpeg4", list(range(0, 250, 10)))
    heard = open_audio(source, video=True)
    for hidden in (open_audio(grey_video(source, sound=True), video=True), open_audio(silence(source))):
        assert len(hidden.samples) == len(heard.samples) > 30_000
        assert heard.samples.max() > 0.2 and not hidden.samples.any()


def test_a_long_video_stays_small(tmp_path: Path) -> None:
    source = clip(tmp_path / "a.mkv", "mjpeg", list(range(400)))
    assert len(grey_video(source)) < 2**20


def test_what_cannot_be_read_fails_as_the_original_does(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_bytes(b"nothing")
    for hide in (grey_video, silence):
        with pytest.raises(MediaError, match=r"a\.mp4"):
            hide(tmp_path / "a.mp4")
