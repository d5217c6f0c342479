"""The training loop: one optimizer step after the other, exact under accumulation, resume and crash.

Thin on purpose, on `accelerate` for devices, mixed precision and data-parallel wrapping only: its prepared loaders
prefetch and reshard, its prepared schedulers step once per process, and the Trainer of `transformers` saves in place.
The loss of a step is the sum of token losses divided by the step's count of trained tokens over all processes, never
a mean of means, so accumulation gives the gradient of the large batch. That count is known beforehand, since all data
are tokenised first.
"""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Generator, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.nn import functional as F

from polymodal.errors import ConfigError, DataError, PolymodalError
from polymodal.files import write_text
from polymodal.processing.sample import Batch
from polymodal.training import align, checkpoint, policy, prototypes
from polymodal.training.curves import draw_curves
from polymodal.training.log import Meter, append_log, environment, read_log, say, start_log
from polymodal.training.parts import Feed, Parts, load_parts, make_feed
from polymodal.training.recipe import Recipe, dump_recipe
from polymodal.training.samples import Order, ahead, micro_batches
from polymodal.training.schedule import lr_factor
from polymodal.training.signals import StopRequest

if TYPE_CHECKING:
    from accelerate import Accelerator

MAX_SKIPPED = 5
"""Steps in a row whose gradient may be NaN or infinite before the run is given up."""


@dataclass
class State:
    """Where a run is; plain numbers, stored in each checkpoint.

    Attributes:
        step: Optimizer steps done.
        samples: Samples seen.
        trained_tokens: Tokens with a label seen.
        real_tokens: Tokens seen, padding not counted.
        elapsed_s: Time in the loop.
        skipped: Steps left out because of a gradient that was not finite.
        skipped_in_row: The same, since the last good step.
        pending_loss: Sum of losses since the last log line.
        pending_tokens: Trained tokens since the last log line.
        finished: The run is over.
    """

    step: int = 0
    samples: int = 0
    trained_tokens: int = 0
    real_tokens: int = 0
    elapsed_s: float = 0.0
    skipped: int = 0
    skipped_in_row: int = 0
    pending_loss: float = 0.0
    pending_tokens: int = 0
    finished: bool = False


@dataclass
class Window:
    """Measurements since the last log line; not part of a checkpoint."""

    began: float = field(default_factory=time.monotonic)
    samples: int = 0
    real_tokens: int = 0
    padded_tokens: int = 0
    data_wait_s: float = 0.0


def train(recipe: Recipe, parts: Parts | None = None) -> Path:
    """Run a stage, or go on with it from its newest checkpoint.

    Args:
        recipe: The stage.
        parts: A model already in memory; None loads what `recipe.init` names.

    Returns:
        `output_dir/final`, the folder of the trained model.

    Raises:
        PolymodalError: Anything the user can mend: a rule that matches nothing, missing data, another recipe's run in
            `output_dir`, a full disk, a loss that stays NaN.
        SystemExit: 143 or 130 after SIGTERM or Ctrl-C, when the step is done and saved.
    """
    output_dir = Path(recipe.output_dir)
    final = output_dir / "final"
    found = _find_checkpoint(recipe, output_dir)
    over = found is not None and checkpoint.read_state(found)["progress"]["finished"]
    if over and (final / "polymodal.json").is_file():
        say(f"{recipe.name}: finished before, see {final}")
        return final
    if recipe.run.threads is not None:
        torch.set_num_threads(recipe.run.threads)
    accelerator = make_accelerator(recipe)
    world = accelerator.num_processes
    if recipe.batch.global_size % world:
        raise ConfigError(f"batch.global_size {recipe.batch.global_size} is no multiple of {world} processes")
    if recipe.run.max_minutes is not None and world > 1:
        raise ConfigError("run.max_minutes works with one process only: clocks differ; set run.max_steps")

    parts = parts or load_parts(recipe)
    torch.manual_seed(recipe.run.seed)
    groups = policy.apply_policy(parts.model, recipe.train, recipe.lora, recipe.optim)
    policy.check_groups(parts.model, groups)
    parts.model.to(accelerator.device)
    if accelerator.is_main_process:
        say(policy.policy_table(parts.model, groups))
        _make_folder(output_dir)
    accelerator.wait_for_everyone()
    feed = make_feed(recipe, parts, output_dir)
    if recipe.warm_start is not None and found is None:
        align.warm_start(parts.model, parts.tokenizer, feed, recipe.warm_start, recipe.run.seed)
    if recipe.prototypes is not None:
        feed = prototypes.add_samples(feed, parts.model, recipe.prototypes, recipe.run.seed)
    optimizer = policy.make_optimizer(groups, recipe.optim, accelerator.device)
    if accelerator.mixed_precision == "bf16" and not any("llm" in stage.get("trained", ()) for stage in parts.history):
        policy.cast_frozen_linears(parts.model.llm, torch.bfloat16)
    run = Run(recipe, accelerator, parts, groups, optimizer, feed)
    if found is not None:
        run.resume(found)
    if accelerator.is_main_process:
        start_log(output_dir / "log.jsonl", run.state.step)
        write_text(output_dir / "recipe.yaml", dump_recipe(recipe))
        write_text(output_dir / "env.json", json.dumps(environment(accelerator.device), indent=2) + "\n")
    with StopRequest() as stop:
        run.loop(stop)
        if stop.number is not None and not run.state.finished:
            say(f"{recipe.name}: stopped after step {run.state.step}, saved; the same command goes on from here")
            raise SystemExit(stop.exit_code)
    if accelerator.is_main_process:
        draw_curves(output_dir / "log.jsonl", output_dir / "loss.png", recipe.name)
        run.export(final)
    accelerator.wait_for_everyone()
    return final


