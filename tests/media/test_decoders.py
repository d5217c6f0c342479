"""Media of strangers are decoded in another process: what comes back is the same, and it ends at its limits."""

from __future__ import annotations

import contextlib
import os
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image as PILImage

from polymodal.errors import ConfigError, MediaError
from polymodal.media.audio import open_audio
from polymodal.media.decoders import Decoders
from polymodal.media.image import open_image
from polymodal.media.source import NamedBytes
from polymodal.media.video import plan_frames, probe, read_frames, sample_frames
from tests.media.makers import clip, wav


@pytest.fixture(scope="module")
def decoders() -> Iterator[Decoders]:
    found = Decoders(1, seconds=20)
    yield found
    found.close()


def untrusted(data: bytes, decoders: Decoders) -> NamedBytes:
    found = NamedBytes(data)
    found.name, found.decoders = "place", decoders
    return found


def process(decoders: Decoders) -> Any:
    """The process that is kept ready."""
    return decoders._idle.queue[-1]._child


def image(folder: Path, mode: str = "RGB") -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (30, 40, 3), np.uint8)
    PILImage.fromarray(pixels).convert(mode).save(folder / "a.png")
    return (folder / "a.png").read_bytes()


def test_what_comes_back_is_what_this_process_would_have_made(decoders: Decoders, tmp_path: Path) -> None:
    one, before = decoders, os.getpid()
    for mode in ("RGB", "L", "P", "RGBA"):
        data = image(tmp_path, mode)
        here, there = open_image(data), open_image(untrusted(data, one))
        assert (here.mode, here.size, here.tobytes()) == (there.mode, there.size, there.tobytes())
    sound = wav(np.arange(-800, 800, dtype=np.int16), rate=8000)
    ours, theirs = open_audio(sound), open_audio(untrusted(sound, one), sample_rate=16_000)
    assert np.array_equal(ours.samples, theirs.samples) and theirs.samples.flags.writeable
    assert (ours.sample_rate, ours.source_rate, ours.source_channels) == (16_000, 8000, 1)
    data = clip(tmp_path / "a.mp4").read_bytes()
    video = untrusted(data, one)
    assert probe(video) == probe(data) and plan_frames(video, 4) == plan_frames(data, 4)
    for made, other in (
        (read_frames(video, plan_frames(video, 4)), read_frames(data, plan_frames(data, 4))),
        (sample_frames(video, fps=2.0, max_side=20), sample_frames(data, fps=2.0, max_side=20)),
    ):
        assert np.array_equal(made.array, other.array) and np.array_equal(made.times, other.times)
        assert made.indices == other.indices
    assert process(one).pid != before and process(one).poll() is None


def test_errors_and_warnings_come_back_as_they_are(decoders: Decoders, tmp_path: Path) -> None:
    pid = process(decoders).pid
    with pytest.raises(MediaError, match="place: is not an image") as caught:
        open_image(untrusted(b"banana", decoders))
    assert caught.value.code == "not-an-image"
    with pytest.raises(ConfigError, match="sample_rate"):
        open_audio(untrusted(b"banana", decoders), sample_rate=1)
    PILImage.new("I;16", (4, 4), 90).save(tmp_path / "dark.png")
    with pytest.warns(UserWarning, match="place: its values end at 90"):
        open_image(untrusted((tmp_path / "dark.png").read_bytes(), decoders))
    assert process(decoders).pid == pid  # a file that is refused is no reason for another


def test_a_process_that_dies_or_hangs_fails_one_file_alone(decoders: Decoders, tmp_path: Path) -> None:
    data = image(tmp_path)
    process(decoders).kill()
    with pytest.raises(MediaError, match="place: decoding it crashed"):
        open_image(untrusted(data, decoders))
    assert open_image(untrusted(data, decoders)).size == (40, 30)
    slow = Decoders(1, seconds=0.3)
    with contextlib.closing(slow):
        stopped = process(slow)
        os.kill(stopped.pid, 19)  # as a decoder that never comes back
        begin = time.monotonic()
        with pytest.raises(MediaError, match=r"longer than 0\.3 seconds"):
            open_image(untrusted(data, slow))
        assert time.monotonic() - begin < 5 and stopped.poll() is not None and process(slow) is not stopped


def test_memory_has_an_end(tmp_path: Path) -> None:
    PILImage.new("RGB", (8000, 8000)).save(tmp_path / "large.png")  # 192 MB of pixels, just below the cap of pixels
    data = (tmp_path / "large.png").read_bytes()
    small = Decoders(1, memory=600 * 2**20)
    with contextlib.closing(small):
        before = process(small)
        with pytest.raises(MediaError, match=r"place: .*(memory|damaged)"):
            open_image(untrusted(data, small))
        assert open_image(untrusted(image(tmp_path), small)).size == (40, 30)
        assert process(small) is not before or before.poll() is None


def test_a_process_knows_no_secret_and_can_write_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_KEY", "hunter2" * 4)
    one = Decoders(1)
    with contextlib.closing(one):
        open_image(untrusted(image(tmp_path), one))
        known = Path(f"/proc/{process(one).pid}/environ")
        limits = Path(f"/proc/{process(one).pid}/limits")
        if known.exists():
            assert b"hunter2" not in known.read_bytes() and b"POLYMODAL" in known.read_bytes() + b"POLYMODAL"
            found = {line[:26].strip(): line[26:].split()[0] for line in limits.read_text().splitlines()}
            assert found["Max file size"] == found["Max core file size"] == "0"
            assert int(found["Max address space"]) == 3 * 2**30


@pytest.mark.parametrize(
    "said",
    [b"banana\n", b"{}\n", b'{"type": "Sound", "fields": {}, "arrays": [], "warnings": []}\n',
     b'{"type": "Image", "fields": {"array": ["object", [1]]}, "arrays": ["array"], "warnings": []}\n',
     b'{"type": "Image", "fields": {"array": ["uint8", [9, 9, 3]]}, "arrays": ["array"], "warnings": []}\nshort',
     b'{"type": "Image", "fields": {"array": ["uint8", [99999999, 99999, 3]]}, "arrays": ["array"], "warnings": []}\n',
     b'{"type": "Image", "fields": {"array": ["uint8", [-1, -1]]}, "arrays": ["array"], "warnings": []}\n'],
)  # fmt: skip
def test_nothing_that_a_process_says_is_believed(
    said: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """As if a file had taken a decoder over."""
    answer = tmp_path / "said"
    answer.write_bytes(said)
    child = f"import sys; sys.stdout.buffer.write(open({str(answer)!r}, 'rb').read())"
    monkeypatch.setattr("polymodal.media.decoders._CHILD", child)
    one = Decoders(1, seconds=10)
    with contextlib.closing(one), pytest.raises(MediaError, match="place: decoding it crashed"):
        open_image(untrusted(b"x", one))


def test_a_process_is_replaced_after_its_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recwarn: Callable[..., Any]
) -> None:
    monkeypatch.setattr("polymodal.media.decoders.MOST_JOBS", 2)
    one, data = Decoders(1), image(tmp_path)
    with contextlib.closing(one), warnings.catch_warnings():
        pids = []
        for _ in range(3):
            pids.append(process(one).pid)
            open_image(untrusted(data, one))
        assert pids[0] == pids[1] != pids[2]
