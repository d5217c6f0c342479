"""DeepSpeed ZeRO as an engine, through `accelerate`, which fills the "auto" values of DeepSpeed's own JSON file.

For those whose cluster is set up for it; FSDP2 does the same with torch alone. It differs from the other engines: the
weights are bf16 throughout where the precision is bf16 (DeepSpeed keeps float32 masters), a step whose gradient is not
finite cannot be left out, ZeRO-3 cannot mix batches with and without images (stage 2 can), and a checkpoint needs the
same number of processes when it is read. DeepSpeed's checkpoint
files are pickles of torch; they are read only from the run's own folder. Saving follows the same protocol as always:
a temporary folder, `COMPLETE`, a rename.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from polymodal.errors import CheckpointError, ConfigError, PolymodalError, first_line
from polymodal.training import checkpoint
from polymodal.training.distributed import Engine, share_start, wants_bf16
from polymodal.training.optimizer import Group, make_optimizer
from polymodal.training.process_group import World
from polymodal.utils.files import atomic_folder

if TYPE_CHECKING:
    from polymodal.modeling.vlm import MultimodalLM, Output
    from polymodal.processing.collate import Batch
    from polymodal.training.recipes.sft import Recipe

FOLDER = "zero"
"""DeepSpeed's files in a checkpoint."""


