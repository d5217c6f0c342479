"""`polymodal talk`, `transcribe` and `speak`, with engines that stand in for real ones."""

from __future__ import annotations

import io
import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from polymodal.cli import main
from polymodal.errors import MediaError
from polymodal.media.audio import open_audio
from polymodal.messages import Document, Image, Text, Video, assistant, system
from polymodal.speech import AudioChunk, wav_bytes
from tests.speech.engines import RATE, Stage, sound


@pytest.fixture
def stage(monkeypatch: pytest.MonkeyPatch) -> Stage:
    return Stage(monkeypatch)


@pytest.fixture
def question(tmp_path: Path) -> Path:
    path = tmp_path / "question.wav"
    samples = sound((0.5, 0), (1, 0.2), (0.5, 0), (1, 0.2), (1, 0))
    path.write_bytes(wav_bytes([AudioChunk(samples, RATE, "")]))
    return path


def test_talk_from_a_file_into_a_file(
    stage: Stage, question: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "answer.wav"
    monkeypatch.chdir(tmp_path)
    for name in ("a.jpg", "b.mp4", "c.pdf"):
        (tmp_path / name).touch()
    flags = ["--video", "b.mp4", "--num-frames", "3", "--image", "a.jpg", "--document", "c.pdf"]
    flags += ["--prompt", "Be brief.", "--system", "S", "--asr", "base", "--instruction", "Say it well."]
    assert main(["talk", "--input", str(question), "--output", str(target), *flags, "--max-new-tokens", "5"]) == 0
    out, err = capsys.readouterr()
    assert out == "> What is it?\\x1b[31m\nIt is\\x1b[0m a cat. Good.\n"
    assert re.search(r"first sound after \d+\.\d\d s \(decode .*, tts ", err) and f"wrote {target}" in err
    assert ("asr", "base") in stage.names and ("tts", "piper") in stage.names
    (((first, asked), params),) = stage.model.asked
    assert first == system("S") and params.max_new_tokens == 5
    given = (Video("b.mp4", num_frames=3), Image("a.jpg"), Document("c.pdf"), Text("Be brief."))
    assert asked.parts[:4] == given and len(asked.parts) == 5
    assert asked.parts[4].text.endswith("\nSay it well.")
    spoken = open_audio(target, sample_rate=8000)
    assert spoken.source_rate == 8000 and len(spoken.samples) == 100 * sum(map(len, stage.voice.said))


def test_talk_without_an_asr(stage: Stage, question: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["talk", "--input", str(question), "--no-asr", "--output", str(tmp_path / "a.wav")]) == 0
    assert capsys.readouterr().out == "It is\\x1b[0m a cat. Good.\n"
    assert stage.asr.given == [] and stage.model.asked[0][0][0].media[0].source == str(question)
    assert ("vad", "silero") not in stage.names  # nothing is to be found by it
    stage.model.takes = ("image",)  # type: ignore[misc]
    assert main(["talk", "--input", str(question), "--no-asr", "--output", str(tmp_path / "a.wav")]) == 2
    assert "takes no sounds" in capsys.readouterr().err


def listening(monkeypatch: pytest.MonkeyPatch, heard: list[np.ndarray]) -> Any:
    """A microphone that hears one sound after the other; then Ctrl-C."""
    from tests.speech.test_microphone import Devices

    devices = Devices()
    opened = devices.InputStream

    def listen(*args: Any, **options: Any) -> Any:
        if not heard:
            raise KeyboardInterrupt
        devices.heard = heard.pop()
        return opened(*args, **options)

    monkeypatch.setattr(devices, "InputStream", listen)
    monkeypatch.setitem(sys.modules, "sounddevice", devices)  # type: ignore[arg-type]
    return devices


SPOKEN = sound((1, 0.001), (1, 0.2), (1, 0.001))


def test_talk_with_a_microphone_goes_on_until_it_is_ended(
    stage: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.jpg").touch()
    devices = listening(monkeypatch, [SPOKEN, SPOKEN])
    assert main(["talk", "--image", "a.jpg"]) == 130
    first, second = (messages for messages, _ in stage.model.asked)
    assert [message.role for message in second] == ["user", "assistant", "user"]
    assert second[0] == first[0] and second[1] == assistant("It is\x1b[0m a cat. Good.")
    assert len(first[0].media) == 1 and second[2].media == ()  # the image is not given twice
    assert sum(map(len, devices.played)) == 100 * sum(map(len, stage.voice.said))
    assert capsys.readouterr().out.count("> What is it?") == 2


def test_talk_with_a_microphone_goes_on_after_silence_and_ends_at_a_file_that_cannot_be_read(
    stage: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "no.jpg").touch()
    listening(monkeypatch, [SPOKEN, SPOKEN])
    stage.asr.text = " "
    assert main(["talk"]) == 130 and capsys.readouterr().err.count("no speech was found") == 2
    listening(monkeypatch, [SPOKEN, SPOKEN])
    stage.asr.text = "What is it?"

    def refuse(*_: Any) -> Any:
        raise MediaError("no.jpg: cannot be read as an image")

    monkeypatch.setattr(stage.model, "stream", refuse)
    assert main(["talk", "--image", "no.jpg"]) == 2
    assert capsys.readouterr().err.count("no.jpg: cannot be read") == 1


def test_mistakes_are_one_line_before_anything_is_opened(
    stage: Stage, question: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "sounddevice", None)
    target = str(tmp_path / "a.wav")
    for arguments, message in (
        (["talk"], "pip install 'polymodal[microphone]'"),
        (["talk", "--input", str(question)], "give --input question.wav and --output answer.wav"),
        (["talk", "--output", target], "--output is for a question from a file"),
        (["talk", "--input", str(question), "--output", str(tmp_path / "no" / "a.wav")], "its folder is not there"),
        (["talk", "--input", str(question), "--output", target, "--temperature", "-1"], "temperature"),
        (["talk", "--input", str(question), "--output", target, "--image", "a.mp4"], "give it with --video"),
        (["talk", "--input", str(question), "--output", target, "--image", "no.jpg"], "no.jpg: no such file"),
        (["talk", "--input", str(question), "--output", str(tmp_path / "a.mp3")], "ends in .wav"),
        (["speak", "Hello.", "--output", str(tmp_path / "a.mp3")], "ends in .wav"),
        (["talk", "--input", str(question), "--output", target, "--pages", "1"], "no --document was given"),
        (["speak", "Hello.", "-o", str(tmp_path)], "is a folder"),
        (["speak", "Hello."], "-o/--output"),
    ):
        assert main(arguments) == 2
        said = capsys.readouterr().err
        assert message in said and said.count("\n") == 1, said
    assert stage.names == []
    for arguments, message in (
        (["talk", "--input", str(tmp_path / "no.wav"), "--output", target], "no such file"),
        (["transcribe", str(tmp_path / "no.wav")], "no such file"),
        (["transcribe", str(question), "--max-seconds", "1"], "lasts longer"),
        (["speak", "...", "-o", target], "no letter and no digit"),
    ):
        assert main(arguments) == 2
        said = capsys.readouterr().err
        assert message in said and said.count("\n") == 1, said
    assert not Path(target).exists()


def test_silence_and_an_answer_without_words(
    stage: Stage, question: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    quiet, target = tmp_path / "quiet.wav", tmp_path / "a.wav"
    quiet.write_bytes(wav_bytes([AudioChunk(np.zeros(RATE, np.float32), RATE, "")]))
    assert main(["talk", "--input", str(quiet), "--output", str(target)]) == 2
    assert f"{quiet}: no speech was found in it" in capsys.readouterr().err and stage.model.asked == []
    assert main(["transcribe", str(quiet)]) == 0
    assert capsys.readouterr().out == "\n"
    stage.model.pieces = ["..."]
    assert main(["talk", "--input", str(question), "--output", str(target)]) == 2
    assert "no words that can be spoken" in capsys.readouterr().err and not target.exists()


def test_transcribe(stage: Stage, question: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["transcribe", str(question), str(question)]) == 0
    assert capsys.readouterr().out == "What is it?\\x1b[31m\n" * 2
    assert main(["transcribe", str(question), "--timestamps", "--language", "de"]) == 0
    assert capsys.readouterr().out == "[00:00.29 - 00:03.20] What is it?\\x1b[31m\n"
    assert stage.asr.given[-1][1] == "de"
    assert main(["transcribe", str(question), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["file"], found["language"], found["text"]) == (str(question), "en", "What is it?\x1b[31m")
    assert found["segments"] == [{"start": 0.29, "end": 3.2, "text": "What is it?\x1b[31m"}]


def test_times_of_a_long_sound() -> None:
    from polymodal.cli.transcribe import _clock

    assert [_clock(seconds) for seconds in (0, 59.999, 61.5, 3661.25)] == [
        "00:00.00",
        "01:00.00",
        "01:01.50",
        "1:01:01.25",
    ]


def test_speak(
    stage: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "out.wav"
    assert main(["speak", "Hello there. You too.", "-o", str(target)]) == 0
    assert (
        stage.voice.said == ["Hello there.", "You too."] and len(open_audio(target, sample_rate=8000).samples) == 2000
    )
    assert "2" in capsys.readouterr().err
    monkeypatch.setattr(sys, "stdin", io.StringIO("From a pipe."))
    assert main(["speak", "-", "-o", str(target)]) == 0
    assert stage.voice.said[-1] == "From a pipe."
