"""The loop's part of a pair stage: which micro-batches make a step, and what is logged of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from polymodal.modeling.dual_encoders.base import METRIC, PairBatch
from polymodal.training.contrastive.dataset import PairFeed, PairSteps, Plan
from polymodal.training.contrastive.step import pair_gradients
from polymodal.training.distributed import Engine, share_start, wants_bf16
from polymodal.training.optimizer import Group, make_optimizer
from polymodal.training.process_group import World
from polymodal.training.reporting.loss_by_kind import Sums
from polymodal.training.trainer import Run, step_seed
from polymodal.utils.threads import ahead

if TYPE_CHECKING:
    from polymodal.training.contrastive.teacher import Teacher
    from polymodal.training.distributed import Engine
    from polymodal.training.recipes.contrastive import PairRecipe


# ---- What a pair stage's step runs on: one device, or several processes that add up their gradients ----
# A step embeds every micro-batch twice and has gathers inside its loss, which DDP's hooks do not expect. Each process's
# loss is its share of the global one, so the gradients are simply summed, once a step, in flat buffers.


BUCKET_BYTES = 32 << 20
"""Gradients that go over the wire together."""


class PairEngine(Engine):
    """An engine whose model is not wrapped."""

    def __init__(self, world: World, recipe: PairRecipe, model: nn.Module, groups: Sequence[Group]) -> None:
        self.world = world
        self.bf16 = wants_bf16(recipe.run.precision)
        self.kind = "single" if world.size == 1 else "all-reduce"
        self.clip = recipe.optim.clip
        self.groups = list(groups)
        self.model = model.to(world.device)
        self.inner = model  # type: ignore[assignment]  # a pair model in the place of a language model
        if world.size > 1:
            share_start(model, groups, world)
        self.optimizer = make_optimizer(self.groups, recipe.optim, world.device)
        self.trained = [parameter for group in self.groups for _, parameter in group.parameters]

    def step(self) -> float:
        """Sum gradients over processes, clip, step; returns the gradient's norm before clipping."""
        if self.world.size > 1:
            sum_gradients(self.trained)
        norm = super().step()
        self.inner.after_step()  # type: ignore[operator]
        return norm


@torch.no_grad()
def sum_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """Sum gradients over all processes, in place; a parameter without one in every process keeps none."""
    has = torch.tensor([p.grad is not None for p in parameters], dtype=torch.uint8, device=parameters[0].device)
    dist.all_reduce(has, op=dist.ReduceOp.MAX)
    wanted = [parameter for parameter, flag in zip(parameters, has.tolist(), strict=True) if flag]
    bucket: list[torch.Tensor] = []
    for parameter in wanted:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        bucket.append(parameter.grad)
        if sum(grad.numel() * grad.element_size() for grad in bucket) >= BUCKET_BYTES:
            _sum_together(bucket)
            bucket = []
    if bucket:
        _sum_together(bucket)


def _sum_together(gradients: Sequence[torch.Tensor]) -> None:
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    for gradient, part in zip(gradients, flat.split([gradient.numel() for gradient in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))


class PairRun(Run):
    """A pair stage in progress."""

    tallied = ("terms", "metrics")

    def __init__(
        self,
        recipe: PairRecipe,
        engine: Engine,
        feed: PairFeed,
        steps: PairSteps,
        evaluation: Callable[[Engine, int], dict[str, Any]] | None = None,
        teacher: Teacher | None = None,
    ) -> None:
        super().__init__(recipe, engine, feed, steps, evaluation)  # type: ignore[arg-type]
        self.teacher = teacher

    def plan(self, step: int) -> Plan:
        """What a step shows, over all processes."""
        steps: Any = self.steps
        plan: Plan = self.feed.plan(self.steps.indices(step), *steps.places(step))
        return plan

    def _batches(self) -> Generator[PairBatch, None, None]:
        """All micro-batches of the rest of the run, made a few ahead in threads."""
        plans = (part for step in range(self.state.step, self.total) for part in self._parts(self.plan(step)))
        return ahead(self.feed.batch, plans, self.recipe.run.workers)

    def _parts(self, plan: Plan) -> list[Plan]:
        """This process's micro-batches: its run of the step's pairs, cut."""
        own = len(plan.indices) // self.world.size
        first = own * self.world.rank
        size = self.recipe.batch.micro_size or own
        return plan.cut(slice(first, first + own)).split(size)

    def _micro(self, step: int) -> list[np.ndarray]:
        """This process's micro-batches of a step."""
        return [part.indices for part in self._parts(self.plan(step))]

    def _sizes(self, indices: np.ndarray) -> tuple[int, int]:
        """Pairs of a step, by which its loss is divided, and the tokens of their texts."""
        starts, texts = self.feed.prepared.starts, self.plan(self.state.step).texts
        return len(indices), int((starts[texts + 1] - starts[texts]).sum())

    def _gradients(self, batches: Iterator[PairBatch], tokens: int) -> torch.Tensor | float:
        """Run the step's micro-batches, and leave its gradient."""
        window, run = self.window, self.recipe.run
        micro: list[PairBatch] = []
        for _ in self._micro(self.state.step):
            waited = time.monotonic()
            batch = next(batches)
            window.data_wait_s += time.monotonic() - waited
            window.padded_tokens += batch.input_ids.numel()
            batch = batch.to(self.world.device)
            micro.append(batch if self.teacher is None else self.teacher.see(batch))
        terms = pair_gradients(
            self.engine.inner,  # type: ignore[arg-type]  # a pair model
            micro,
            self.engine.autocast,
            step_seed(run.seed, self.state.step, 0),
            self.world.rank,
            self.recipe.objective.gather_with_grad,
        )
        return self._note(terms, tokens, sum(len(batch) for batch in micro))

    def _note(self, terms: dict[str, torch.Tensor], pairs: int, own: int) -> float:
        """Add a step's terms to the tally; returns their sum, times the pairs."""
        values = dict(zip(terms, torch.stack([t.double() for t in terms.values()]).tolist(), strict=True))
        parts = {name: value * pairs for name, value in values.items() if not name.startswith(METRIC)}
        metrics = {name.removeprefix(METRIC): v * own for name, v in values.items() if name.startswith(METRIC)}
        for sums, found in ((self.tally.kinds, parts), (self.tally.sources, metrics)):
            _add(sums, found, own)
        return sum(parts.values())


def _add(sums: Sums, found: dict[str, float], count: int) -> None:
    for name, value in found.items():
        entry = sums.setdefault(name, [0.0, 0.0])
        entry[0] += value
        entry[1] += count