class ZeroEngine(Engine):
    """See `Engine`."""

    def __init__(self, world: World, recipe: Recipe, model: MultimodalLM, groups: Sequence[Group]) -> None:
        try:
            import deepspeed  # noqa: F401
            from accelerate import Accelerator
            from accelerate.state import AcceleratorState
            from accelerate.utils import DeepSpeedPlugin
        except ImportError:
            raise ConfigError(
                "run.engine deepspeed: it is not installed; run `pip install deepspeed accelerate`, or set "
                "run.engine=fsdp2, which needs nothing"
            ) from None
        if world.size == 1:
            raise ConfigError("run.engine deepspeed: start it with torchrun, or set run.engine=auto")
        self.world, self.inner, self.kind = world, model, "deepspeed"
        self.bf16 = wants_bf16(recipe.run.precision)
        self.clip, self.groups = recipe.optim.clip, list(groups)
        self.trained = [parameter for group in groups for _, parameter in group.parameters]
        model.to(world.device)
        share_start(model, groups, world)
        config = _config(recipe, self.bf16)
        AcceleratorState._reset_state()
        accelerator: Any = Accelerator(deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=config))
        self.zero: Any = accelerator.prepare(model, make_optimizer(groups, recipe.optim, world.device))[0]
        self.model = self.zero
        self.stage = int(self.zero.zero_optimization_stage())
        self.optimizer = self.zero.optimizer

    def forward(self, batch: Batch, touch_media: bool, grads_reduced: bool) -> Output:
        """Run a micro-batch; see `Engine.forward`."""
        self._refuse_mixture(batch)
        self.zero.set_gradient_accumulation_boundary(is_boundary=grads_reduced)
        return self.zero(**batch.inputs(), touch_media=touch_media)

    def score(self, batch: Batch) -> Output:
        """Run a micro-batch without a gradient; see `Engine.score`."""
        self._refuse_mixture(batch)
        return super().score(batch)

    def _refuse_mixture(self, batch: Batch) -> None:
        """ZeRO-3 gathers weights in the order of its first process's modules, and breaks where another order comes."""
        if self.stage == 3 and self.inner.vision_encoder is not None and not batch.plans:
            raise ConfigError(
                "run.engine deepspeed: ZeRO-3 cannot train on batches without images beside batches with some; use "
                "run.engine=fsdp2 or ZeRO stage 2"
            )

    def autocast(self) -> Any:
        """DeepSpeed casts the weights instead."""
        return nullcontext()

    def backward(self, loss: torch.Tensor) -> None:
        """Add a micro-batch's gradient."""
        self.zero.backward(loss)

    def step(self) -> float:
        """Step, clipped by DeepSpeed."""
        self.zero.step()
        norm = float(self.zero.get_global_grad_norm())
        if not math.isfinite(norm):
            raise PolymodalError(
                "the gradient is not finite, and DeepSpeed took the step all the same: lower optim.learning_rate and "
                "go on from the last checkpoint with --force, or use run.engine=fsdp2, which leaves such steps out"
            )
        return norm

    def save(self, output_dir: Path, state: dict[str, Any], keep: int) -> None:
        """Write a checkpoint; see `checkpoint.save_checkpoint`."""
        target = checkpoint.checkpoint_folder(output_dir, int(state["step"]))
        shared = target.with_name(f".{target.name}.{FOLDER}")
        if self.world.is_main:
            shutil.rmtree(shared, ignore_errors=True)
            shared.mkdir(parents=True)
        self.world.barrier()
        with self.world.together():
            try:
                self.zero.save_checkpoint(str(shared), tag=FOLDER, exclude_frozen_parameters=True)
            except (OSError, RuntimeError) as error:
                raise CheckpointError(
                    f"{target}: cannot be written ({first_line(error)}); is the disk full?"
                ) from error
        with self.world.together():
            if self.world.is_main:
                with atomic_folder(target, replace=True) as work:
                    (shared / FOLDER).rename(work / FOLDER)
                    checkpoint.seal(work, state)
                shutil.rmtree(shared, ignore_errors=True)
                checkpoint.prune(output_dir, keep)

    def restore(self, folder: Path) -> None:
        """Load a checkpoint's weights and optimizer state."""
        size = checkpoint.read_state(folder).get("world")
        if not (folder / FOLDER).is_dir() or size != self.world.size:
            writer = f"DeepSpeed with {size} processes" if (folder / FOLDER).is_dir() else "another engine"
            raise ConfigError(
                f"{folder} was written by {writer}; DeepSpeed can go on only from its own checkpoints and with as many "
                "processes: set run.engine or the number of processes as it was"
            )
        self.zero.load_checkpoint(str(folder), tag=FOLDER, load_module_strict=False)

    @contextmanager
    def whole_for_generation(self) -> Iterator[MultimodalLM]:
        """The model for generating; every process must do the same."""
        import deepspeed

        # Parameters of the model itself, such as AnyRes's newline: DeepSpeed gathers those only in the whole forward.
        with deepspeed.zero.GatheredParameters([p for p in self.inner.parameters(recurse=False) if _is_cut(p)]):
            yield self.inner

    def gather_weights(self) -> None:
        """Undo the sharding for good; trained weights come back in float32."""
        import deepspeed
        from deepspeed.utils import safe_get_full_fp32_param

        whole: dict[int, nn.Parameter] = {}
        kept = list(self.inner.parameters())  # alive, so that no id is given twice
        trained = {id(parameter) for parameter in self.trained}
        for module in self.inner.modules():
            for name, parameter in list(module._parameters.items()):
                if parameter is None:
                    continue
                if id(parameter) not in whole:
                    with deepspeed.zero.GatheredParameters([parameter] if _is_cut(parameter) else []):
                        values = safe_get_full_fp32_param(parameter) if id(parameter) in trained else parameter.detach()
                        copy = parameter if not self.world.is_main else nn.Parameter(values.cpu().clone(), False)
                    whole[id(parameter)] = copy
                module._parameters[name] = whole[id(parameter)]
            if self.world.is_main:
                for name, buffer in module._buffers.items():
                    module._buffers[name] = None if buffer is None else buffer.cpu()
        kept.clear()


def _config(recipe: Recipe, bf16: bool) -> dict[str, Any]:
    """DeepSpeed's configuration: the user's file, with what the recipe decides laid over it."""
    path = recipe.run.deepspeed_config
    config: dict[str, Any] = {"zero_optimization": {"stage": 2}}
    if path is not None:
        try:
            config = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigError(f"run.deepspeed_config {path}: cannot be read ({first_line(error)})") from error
    # Accumulation, clipping and the optimizer are ours; a second opinion in the file would be silently wrong.
    for key in ("optimizer", "scheduler"):
        if key in config:
            raise ConfigError(f"run.deepspeed_config {path}: take out {key!r}; the recipe's `optim` decides it")
    config |= {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": recipe.optim.clip,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    config.pop("train_batch_size", None)
    config.setdefault("bf16", {"enabled": bf16})
    return config


def _is_cut(parameter: nn.Parameter) -> bool:
    """Whether ZeRO-3 keeps only a part of a parameter here."""
    return hasattr(parameter, "ds_id")
