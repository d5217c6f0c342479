"""The benchmark of 8-bit weights runs on any model of ours and prints its two tables."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from PIL import Image as PILImage

from polymodal import Image, LocalBackend, user
from polymodal.config import LLMConfig, ModelConfig
from polymodal.modeling.build import build_model
from tests.conftest import write_tiny_llm


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
    monkeypatch.setattr(quantize, "another_process", lambda: ThreadPoolExecutor(1))
    quantize.main(str(tiny_model_folder), "1")
    lines = capsys.readouterr().out.splitlines()
    assert lines.pop(1).startswith("llama.cpp: ")  # not installed, or a tokenizer without merges
    speed = {line[:24].strip(): line[24:].split() for line in lines[3:6]}
    assert list(speed) == ["transformers generate", "float32", "int8 layers"]
    assert speed["transformers generate"][1] == "(1.00x)"
    agreement = {line[:24].strip(): float(line[24:].split()[0]) for line in lines[8:9]}
    assert 0 < agreement["int8 layers"] < 1
    costs = {line[:22].strip(): [float(cell) for cell in line[22:].split()] for line in lines[12:]}
    assert list(costs) == list(speed) and all(cost > 0 for row in costs.values() for cost in row)


def test_llama_cpp_takes_our_embeddings(
    quantize: Any, tiny_model_config: ModelConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("llama_cpp")
    write_tiny_llm(tmp_path / "llm", initializer_range=0.3)
    config = tiny_model_config.model_copy(update={"llm": LLMConfig(model_name_or_path=str(tmp_path / "llm"))})
    model, tokenizer = build_model(config)
    monkeypatch.setattr(quantize, "CPP", ("F32",))
    monkeypatch.setattr(quantize, "describe_tokens", lambda writer, **_: writer.add_tokenizer_model("no_vocab"))
    ours = LocalBackend(model.eval(), tokenizer, config)
    monkeypatch.setattr(quantize, "open_plain", lambda _name: ours)
    asked = [user(Image(PILImage.new("RGB", (40, 30), (10, 40, 90))), "What is this?")]
    wanted, made = quantize.answer(ours, asked, 8), quantize.peer_answer("tiny", "llama.cpp F32", asked, 8)
    assert abs(made.logits - wanted.logits).max() <= 0.02 * abs(wanted.logits).max() and made.ids == wanted.ids


def test_tokens_that_agree_from_the_beginning(quantize: Any) -> None:
    assert [quantize.prefix([1, 2, 3], other) for other in ([1, 2, 3], [1, 2], [1, 5, 3], [9])] == [3, 2, 1, 0]
