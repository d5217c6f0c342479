"""A task of one's own: a class, a recipe class and one entry in `RECIPES` are all that the trainer needs."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import yaml
from pydantic import Field
from torch import nn

from polymodal.training import checkpoint, load_any_recipe, train
from polymodal.training.checkpoint import State
from polymodal.training.distributed import Engine
from polymodal.training.optimizer import Group, apply_policy
from polymodal.training.process_group import World
from polymodal.training.recipes import load
from polymodal.training.recipes.sections import RecipeBase
from polymodal.training.recipes.sft import BatchConfig
from polymodal.training.reporting.log import LossByKind, read_log
from polymodal.training.steps import Order, Steps
from polymodal.training.task import StepPlan, Task


class LineRecipe(RecipeBase):
    """Learn `y = slope * x`."""

    task: ClassVar[str] = f"{__name__}:LineTask"
    marker: ClassVar[str | None] = "slope"

    slope: float
    init: None = None
    data: dict[str, Any] = Field(default_factory=dict)
    batch: BatchConfig = BatchConfig()


class LineTask(Task):
    document: ClassVar[str] = "weight.json"
    log_keys: ClassVar[tuple[str, str]] = ("terms", "metrics")

    def __init__(self, recipe: LineRecipe, world: World, inputs: Any = None) -> None:
        self.recipe: LineRecipe = recipe
        self.world, self.model = world, nn.Linear(1, 1)

    def choose_parameters(self) -> list[Group]:
        return apply_policy(self.model, self.recipe.train, None, self.recipe.optim)

    def load_data(self) -> None:
        self.xs = torch.linspace(-1, 1, 16)[:, None]
        self.fingerprint = str(self.recipe.slope)
        self.steps = Steps(Order([(range(16), 1.0)], self.recipe.run.seed), self.recipe.batch.global_size)

    def prepare(self, fresh: bool) -> None: ...

    def plan(self, step: int) -> StepPlan:
        indices = self.steps.indices(step)
        return StepPlan(step, [indices], samples=len(indices), targets=len(indices), tokens=0)

    def load(self, micro: Any) -> torch.Tensor:
        return self.xs[micro]

    def padded_tokens(self, batch: Any) -> int:
        return 0

    def backward(self, engine: Engine, plan: StepPlan, batches: Iterator[Any], losses: LossByKind) -> torch.Tensor:
        (x,) = batches
        loss: torch.Tensor = (engine.forward(True, input=x) - self.recipe.slope * x).square()
        (loss.sum() / plan.targets).backward()
        losses.add(loss.flatten(), ["square"] * len(x), ["line"] * len(x))
        return loss.sum().detach()

    def evaluate(self, engine: Engine, step: int) -> dict[str, Any] | None:
        return None

    def export(self, final: Path, groups: Sequence[Group], state: State) -> None:
        final.mkdir(exist_ok=True)
        (final / self.document).write_text(json.dumps({"slope": self.model.weight.item(), "loss": self.last_loss()}))


def test_a_third_task_trains_resumes_and_reports(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, train_until: Callable[[RecipeBase, int], None]
) -> None:
    monkeypatch.setattr(load, "RECIPES", (LineRecipe, *load.RECIPES))
    plain = {"name": "line", "slope": 3.0, "train": [{"match": "*", "train": True}], "optim": {"learning_rate": 0.3}}
    plain["run"] = {"max_steps": 60, "epochs": 99, "save_every": 20, "threads": 1, "precision": "fp32"}
    ends = []
    for name in ("through", "killed"):
        (tmp_path / "line.yaml").write_text(yaml.safe_dump(plain | {"output_dir": str(tmp_path / name)}))
        recipe = load_any_recipe(tmp_path / "line.yaml", ["batch.global_size=6"])
        if name == "killed":
            train_until(recipe, 50)
        final = train(recipe)
        assert (final.parent / "report.html").is_file() and (final.parent / "recipe.yaml").is_file()
        newest = checkpoint.complete_checkpoints(final.parent)[-1]
        terms = [line["terms"] for line in read_log(final.parent / "log.jsonl")]
        ends.append(((newest / checkpoint.MODEL).read_bytes(), terms))
    assert ends[0] == ends[1]
    assert abs(json.loads((final / "weight.json").read_text())["slope"] - 3) < 0.3
