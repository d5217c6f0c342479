"""What all engines share: spans of speech from frames, WAV files, packages found without running them."""

from __future__ import annotations

import io
import sys
import wave
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from polymodal.errors import CheckpointError, ConfigError, MediaError
from polymodal.media.audio import open_audio
from polymodal.speech import AudioChunk, Segment, Transcript, load_vad, wav_bytes
from polymodal.speech.base import FRAME, SAMPLE_RATE, closed, open_onnx, package_folder
from polymodal.speech.vad import VADS, EnergyVAD
from tests.speech.engines import LevelVAD, sound


def test_spans_lie_around_the_speech_with_their_margin() -> None:
    (start, end), (again, last) = LevelVAD().spans(sound((1, 0), (1, 0.2), (2, 0), (0.5, 0.2), (1, 0)))
    assert abs(start / SAMPLE_RATE - 0.8) < 0.05 and abs(end / SAMPLE_RATE - 2.2) < 0.05
    assert abs(again / SAMPLE_RATE - 3.8) < 0.05 and abs(last / SAMPLE_RATE - 4.7) < 0.05


def test_short_pauses_stay_inside_and_short_bursts_are_none() -> None:
    assert len(LevelVAD().spans(sound((1, 0.2), (0.4, 0), (1, 0.2)))) == 1
    assert len(LevelVAD().spans(sound((1, 0.2), (0.7, 0), (1, 0.2)))) == 2
    assert LevelVAD().spans(sound((1, 0), (0.05, 0.2), (1, 0))) == []
    assert LevelVAD().spans(sound((3, 0))) == LevelVAD().spans(np.zeros(0, np.float32)) == []


def test_speech_to_the_end_ends_with_the_sound() -> None:
    samples = sound((1, 0.2))
    assert LevelVAD().spans(samples) == [(0, len(samples))]


def test_endless_speech_is_cut_and_nothing_is_lost_or_heard_twice() -> None:
    samples = sound((100, 0.2))
    spans = LevelVAD().spans(samples, longest=10)
    assert spans[0][0] == 0 and spans[-1][1] == len(samples)
    assert all(before[1] == after[0] for before, after in pairwise(spans))
    assert max(end - start for start, end in spans) <= 10 * SAMPLE_RATE
    assert min(end - start for start, end in spans[:-1]) >= 4 * SAMPLE_RATE  # not into crumbs


def test_endless_speech_is_cut_where_it_is_least_likely_speech() -> None:
    class Dip(LevelVAD):
        def probabilities(self, samples: np.ndarray) -> np.ndarray:
            chances = super().probabilities(samples)
            chances[8 * SAMPLE_RATE // FRAME] = 0.6
            return chances

    (_, cut), *_ = Dip().spans(sound((20, 0.2)), longest=10)
    assert abs(cut - 8 * SAMPLE_RATE) <= 2 * FRAME


def test_energy_finds_speech_in_noise() -> None:
    for noise in (0.0, 0.01):
        ((start, end),) = EnergyVAD().spans(sound((2, noise), (1, 0.3), (2, noise)))
        assert abs(start / SAMPLE_RATE - 1.8) < 0.1 and abs(end / SAMPLE_RATE - 3.2) < 0.1
    assert EnergyVAD().spans(sound((2, 0))) == EnergyVAD().spans(sound((2, 0.001))) == []


def test_a_wav_file_holds_what_was_spoken() -> None:
    tone = np.sin(np.arange(8000) / 8000 * 2 * np.pi * 440).astype(np.float32)
    data = wav_bytes([AudioChunk(tone * 0.5, 8000, "a"), AudioChunk(tone * 2, 8000, "b")])
    with wave.open(io.BytesIO(data)) as file:
        assert (file.getframerate(), file.getnchannels(), file.getsampwidth(), file.getnframes()) == (8000, 1, 2, 16000)
    back = open_audio(data, sample_rate=8000).samples
    assert np.abs(back[:8000] - tone * 0.5).max() < 1e-4
    assert np.abs(back[8000:] - np.clip(tone * 2, -1, 1)).max() < 1e-4  # no wrap-around
    for nothing in ([], [AudioChunk(np.zeros(0, np.float32), 8000, "")]):
        with pytest.raises(MediaError, match="nothing was spoken"):
            wav_bytes(nothing)
    with pytest.raises(MediaError, match="two sample rates"):
        wav_bytes([AudioChunk(tone, 8000, ""), AudioChunk(tone, 16000, "")])


def test_a_transcript_is_one_line() -> None:
    assert Transcript((Segment(0, 1, "Hello \n there,"), Segment(1, 2, " you."))).text == "Hello there, you."
    assert Transcript(()).text == ""


def test_a_package_is_found_without_running_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "some_voice").mkdir()
    (tmp_path / "some_voice" / "__init__.py").write_text("raise RuntimeError")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert package_folder("some_voice", "pip install some-voice") == tmp_path / "some_voice"
    with pytest.raises(ConfigError, match="no-such-voice is not installed: pip install --no-deps no-such-voice"):
        package_folder("no_such_voice", "pip install --no-deps no-such-voice")


def test_an_onnx_file_that_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxruntime", reason="needs the extra `speech`")
    with pytest.raises(CheckpointError, match="no such file"):
        open_onnx(tmp_path / "a.onnx")
    (tmp_path / "a.onnx").write_bytes(b"no network")
    with pytest.raises(CheckpointError, match="not a whole ONNX model"):
        open_onnx(tmp_path / "a.onnx")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(
        ConfigError, match=r"needs onnxruntime, which is not installed: pip install 'polymodal\[speech\]'"
    ):
        open_onnx(tmp_path / "a.onnx")


def test_closing_what_can_be_closed() -> None:
    ended = []

    def numbers():
        try:
            yield from range(9)
        finally:
            ended.append(True)

    with closed(numbers()) as items:
        next(items)
    with closed(iter([1])) as items:
        assert next(items) == 1
    assert ended == [True]


def test_detectors_by_name() -> None:
    assert set(VADS) == {"silero", "energy"} and isinstance(load_vad("energy"), EnergyVAD)
    own = LevelVAD()
    assert load_vad(own) is own
    with pytest.raises(ConfigError, match="unknown VAD 'silera'; did you mean 'silero'"):
        load_vad("silera")


def test_silero_without_its_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("polymodal.speech.vad.importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="silero needs its network"):
        load_vad()
