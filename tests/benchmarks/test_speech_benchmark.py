"""The benchmark of speech asks, listens and counts, with engines that stand in for real ones."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest

from benchmarks import speech as bench
from tests.speech.engines import Stage


@pytest.fixture
def stage(monkeypatch: pytest.MonkeyPatch) -> Stage:
    found = Stage(monkeypatch)
    for name, what in (("asr", found.asr), ("tts", found.voice)):
        monkeypatch.setattr(bench, f"load_{name}", lambda _, what=what: what)
    monkeypatch.setattr(bench, "load_vad", lambda: "energy")
    monkeypatch.setattr(bench, "load", lambda _: found.model)
    monkeypatch.setitem(sys.modules, "onnxruntime", SimpleNamespace(set_seed=lambda seed: None))
    return found


def test_each_part_of_the_first_sound_is_printed(stage: Stage, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.first_sound("tiny.en", "piper", "default", runs=3) == 0
    out = capsys.readouterr().out
    assert len(stage.model.asked) == 4  # the first is not counted
    for part in ("decode", "vad", "asr", "first token", "first sentence", "tts", "first sound after"):
        assert part in out


def test_what_comes_back_is_counted(stage: Stage, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("jiwer")
    pytest.importorskip("whisper_normalizer")
    assert len(bench.QUESTIONS) == 16 and all((bench.IMAGES / image).is_file() for _, image in bench.QUESTIONS if image)
    questions, answers = bench.round_trip("base", "piper", "default")
    assert questions >= 0.08 and answers <= 0.9  # the stand-in hears the same words everywhere
    assert "questions: word error rate" in capsys.readouterr().out and len(stage.model.asked) == 16
    stage.asr.text = stage.model.pieces = "It is a cat."
    bench.round_trip("base", "piper", "default")
    assert "answers: 100.0% of the words" in capsys.readouterr().out
