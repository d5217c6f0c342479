"""The section Speech of docs/video-audio.md: its commands and its program run, with stand-ins for the real engines."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path

import pytest

from polymodal.cli import build_parser, main
from polymodal.media.audio import open_audio
from polymodal.speech import ASR, TTS, VAD, AudioChunk, wav_bytes
from polymodal.speech.asr import PACKAGED
from polymodal.speech.vad import VADS
from tests.speech.engines import RATE, Stage, sound
from tests.speech.test_microphone import Devices

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "video-audio.md").read_text(encoding="utf-8")
SECTION = re.search(r"^## Speech\n(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL)
TEXT = SECTION[1] if SECTION else ""
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", TEXT, flags=re.DOTALL)


@pytest.fixture
def stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Stage:
    """A folder with a spoken question, and a microphone that hears it once."""
    monkeypatch.chdir(tmp_path)
    samples = sound((0.5, 0.001), (2, 0.2), (1, 0.001))
    Path("question.wav").write_bytes(wav_bytes([AudioChunk(samples, RATE, "")]))
    for name in re.findall(r"--(?:image|video|document) (\S+)", TEXT):
        Path(name).touch()
    devices = Devices(samples)
    opened, times = devices.InputStream, iter([True, False])

    def listen(*args: object, **options: object) -> Devices:
        if not next(times):
            raise KeyboardInterrupt
        return opened(*args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(devices, "InputStream", listen)
    monkeypatch.setitem(sys.modules, "sounddevice", devices)  # type: ignore[arg-type]
    return Stage(monkeypatch)


def test_the_commands_run(stage: Stage) -> None:
    commands = [line for language, block in BLOCKS if language == "sh" for line in block.splitlines()]
    assert {shlex.split(command)[1] for command in commands} == {"transcribe", "speak", "talk"} and len(commands) >= 8
    for command in commands:
        words = shlex.split(command)
        live = words[1] == "talk" and "--input" not in words
        assert main(words[1:]) == (130 if live else 0), command  # the microphone goes on until Ctrl-C
        for name in ("out.wav", "answer.wav"):
            if name in words:
                assert open_audio(name).seconds > 0
                Path(name).unlink()
    assert len(stage.model.asked) == 4


def test_the_program_runs(stage: Stage, capsys: pytest.CaptureFixture[str]) -> None:
    (program,) = (block for language, block in BLOCKS if language == "python")
    exec(compile(program, "docs/video-audio.md", "exec"), {})
    out = capsys.readouterr().out
    assert "What is it?" in out and "a cat. (" in out and open_audio("out.wav").seconds > 0


def test_names_and_flags_of_the_page_exist() -> None:
    for verb in ("talk", "transcribe", "speak"):
        known = build_parser([verb])._subparsers._group_actions[0].choices[verb].format_help()  # type: ignore[union-attr]
        for command in (line for language, block in BLOCKS if language == "sh" for line in block.splitlines()):
            if command.split()[1] == verb:
                for flag in re.findall(r" (--?[a-z-]+)", command):
                    assert flag in known, flag
    for name in (*PACKAGED, *VADS, "piper"):
        assert f"`{name}`" in TEXT
    for package in (package.replace("_", "-") for parts in PACKAGED.values() for package, _ in parts[:1]):
        assert f"`{package}`" in TEXT
    for kind, method in ((ASR, "listen"), (TTS, "synthesize"), (VAD, "probabilities")):
        assert method in kind.__abstractmethods__ and f"`{method}`" in TEXT
