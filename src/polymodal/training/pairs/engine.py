"""What a pair stage's step runs on: one device, or several processes that add up their gradients.

A step embeds every micro-batch twice and has gathers inside its loss, which DDP's hooks do not expect. Each process's
loss is its share of the global one, so the gradients are simply summed, once a step, in flat buffers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import nn

from polymodal.training.distributed import Engine, share_start, wants_bf16
from polymodal.training.optimizer import Group, make_optimizer
from polymodal.training.process_group import World

if TYPE_CHECKING:
    from polymodal.training.recipes.contrastive import PairRecipe

BUCKET_BYTES = 32 << 20
"""Gradients that go over the wire together."""


class PairEngine(Engine):
    """An engine whose model is not wrapped.

    Args:
        world: The processes.
        recipe: The stage.
        model: Its model, with what is trained marked; moved to the device.
        groups: The trained parameters.
    """

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
    """Sum gradients over all processes, in place; a parameter without one in every process keeps none.

    Args:
        parameters: The same in every process, in the same order.
    """
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
