"""docs/video-audio.md: what it says of our own models runs, on the model that comes with the package.

Its commands on published models are the subject of tests/backends/test_published_media.py, those of the dialogue of
tests/speech.
"""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from polymodal.cli import main
from polymodal.config import AudioConfig, VideoConfig, parse_config

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "video-audio.md").read_text(encoding="utf-8")
OURS = re.split(r"^## (?:Published models|Endpoints|Speech)\n", PAGE, flags=re.MULTILINE)[0]
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", OURS, flags=re.DOTALL)
COMMANDS = [line for language, block in BLOCKS if language == "sh" for line in block.splitlines() if line.strip()]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with what the page speaks of; `default` is the model that comes with the package."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(ROOT / "examples", "examples")
    Path("rows.json").write_text(next(block for language, block in BLOCKS if language == "json"), encoding="utf-8")
    return tmp_path


def test_the_commands_run(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert len(COMMANDS) >= 5
    for command in COMMANDS:
        words = shlex.split(command)
        assert words[0] == "polymodal", command
        short = ["--max-new-tokens", "2"] if words[1] == "generate" else []
        assert main([*words[1:], *short]) == 0, command
    assert "6 frames" in capsys.readouterr().out  # shown by inspect


def test_the_programs_run(place: Path) -> None:
    for program in (block for language, block in BLOCKS if language == "python"):
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=place)
        assert done.returncode == 0, done.stderr


def test_the_settings_are_settings() -> None:
    settings = [yaml.safe_load(block) for language, block in BLOCKS if language == "yaml"]
    kinds = {"video": VideoConfig, "audio": AudioConfig}
    assert sorted(name for each in settings for name in each) == ["audio", "video"]
    for each in settings:
        for name, values in each.items():
            parse_config(kinds[name], values, "docs/video-audio.md")
    for name in re.findall(r"`(num_frames|fps|times|key_frames|start|end)`", OURS):
        from polymodal import Video

        assert name in Video.__dataclass_fields__