def make_accelerator(recipe: Recipe) -> Accelerator:
    """Make the accelerator, in the recipe's precision."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    precision = recipe.run.precision
    if precision == "auto":
        precision = "bf16" if has_fast_bf16() else "fp32"
    # The state is one per process; a second stage may ask for another precision than the first.
    AcceleratorState._reset_state()
    return Accelerator(mixed_precision="bf16" if precision == "bf16" else "no")


def has_fast_bf16() -> bool:
    """Whether this machine multiplies bf16 natively; emulated, as on AVX2, it is ten times slower than float32."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    # The public torch.cpu.get_capabilities is not there before 2.12.
    checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(bool(getattr(torch.cpu, name, bool)()) for name in checks)


class Run:
    """One stage in progress.

    Args:
        recipe: The stage.
        accelerator: Devices and precision.
        parts: The model and what comes with it.
        groups: The trained parameters.
        optimizer: Over these groups.
        feed: The data.
    """

    def __init__(
        self,
        recipe: Recipe,
        accelerator: Accelerator,
        parts: Parts,
        groups: list[policy.Group],
        optimizer: torch.optim.AdamW,
        feed: Feed,
    ) -> None:
        self.recipe, self.accelerator, self.parts, self.groups, self.feed = recipe, accelerator, parts, groups, feed
        self.output_dir = Path(recipe.output_dir)
        self.inner = optimizer
        # accelerate wraps both; the inner ones stay the ones that are saved.
        self.model, self.optimizer = accelerator.prepare(parts.model, optimizer)
        self.trained = [parameter for group in groups for _, parameter in group.parameters]
        self.order = Order(feed.prepared.sources, recipe.run.seed)
        steps = max(1, round(recipe.run.epochs * self.order.epoch_size / recipe.batch.global_size))
        self.total = min(steps, recipe.run.max_steps or steps)
        self.state = State()
        self.window = Window()
        self._resumed_from = 0.0
        self._began = time.monotonic()

    def resume(self, folder: Path) -> None:
        """Go on from a checkpoint."""
        stored = checkpoint.read_state(folder)
        if stored["fingerprint"] != self.feed.prepared.fingerprint:
            raise DataError(
                f"{folder}: the data changed since this run began; choose another output_dir or set run.resume=never"
            )
        checkpoint.restore(folder, self.parts.model, self.groups, self.inner)
        self.state = State(**stored["progress"])
        say(f"{self.recipe.name}: going on after step {self.state.step}")

    def loop(self, stop: StopRequest) -> None:
        """Take steps until the run is over or a signal came, then save."""
        state, every = self.state, self.recipe.run.save_every
        if state.finished:
            return
        policy.set_modes(self.model)
        self._began, self._resumed_from = time.monotonic(), state.elapsed_s
        meter = Meter(self.recipe.name, self.total, state.step, "step", self.accelerator.is_main_process)
        batches = self._batches()
        saved = state.step
        self.window = Window()
        try:
            while state.step < self.total and not self._out_of_time() and stop.number is None:
                loss = self._step(batches)
                meter.advance(1, f"loss {loss:.3f}")
                if every and state.step % every == 0 and state.step < self.total:
                    saved = self._save()
        finally:
            batches.close()
            meter.close()
        state.finished = state.step >= self.total or self._out_of_time()
        if state.finished and state.pending_tokens:
            self._log(self._rates(), None, {})
        if state.finished or saved != state.step:
            self._save()

    def _batches(self) -> Generator[Batch, None, None]:
        """All micro-batches of the rest of the run, made a few ahead in threads."""
        plan = (indices for step in range(self.state.step, self.total) for indices in self._micro(step))
        return ahead(self.feed.batch, plan, self.recipe.run.workers)

    def _indices(self, step: int) -> np.ndarray:
        size = self.recipe.batch.global_size
        return self.order.take(step * size, size)

    def _micro(self, step: int) -> list[np.ndarray]:
        batch, accelerator = self.recipe.batch, self.accelerator
        return micro_batches(
            self._indices(step),
            self.feed.prepared.lengths,
            batch.micro_size,
            batch.group_by_length,
            accelerator.process_index,
            accelerator.num_processes,
        )

    def _step(self, batches: Iterator[Batch]) -> float:
        """Take one optimizer step; returns the loss per trained token."""
        state, run, window = self.state, self.recipe.run, self.window
        indices, micro = self._indices(state.step), self._micro(state.step)
        tokens = int(self.feed.prepared.targets[indices].sum())
        world = self.accelerator.num_processes
        logs = (state.step + 1) % run.log_every == 0
        rates = self._rates()
        torch.manual_seed(step_seed(run.seed, state.step, self.accelerator.process_index))
        total: torch.Tensor | float = 0.0
        kinds: dict[str, list[float]] = {}
        for number, members in enumerate(micro):
            waited = time.monotonic()
            batch = next(batches)
            window.data_wait_s += time.monotonic() - waited
            window.padded_tokens += batch.input_ids.numel()
            last = number == len(micro) - 1
            total = total + self._forward_backward(batch, world / tokens, last, members if logs else None, kinds)
        norm = float(self.accelerator.clip_grad_norm_(self.trained, self.recipe.optim.clip or math.inf))
        loss_sum = float(self.accelerator.reduce(torch.as_tensor(total, device=self.accelerator.device)))
        if math.isfinite(norm):
            self.optimizer.step()
            state.skipped_in_row = 0
            state.pending_loss += loss_sum
            state.pending_tokens += tokens
        else:
            self._count_skipped()
        self.optimizer.zero_grad(set_to_none=True)
        real = int(self.feed.prepared.lengths[indices].sum())
        state.step += 1
        state.samples += len(indices)
        state.trained_tokens += tokens
        state.real_tokens += real
        state.elapsed_s = self._elapsed()
        window.samples += len(indices)
        window.real_tokens += real
        if logs:
            self._log(rates, norm, kinds)
        return loss_sum / tokens

    def _forward_backward(
        self,
        batch: Batch,
        scale: float,
        last: bool,
        members: np.ndarray | None,
        kinds: dict[str, list[float]],
    ) -> torch.Tensor:
        """One micro-batch; returns its sum of losses, detached. Gradients are averaged over processes at the last."""
        batch = batch.to(self.accelerator.device)
        with nullcontext() if last else self.accelerator.no_sync(self.model):
            out = self.model(
                batch.input_ids,
                batch.attention_mask,
                batch.labels,
                batch.plans,
                batch.sample_of_image,
                batch.pixel_values,
                batch.features,
            )
            # A micro-batch of text alone has no way to a projector; nothing is to be learnt from it.
            if out.loss_sum.requires_grad:
                self.accelerator.backward(out.loss_sum * scale)
        if members is not None:
            self._add_kinds(batch, out.logits.detach(), out.targets, members, kinds)
        return out.loss_sum.detach()

    def _add_kinds(
        self,
        batch: Batch,
        logits: torch.Tensor,
        targets: torch.Tensor,
        members: np.ndarray,
        kinds: dict[str, list[float]],
    ) -> None:
        """Sum losses and tokens by the records' kind."""
        losses = F.cross_entropy(logits.float(), targets, reduction="none")
        rows = (batch.labels[:, 1:] != -100).nonzero()[:, 0]
        sums = torch.zeros(len(members), device=losses.device).index_add_(0, rows, losses).tolist()
        for index, loss in zip(members, sums, strict=True):
            entry = kinds.setdefault(self.feed.prepared.records[index].kind, [0.0, 0.0])
            entry[0] += loss
            entry[1] += float(self.feed.prepared.targets[index])

    def _rates(self) -> dict[str, float]:
        """Set this step's learning rates; returns them by group."""
        position = float(self.state.step)
        if self.recipe.run.max_minutes is not None:
            position = max(position, self.total * self._elapsed() / (60 * self.recipe.run.max_minutes))
        factor = lr_factor(min(position, self.total - 1e-6), self.total, self.recipe.optim)
        for settings, group in zip(self.inner.param_groups, self.groups, strict=True):
            settings["lr"] = group.learning_rate * factor
        return {group.name: group.learning_rate * factor for group in self.groups}

    def _elapsed(self) -> float:
        return self._resumed_from + time.monotonic() - self._began

    def _out_of_time(self) -> bool:
        minutes = self.recipe.run.max_minutes
        return minutes is not None and self._elapsed() >= 60 * minutes

    def _count_skipped(self) -> None:
        state = self.state
        state.skipped += 1
        state.skipped_in_row += 1
        say(f"{self.recipe.name}: step {state.step + 1}: the gradient is not finite, step left out")
        if state.skipped_in_row >= MAX_SKIPPED:
            raise PolymodalError(
                f"{self.recipe.name}: {MAX_SKIPPED} steps in a row had a gradient that is not finite; lower "
                "optim.learning_rate, or start again from an earlier checkpoint"
            )

    def _log(self, rates: dict[str, float], norm: float | None, kinds: dict[str, list[float]]) -> None:
        state, window = self.state, self.window
        if not self.accelerator.is_main_process:
            return
        world = self.accelerator.num_processes
        spent = max(1e-9, time.monotonic() - window.began)
        seen = world * window.padded_tokens
        line = {
            "step": state.step,
            "epoch": round(state.samples / self.order.epoch_size, 4),
            "samples": state.samples,
            "trained_tokens": state.trained_tokens,
            "real_tokens": state.real_tokens,
            "loss": state.pending_loss / state.pending_tokens if state.pending_tokens else None,
            "loss_by_kind": {kind: loss / count for kind, (loss, count) in sorted(kinds.items())},
            "learning_rate": rates,
            "grad_norm": norm if norm is not None and math.isfinite(norm) else None,
            "tokens_per_s": round(window.real_tokens / spent, 2),
            "samples_per_s": round(window.samples / spent, 3),
            "padding": round(1 - window.real_tokens / seen, 4) if seen else None,
            "data_wait_s": round(window.data_wait_s, 3),
            "elapsed_s": round(state.elapsed_s, 2),
            "skipped": state.skipped,
        }
        append_log(self.output_dir / "log.jsonl", line)
        state.pending_loss, state.pending_tokens = 0.0, 0
        self.window = Window()

    def _save(self) -> int:
        """Write a checkpoint; returns its step."""
        if self.accelerator.is_main_process:
            state = {
                "step": self.state.step,
                "progress": asdict(self.state),
                "fingerprint": self.feed.prepared.fingerprint,
                "recipe": identity(self.recipe),
            }
            checkpoint.save_checkpoint(
                self.output_dir, state, self.parts.model, self.groups, self.inner, self.recipe.run.keep
            )
        self.accelerator.wait_for_everyone()
        return self.state.step

    def export(self, final: Path) -> None:
        """Write the trained model."""
        from polymodal.checkpoints.folder import save_model

        parts = self.parts
        names = [name for group in self.groups for name, _ in group.parameters]
        trained = sorted({"lora" if policy.LORA_MARK in name else name.split(".")[0] for name in names})
        lines = [line for line in read_log(self.output_dir / "log.jsonl") if line["loss"] is not None]
        stage = {
            "stage": self.recipe.name,
            "trained": trained,
            "steps": self.state.step,
            "samples": self.state.samples,
            "trained_tokens": self.state.trained_tokens,
            "loss": lines[-1]["loss"] if lines else None,
            "recipe": identity(self.recipe),
        }
        history = [*parts.history, stage]
        ever = {name for entry in history for name in entry.get("trained", ())}
        parts.model.eval()
        save_model(
            final,
            parts.model,
            parts.config,
            parts.tokenizer,
            history=history,
            llm_trained="llm" in ever,
            vision_trained="vision_encoder" in ever,
            replace=True,
        )
        say(f"{self.recipe.name}: done, {final}")


