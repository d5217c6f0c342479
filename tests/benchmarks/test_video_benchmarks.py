"""The benchmark of seeking and the long fuzz, each on very little."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import media_fuzz, video


def test_the_ways_are_compared(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(video.tempfile, "gettempdir", lambda: str(tmp_path))
    for _ in range(2):
        video.main(["--minutes", "0.1", "--height", "90", "--runs", "1"])
    out = capsys.readouterr().out
    assert out.count("making") == 1  # the file is kept
    rows = [line for line in out.splitlines() if line.startswith("| ")]
    assert [row.split(" | ")[0] for row in rows[:3]] == ["| way", "| sample_frames", "| decode all"]
    assert rows[1].endswith("| yes |") and rows[2].endswith("| 1.000 | yes |")


def test_the_fuzz_counts_and_fails_where_it_should(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.media_fuzz", "--minutes", "0.03", "--keep", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and " 0 failures" in done.stdout, done.stdout
    done = subprocess.run([*command, "--seconds", "0.0001"], capture_output=True, text=True)
    assert done.returncode == 1 and "FAILURE: over 0.0001 seconds" in done.stdout


def test_damage_is_seeded_and_does_harm() -> None:
    data = bytes(range(256)) * 8
    broken = [media_fuzz.damage(data, media_fuzz.random.Random(seed)) for seed in range(40)]
    assert broken == [media_fuzz.damage(data, media_fuzz.random.Random(seed)) for seed in range(40)]
    assert sum(one != data for one in broken) > 30 and len({len(one) for one in broken}) > 5
