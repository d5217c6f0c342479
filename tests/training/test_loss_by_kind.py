"""Loss by kind and by source: per turn, and adding up to the loss."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from polymodal.config import parse_config
from polymodal.data.readers.conversations import Record
from polymodal.messages import assistant, user
from polymodal.processing.collate import Sample
from polymodal.training import train
from polymodal.training.recipes.sft import Recipe
from polymodal.training.reporting.log import LossByKind, means, merge, read_log
from polymodal.training.sft.dataset import kinds_of_targets, turn_of_target


def sample_of(mask: str) -> Sample:
    bits = torch.tensor([letter == "x" for letter in mask], dtype=torch.bool)
    return Sample(input_ids=torch.arange(len(bits)), loss_mask=bits)


@pytest.mark.parametrize(
    ("mask", "turns"),
    [
        ("..xx..x", [0, 0, 1]),
        ("xx.x", [0, 1]),  # the first token is never a target, and the rest of its turn is still the first turn
        ("x.x", [1]),
        ("...", []),
        ("", []),
    ],
)
def test_turns_are_runs_of_the_mask(mask: str, turns: list[int]) -> None:
    assert turn_of_target(sample_of(mask)).tolist() == turns


def record_of(kinds: Any, kind: str = "caption") -> Record:
    messages = (user("a"), assistant("b"), user("c"), assistant("d"))
    extra = {} if kinds is None else {"kinds": kinds}
    return Record(id="r", messages=messages, kind=kind, source="s", extra=extra)


def test_kinds_follow_turns_where_there_is_one_a_turn() -> None:
    sample = sample_of("..xx..x")
    assert kinds_of_targets(record_of(["vqa", "ocr"]), sample) == ["vqa", "vqa", "ocr"]
    for wrong in (None, ["vqa"], ["vqa", "ocr", "vqa"], "vqa"):
        assert kinds_of_targets(record_of(wrong), sample) == ["caption"] * 3


def test_kinds_skip_a_turn_that_is_not_trained() -> None:
    messages = (user("a"), replace(assistant("b"), train=False), user("c"), assistant("d"))
    record = replace(record_of(["vqa", "ocr"]), messages=messages)
    assert kinds_of_targets(record, sample_of("......x")) == ["ocr"]


def test_sums_do_not_depend_on_when_they_are_folded() -> None:
    rng = np.random.default_rng(0)
    batches = [torch.from_numpy(rng.random(7).astype(np.float32)) for _ in range(6)]
    kinds = [["a", "b", "a", "b", "b", "a", "c"]] * 6
    late, often = LossByKind(), LossByKind()
    for batch, names in zip(batches, kinds, strict=True):
        late.add(batch, names, names)
        often.add(batch, names, names)
        often.fold()
        often = LossByKind(often.kinds, often.sources)  # as a checkpoint keeps it
    late.fold()
    assert late.kinds == often.kinds and late.sources == often.sources
    assert sum(tokens for _, tokens in late.kinds.values()) == 42
    total = sum(float(batch.double().sum()) for batch in batches)
    assert sum(loss for loss, _ in late.kinds.values()) == pytest.approx(total, rel=1e-12)


def test_merged_sums_are_means_over_all_tokens() -> None:
    merged = merge([{"a": [4.0, 2.0]}, {"a": [2.0, 4.0], "b": [1.0, 1.0]}])
    assert means(merged) == {"a": 1.0, "b": 1.0}


def test_a_run_logs_both_and_they_add_up(plain: dict[str, Any], tiny: Path, tmp_path: Path) -> None:
    records = json.loads((tiny / "data.json").read_text())
    for record in records:
        turns = sum(turn["from"] == "gpt" for turn in record["conversations"])
        record["kinds"] = ["first", "second"][:turns]
        record["source"] = "with images" if "image" in record else "text"
    path = tmp_path / "kinds.json"
    path.write_text(json.dumps(records))
    plain["data"]["mix"] = [{"path": str(path), "image_root": str(tiny)}]
    plain["run"] |= {"log_every": 4, "max_steps": 8}
    plain["batch"] |= {"packing": "pack", "micro_tokens": 100}
    train(parse_config(Recipe, plain, "recipe"))
    lines = read_log(Path(plain["output_dir"]) / "log.jsonl")
    assert len(lines) == 2
    for line in lines:
        assert set(line["loss_by_kind"]) == {"first", "second"}
        assert set(line["loss_by_source"]) == {"with images", "text"}
        for parts in (line["loss_by_kind"], line["loss_by_source"]):
            assert min(parts.values()) <= line["loss"] + 1e-6 and line["loss"] - 1e-6 <= max(parts.values())