def step_seed(seed: int, step: int, rank: int) -> int:
    """One seed for dropout of each step and process, so that a resumed step draws the same numbers."""
    return int(np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0] >> 1)


def identity(recipe: Recipe) -> dict[str, Any]:
    """What of a recipe decides the result; the rest may change between a run and its resumption."""
    plain: dict[str, Any] = json.loads(recipe.model_dump_json(by_alias=True, exclude={"output_dir"}))
    for key in ("log_every", "save_every", "keep", "resume", "threads", "workers", "feature_cache"):
        del plain["run"][key]
    del plain["batch"]["micro_size"]
    return plain


def _find_checkpoint(recipe: Recipe, output_dir: Path) -> Path | None:
    """The checkpoint to go on from; clears the folder for a new start."""
    checkpoint.remove_leftovers(output_dir)
    if recipe.run.resume == "never":
        shutil.rmtree(output_dir / "checkpoints", ignore_errors=True)
        return None
    found = checkpoint.complete_checkpoints(output_dir)
    if not found:
        return None
    before, now = checkpoint.read_state(found[-1])["recipe"], identity(recipe)
    if before != now:
        section = next(key for key in sorted(before.keys() | now.keys()) if before.get(key) != now.get(key))
        raise ConfigError(
            f"{output_dir} holds a run of another recipe (`{section}` differs); choose another output_dir, or set "
            "run.resume=never to start anew there"
        )
    return found[-1]


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise PolymodalError(f"output_dir {folder}: cannot be made ({error.strerror or error})") from error
