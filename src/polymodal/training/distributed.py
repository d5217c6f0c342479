"""What a step runs on: one device, or many processes with DDP, FSDP2 or summed gradients.

`torchrun -m polymodal train RECIPE` starts the processes; the engine joins them, wraps the model and offers the few
operations that the trainer needs, so that it reads the same on a laptop and on a cluster. DDP and FSDP2 are torch's
own. FSDP2 shards every transformer block by itself and everything else (embeddings, head, projector) together; a
vision tower that is frozen is not sharded, since a process without images would not take part in gathering it.
Contrastive tasks have gathers inside their loss and embed every micro-batch twice, which DDP's hooks do not expect:
their gradients are summed once a step. Unlike `accelerate`'s wrappers, nothing here touches data or schedule.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from polymodal.training.checkpoint import is_sharded, restore, save_checkpoint
from polymodal.training.optimizer import Group, make_optimizer
from polymodal.training.process_group import World
from polymodal.training.recipes.sections import RecipeBase
from polymodal.utils.modules import blocks, frozen

BUCKET_BYTES = 32 << 20
"""Gradients that go over the wire together."""


def wants_bf16(precision: str) -> bool:
    """Whether a recipe's precision means bf16 on this machine."""
    return precision == "bf16" or (precision == "auto" and has_fast_bf16())


def has_fast_bf16() -> bool:
    """Whether this machine multiplies bf16 natively; emulated, as on AVX2, it is ten times slower than float32."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    # The public torch.cpu.get_capabilities is not there before 2.12.
    checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(bool(getattr(torch.cpu, name, bool)()) for name in checks)


class Engine:
    """One way to run a step."""

    def __init__(
        self, world: World, recipe: RecipeBase, model: nn.Module, groups: Sequence[Group], sums_gradients: bool = False
    ) -> None:
        self.world = world
        self.inner: Any = model
        self.bf16 = wants_bf16(recipe.run.precision)
        self.kind = engine_kind(recipe.run.engine, world, sums_gradients)
        self.clip = recipe.optim.clip
        self.groups = list(groups)
        self.model: nn.Module = model
        if self.kind == "fsdp2":
            share_start(model, groups, world)
            shard(model, world, self.bf16)
            self.groups = same_groups(model, groups)
        else:
            model.to(world.device)
        if self.kind == "all-reduce":
            share_start(model, groups, world)
        elif self.kind == "ddp":
            self.model = nn.parallel.DistributedDataParallel(
                model,
                device_ids=[world.device.index] if world.device.type == "cuda" else None,
                broadcast_buffers=False,  # none of ours changes while training
                find_unused_parameters=bool(unreached(model)),
            )
        self.optimizer = make_optimizer(self.groups, recipe.optim, world.device)
        self.trained = [parameter for group in self.groups for _, parameter in group.parameters]

    def forward(self, last: bool, **inputs: Any) -> Any:
        """Run a micro-batch; gradients are averaged over processes in the backward pass of a step's last one."""
        if isinstance(self.model, nn.parallel.DistributedDataParallel):
            self.model.require_backward_grad_sync = last
        with self.autocast():
            return self.model(**inputs)

    def autocast(self) -> Any:
        """The context that a forward pass runs in."""
        return torch.autocast(self.world.device.type, torch.bfloat16) if self.bf16 else nullcontext()

    def step(self, scale: float = 1.0) -> float:
        """Scale, clip, and step unless the gradient is not finite; returns the gradient's norm before clipping."""
        if self.kind == "all-reduce":
            sum_gradients(self.trained)
        if scale != 1:  # NaN, where the loss is not finite, leaves the step out
            for parameter in self.trained:
                if parameter.grad is not None:
                    parameter.grad.mul_(scale)
        norm = nn.utils.clip_grad_norm_(self.trained, self.clip or math.inf)
        value = float(_full(norm))
        if math.isfinite(value):
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return value

    def save(self, output_dir: Path, state: dict[str, Any], keep: int) -> None:
        """Write a checkpoint."""
        save_checkpoint(output_dir, state, self.inner, self.groups, self.optimizer, keep, self.world)

    def restore(self, folder: Path) -> None:
        """Load a checkpoint's weights and optimizer state."""
        restore(folder, self.inner, self.groups, self.optimizer)

    @contextmanager
    def whole_for_generation(self) -> Iterator[Any]:
        """The model for generating, outside of a training step; under FSDP2 every process must do the same."""
        root: Any = self.model
        if self.kind == "fsdp2":
            root.unshard()
        try:
            with self.autocast():
                yield self.inner
        finally:
            if self.kind == "fsdp2":
                root.reshard()

    def gather_weights(self) -> None:
        """Undo the sharding for good: the first process then holds the whole model on the CPU, and can export it."""
        if self.kind != "fsdp2":
            return
        whole: dict[int, nn.Parameter] = {}
        before = list(self.inner.parameters())  # kept alive, so that no id is given twice
        for module in self.inner.modules():
            for name, parameter in list(module._parameters.items()):
                if parameter is None:
                    continue
                if id(parameter) not in whole:  # tied weights stay tied
                    values = _full(parameter.detach())
                    # Only the first process keeps the values: nodes may not have room for one copy a process.
                    whole[id(parameter)] = nn.Parameter(values.cpu(), False) if self.world.is_main else parameter
                module._parameters[name] = whole[id(parameter)]
            # Not `module.to`: FSDP2 would look for its shards.
            if self.world.is_main:
                for name, buffer in module._buffers.items():
                    module._buffers[name] = None if buffer is None else buffer.cpu()
        before.clear()


