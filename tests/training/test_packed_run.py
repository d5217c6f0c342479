"""Whole runs: packing, checkpointing and chunks of logits change how a step is computed, not what it computes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from polymodal.checkpoints.model_folder import load_model
from polymodal.config import parse_config
from polymodal.training import train
from polymodal.training.recipes.sft import Recipe
from polymodal.training.reporting.log import read_log
from polymodal.training.sft.task import SFTTask, load_inputs


def recipe_of(plain: dict[str, Any], folder: Path, **sections: dict[str, Any]) -> Recipe:
    merged = json.loads(json.dumps(plain)) | {"output_dir": str(folder)}
    for section, values in sections.items():
        merged[section] = {**merged[section], **values}
    return parse_config(Recipe, merged, "recipe")


def curve(folder: Path) -> list[float]:
    return [line["loss"] for line in read_log(folder / "log.jsonl")]


@pytest.fixture
def usual(plain: dict[str, Any], tmp_path: Path) -> tuple[list[float], dict[str, torch.Tensor]]:
    plain["train"] = [{"match": "*", "train": True}]
    plain["optim"] = {"learning_rate": 2e-4, "eps": 1e-3}  # a tiny eps would turn rounding into whole steps
    final = train(recipe_of(plain, tmp_path / "usual"))
    return curve(tmp_path / "usual"), load_model(final).model.state_dict()


@pytest.mark.parametrize("chunks", [False, True])
def test_a_packed_run_equals_the_padded_one(
    plain: dict[str, Any], tmp_path: Path, usual: tuple[list[float], dict[str, torch.Tensor]], chunks: bool
) -> None:
    recipe = recipe_of(
        plain, tmp_path / "packed",
        batch={"packing": "pack", "micro_tokens": 96}, run={"checkpointing": "on" if chunks else "off"},
    )  # fmt: skip
    parts = load_inputs(recipe)
    parts.model.logits_budget = 20_000 if chunks else None
    final = train(recipe, parts)
    lines = read_log(tmp_path / "packed" / "log.jsonl")
    assert curve(tmp_path / "packed") == pytest.approx(usual[0], rel=1e-5)
    assert all(line["padding"] == 0 for line in lines)
    after = load_model(final).model.state_dict()
    assert after.keys() == usual[1].keys()
    for name, weight in usual[1].items():
        assert torch.allclose(after[name], weight, atol=1e-5), name


def test_steps_can_be_counted_in_tokens(plain: dict[str, Any], tmp_path: Path) -> None:
    recipe = recipe_of(
        plain, tmp_path / "tokens", batch={"packing": "pack", "micro_tokens": 128, "global_tokens": 300},
        run={"max_steps": None, "epochs": 2},
    )  # fmt: skip
    train(recipe)
    lines = read_log(tmp_path / "tokens" / "log.jsonl")
    seen = [line["real_tokens"] for line in lines]
    steps = [after - before for before, after in zip([0, *seen], seen, strict=False)]
    assert lines[-1]["samples"] == 2 * 25 and lines[-1]["epoch"] == 2
    assert all(200 < tokens < 400 for tokens in steps)


def test_a_packed_run_goes_on_where_it_stopped(plain: dict[str, Any], tmp_path: Path) -> None:
    packed = {"packing": "pack", "micro_tokens": 96, "global_tokens": 300}
    train(recipe_of(plain, tmp_path / "whole", batch=packed))
    parts = recipe_of(plain, tmp_path / "parts", batch=packed)
    from polymodal.training.process_group import World
    from polymodal.training.run import make_trainer

    Path(parts.output_dir).mkdir()
    run = make_trainer(SFTTask(parts, World()))
    batches = run.batches()
    for _ in range(3):
        run.step(batches)
    batches.close()
    run.save()
    train(parts)
    assert curve(tmp_path / "parts")[-3:] == curve(tmp_path / "whole")[-3:]
