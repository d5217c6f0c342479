"""The throughput benchmark asks both sides the same, and sees where their answers differ."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks.evaluation import throughput
from benchmarks.evaluation.beside_lmms_eval import TASKS, write_items
from benchmarks.evaluation.models import write_model
from polymodal.evaluation.tasks.questions import data_task


@pytest.mark.parametrize("family", ["llava", "idefics3"])
def test_both_sides_answer_alike(family: str, tmp_path: Path) -> None:
    examples = throughput.questions(images=3, each=2)
    assert len({example.messages[0].text for example in examples}) > 2
    found = throughput.measure(family, write_model(family, tmp_path, "tiny", ends=3.0), examples, runs=1)
    assert found.equal == len(examples) == 6 and found.differ == []
    assert 1 < found.tokens <= 17 and min(found.fast + found.slow) > (0, 0) and "(" in found.ratios(0)
    assert found.where.startswith("preparing") if family == "llava" else found.where == ""


def test_a_difference_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    examples = throughput.questions(images=2, each=1)
    monkeypatch.setattr(throughput.OneByOne, "__call__", lambda self, asked: ["other"] * len(asked))
    found = throughput.measure("llava", write_model("llava", tmp_path, "tiny"), examples, runs=1)
    assert found.equal == 0 and all(theirs == "other" for _, theirs in found.differ)


def test_it_prints_a_row_for_each_model(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--images", "2", "--each", "2", "--runs", "1", "--shape", "tiny", "--models", "llava"]
    monkeypatch.setattr(sys, "argv", ["throughput", *words])
    throughput.main()
    assert "llava, 2 an image" in (said := capsys.readouterr().out) and "equal answers: 4" in said


def test_both_harnesses_get_the_same_questions(tmp_path: Path) -> None:
    write_items(tmp_path, 12)
    for name, (metric, _, _) in TASKS.items():
        docs = json.loads((tmp_path / f"{name}.json").read_text())
        asked = list(data_task(tmp_path / f"{name}-rows.json", metric=metric).read(tmp_path, ""))
        for doc, example in zip(docs, asked, strict=True):
            assert example.messages[0].text.startswith(doc["question"] + "\nAnswer the question")
            assert str(example.messages[0].media[0].source) == doc["image"]
            said = [row["answer"] for row in doc["answers"]] if name == "vqa" else [doc["answer"]]
            assert list(example.references) == said
        assert f"task: scenes_{name}" in (tmp_path / f"scenes_{name}.yaml").read_text()
        assert len({doc["answer"] for doc in docs}) > 1