def engine_kind(wanted: str, world: World, sums_gradients: bool = False) -> str:
    """Resolve `run.engine`: "auto" is DDP where there are several processes; one process needs neither."""
    if world.size == 1:
        return "single"
    if sums_gradients:
        return "all-reduce"
    return "ddp" if wanted == "auto" else wanted


@torch.no_grad()
def sum_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """Sum gradients over all processes, in place; a parameter without one in every process keeps none."""
    has = torch.tensor([p.grad is not None for p in parameters], dtype=torch.uint8, device=parameters[0].device)
    dist.all_reduce(has, op=dist.ReduceOp.MAX)
    bucket: list[torch.Tensor] = []
    for parameter in (parameter for parameter, flag in zip(parameters, has.tolist(), strict=True) if flag):
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
    for gradient, summed in zip(gradients, flat.split([gradient.numel() for gradient in gradients]), strict=True):
        gradient.copy_(summed.view_as(gradient))


def unreached(model: nn.Module) -> list[str]:
    """Trained parameters that no forward pass reaches: layers of a tower behind the selected one."""
    # DDP waits for every trained parameter's gradient unless it is told that some have none; that search costs a walk
    # over the graph in each step, so it is made only where it is needed.
    from polymodal.modeling.encoders.hf_vision import FAMILIES, HFVisionEncoder

    encoder, unused = getattr(model, "vision_encoder", None) or nn.Identity(), set[int]()
    for part in encoder.modules():
        if isinstance(part, HFVisionEncoder):
            tower: Any = part.model
            layers = list(getattr(tower.encoder, FAMILIES[part.family].layers))
            used = {id(p) for layer in layers[: max(part.select_layers)] for p in layer.parameters()}
            used |= {id(p) for p in tower.embeddings.parameters()}
            unused |= {id(p) for p in part.parameters()} - used
    return [name for name, p in encoder.named_parameters() if p.requires_grad and id(p) in unused]


def share_start(model: nn.Module, groups: Sequence[Group], world: World) -> None:
    """Give every process the first one's trained weights and buffers, as DDP does by itself."""
    tensors = [parameter.data for group in groups for _, parameter in group.parameters]
    tensors += [buffer for buffer in model.buffers() if buffer.numel()]
    for tensor in tensors:
        dist.broadcast(tensor, 0)


def shard(model: nn.Module, world: World, bf16: bool) -> None:
    """Shard a model over all processes with FSDP2."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh(world.device.type, (world.size,))
    # bf16 on the wire only: what is trained stays float32.
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)
    kwargs: dict[str, Any] = {"mesh": mesh, **({"mp_policy": policy} if bf16 else {})}
    sharded, whole = blocks(model.get_submodule("llm")), set[nn.Parameter]()
    for name in ("vision_encoder", "audio_encoder"):
        if (encoder := getattr(model, name, None)) is None:
            continue
        if frozen(encoder):
            whole |= set(encoder.to(world.device).parameters())
        else:
            sharded += blocks(encoder)
    for block in sharded:
        fully_shard(block, **kwargs)
    fully_shard(model, ignored_params=whole, **kwargs)
    model.to(world.device)


def same_groups(model: nn.Module, groups: Sequence[Group]) -> list[Group]:
    """The groups again, over the parameters that now stand under the same names."""
    now = dict(model.named_parameters())
    return [replace(group, parameters=tuple((name, now[name]) for name, _ in group.parameters)) for group in groups]


def _full(tensor: torch.Tensor) -> torch.Tensor:
    """A DTensor's whole value, on every process; a plain tensor as it is."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]
