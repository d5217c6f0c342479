"""`python -m recipes.default.dataset default` in its smallest size, which needs no packages."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from recipes.default.dataset.__main__ import main


def test_build_tiny(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "data"
    argv = ["default", "--output", str(target), "--size", "tiny", "--workers", "1"]
    assert main(argv) == 0
    assert str(target) in capsys.readouterr().out
    records = [
        record for path in target.glob("*.json") for record in json.loads(path.read_text()) if "conversations" in record
    ]
    assert records
    assert all((target / record["image"]).is_file() for record in records if isinstance(record.get("image"), str))
    assert main(argv) == 2  # the folder is not empty now
    assert "not empty" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "word"),
    [(["--size", "tinny"], "'tinny'"), (["--packages", "nowhere"], "nowhere"), (["--workers", "0"], "workers")],
)
def test_mistakes(flags: list[str], word: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["default", "--output", str(tmp_path / "data"), *flags]) == 2
    assert word in capsys.readouterr().err
