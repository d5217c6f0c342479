"""The benchmark of 8-bit weights runs on any model of ours and prints its two tables."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def quantize(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The benchmark, which is no part of the package."""
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[2]))
    return import_module("benchmarks.quantize")


def test_both_tables(
    quantize: Any, tiny_model_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantize, "QUESTIONS", quantize.QUESTIONS[:2])
    monkeypatch.setattr(quantize, "TOKENS", 3)
    monkeypatch.setattr(quantize, "WHOLE", 4)
    monkeypatch.setattr(quantize, "BITS", {})  # no graph is made of heads this narrow
    quantize.main(str(tiny_model_folder), "1")
    lines = capsys.readouterr().out.splitlines()
    speed = {line[:24].strip(): line[24:].split() for line in lines[3:6]}
    assert list(speed) == ["transformers generate", "float32", "int8 layers"]
    assert speed["transformers generate"][1] == "(1.00x)"
    agreement = {line[:24].strip(): float(line[24:].split()[0]) for line in lines[8:9]}
    assert 0 < agreement["int8 layers"] < 1


def test_tokens_that_agree_from_the_beginning(quantize: Any) -> None:
    assert [quantize.prefix([1, 2, 3], other) for other in ([1, 2, 3], [1, 2], [1, 5, 3], [9])] == [3, 2, 1, 0]
