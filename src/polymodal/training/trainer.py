"""The training loop: one optimizer step after the other, exact under accumulation, resume and crash.

The loss of a step is the sum of token losses divided by the step's count of trained tokens over all processes, never
a mean of means, so accumulation gives the gradient of the large batch. That count is known beforehand, since all data
are tokenised first. The Trainer of `transformers` averages per batch, saves in place and hides the order of the data;
`training.distributed` is all that differs between one device and many.
"""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import numpy as np
import torch

from polymodal.errors import DataError, PolymodalError
from polymodal.processing.collate import Batch
from polymodal.training import checkpoint
from polymodal.training import optimizer as policy
from polymodal.training.checkpoint import identity
from polymodal.training.distributed import Engine
from polymodal.training.lr_schedule import lr_factor
from polymodal.training.recipes.load import AnyRecipe
from polymodal.training.reporting.log import Tracker, append_log, numbers_of
from polymodal.training.reporting.loss_by_kind import Tally, means, merge
from polymodal.training.sft.packing import plan_micro
from polymodal.training.steps import Steps
from polymodal.utils.progress import Meter, log
from polymodal.utils.threads import ahead

# ---- SIGTERM and Ctrl-C: finish the step, save, exit with 128 + the signal's number (143, 130) ----


class StopRequest:
    """Remembers the first signal; a second one acts at once, as it would without us."""

    def __init__(self) -> None:
        self.number: int | None = None
        self._before: dict[int, Any] = {}

    @property
    def exit_code(self) -> int:
        """The shell's code for a process that a signal ended."""
        return 128 + (self.number or 0)

    def __enter__(self) -> StopRequest:
        """Take over both signals; only the main thread may."""
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._remember)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Give the signals back."""
        self._give_back()

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.number = number
        self._give_back()

    def _give_back(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}


# ---- Where a run is: what a checkpoint keeps of it, and what is only measured between two log lines ----


@dataclass
class State:
    """Where a run is; plain numbers, stored in each checkpoint."""

    step: int = 0  # Optimizer steps done
    samples: int = 0  # Samples seen
    trained_tokens: int = 0  # Tokens with a label seen
    real_tokens: int = 0  # Tokens seen, padding not counted
    elapsed_s: float = 0.0  # Time in the loop, by the first process's clock
    skipped: int = 0  # Steps left out because of a gradient that was not finite
    skipped_in_row: int = 0  # The same, since the last good step
    pending_loss: float = 0.0  # Sum of losses since the last log line
    pending_tokens: int = 0  # Trained tokens since the last log line
    finished: bool = False  # The run is over


@dataclass
class Window:
    """Measurements since the last log line; not part of a checkpoint."""

    began: float = field(default_factory=time.monotonic)
    samples: int = 0
    real_tokens: int = 0
    padded_tokens: int = 0
    data_wait_s: float = 0.0


MAX_SKIPPED = 5
"""Steps in a row whose gradient may be NaN or infinite before the run is given up."""

MEDIA_PARTS = ("vision_encoder.", "projector.", "image_newline")

NamedBatch = tuple[Batch, list[str], list[str]]
"""A batch with the kind and the source of each target."""


class Run:
    """One stage in progress; `pairs.run.PairRun` takes its steps in another way, and is the same in all else."""

    tallied = ("loss_by_kind", "loss_by_source")

    def __init__(
        self,
        recipe: AnyRecipe,
        engine: Engine,
        feed: Any,
        steps: Steps,
        evaluation: Callable[[Engine, int], dict[str, Any]] | None = None,
        trackers: Sequence[Tracker] = (),
    ) -> None:
        self.recipe: Any = recipe
        self.engine, self.feed, self.steps = engine, feed, steps
        self.world, self.evaluation, self.trackers = engine.world, evaluation, trackers
        self.output_dir = Path(recipe.output_dir)
        self.total = total_steps(recipe, steps)
        self.trains_media = any(name.startswith(MEDIA_PARTS) for group in engine.groups for name, _ in group.parameters)
        self.state, self.tally, self.window = State(), Tally(), Window()
        self.stopped: int | None = None
        self._resumed_from = 0.0
        self._began = time.monotonic()

    def resume(self, folder: Path, force: bool = False) -> None:
        """Go on from a checkpoint."""
        stored = checkpoint.read_state(folder)
        if stored["fingerprint"] != self.feed.prepared.fingerprint:
            if not force:
                raise DataError(
                    f"{folder}: the data changed since this run began; choose another output_dir, go on all the same "
                    "with --force, or set run.resume=never"
                )
            log(f"{self.recipe.name}: the data changed since this run began; going on, as asked")
        self.engine.restore(folder)
        self.state = State(**stored["progress"])
        # A run that was over goes on where its recipe was changed, by force, to take more steps.
        self.state.finished = self.state.finished and (self.state.step >= self.total or not force)
        self._take_tallies(stored.get("tallies", []))
        log(f"{self.recipe.name}: going on after step {self.state.step}")

    def _take_tallies(self, tallies: list[dict[str, Any]]) -> None:
        """Each process takes its own sums; where their number changed, the first one takes all."""
        if len(tallies) == self.world.size:
            self.tally = Tally(**tallies[self.world.rank])
        elif self.world.is_main:
            self.tally = Tally(*(merge(part[name] for part in tallies) for name in ("kinds", "sources")))

    def loop(self, stop: StopRequest) -> None:
        """Take steps until the run is over or a signal came, then save."""
        state, run = self.state, self.recipe.run
        if state.finished:
            return
        policy.set_modes(self.engine.inner)
        self._began, self._resumed_from = time.monotonic(), state.elapsed_s
        meter = Meter(self.recipe.name, self.total, state.step, "step", self.world.is_main)
        batches = self._batches()
        saved = state.step
        self.window = Window()
        try:
            while state.step < self.total and not self._out_of_time() and self.stopped is None:
                loss = self._step(batches, stop)
                meter.advance(1, f"loss {loss:.3f}")
                if state.step < self.total:
                    if run.eval_every and state.step % run.eval_every == 0:
                        self._evaluate()
                    if run.save_every and state.step % run.save_every == 0:
                        saved = self._save()
                if self.world.size == 1:
                    self.stopped = stop.number
        finally:
            batches.close()
            meter.close()
        state.finished = state.step >= self.total or self._out_of_time()
        if state.finished:
            if state.pending_tokens:
                self._log(self._rates(), None)
            self._evaluate()
        if state.finished or saved != state.step:
            self._save()

    def _batches(self) -> Generator[Any, None, None]:
        """All micro-batches of the rest of the run, made a few ahead in threads."""
        plan = (indices for step in range(self.state.step, self.total) for indices in self._micro(step))
        return ahead(self.feed.named_batch, plan, self.recipe.run.workers)

    def _micro(self, step: int) -> list[np.ndarray]:
        """This process's micro-batches of a step."""
        lengths = self.feed.prepared.lengths
        return plan_micro(self.steps.indices(step), lengths, self.recipe.batch, self.world.rank, self.world.size)

    def _step(self, batches: Iterator[Any], stop: StopRequest | None = None) -> float:
        """Take one optimizer step; returns the loss per trained token."""
        state, run, window = self.state, self.recipe.run, self.window
        indices = self.steps.indices(state.step)
        tokens, real = self._sizes(indices)
        rates = self._rates()
        torch.manual_seed(step_seed(run.seed, state.step, self.world.rank))
        total = self._gradients(batches, tokens)
        norm = self.engine.step()
        number = stop.number if stop is not None and stop.number is not None else 0
        clock = self._elapsed() if self.world.is_main else 0.0
        loss_sum, state.elapsed_s, signals, askers = self.world.sum([float(total), clock, number, number > 0])
        if askers and self.world.size > 1:
            self.stopped = round(signals / askers)
        if math.isfinite(norm):
            state.skipped_in_row = 0
            state.pending_loss += loss_sum
            state.pending_tokens += tokens
        else:
            self._count_skipped()
        state.step += 1
        state.samples += len(indices)
        state.trained_tokens += tokens
        state.real_tokens += real
        window.samples += len(indices)
        window.real_tokens += real
        if state.step % run.log_every == 0:
            self._log(rates, norm)
        return loss_sum / tokens

    def _sizes(self, indices: np.ndarray) -> tuple[int, int]:
        """Trained tokens of a step, by which its loss is divided, and all of its tokens."""
        prepared = self.feed.prepared
        return int(prepared.targets[indices].sum()), int(prepared.lengths[indices].sum())

    def _gradients(self, batches: Iterator[Any], tokens: int) -> torch.Tensor | float:
        """Run the step's micro-batches, and leave its gradient."""
        window, micro = self.window, len(self._micro(self.state.step))
        total: torch.Tensor | float = 0.0
        seen_media = False
        for number in range(micro):
            waited = time.monotonic()
            batch, kinds, sources = next(batches)
            window.data_wait_s += time.monotonic() - waited
            window.padded_tokens += batch.input_ids.numel()
            seen_media |= bool(batch.plans)
            last = number == micro - 1
            # Every process must take part in every collective, and a step of text alone must leave the same gradients,
            # zero, whether one process takes it or several.
            touch = self.world.size > 1 or (self.trains_media and last and not seen_media)
            total = total + self._forward_backward(batch, self.world.size / tokens, last, touch, kinds, sources)
        return total

    def _forward_backward(
        self, batch: Batch, scale: float, last: bool, touch: bool, kinds: list[str], sources: list[str]
    ) -> torch.Tensor:
        """One micro-batch; returns its sum of losses, detached. Gradients are averaged over processes at the last."""
        out = self.engine.forward(batch.to(self.world.device), touch, last)
        assert out.loss_sum is not None and out.losses is not None
        # A micro-batch of text alone has no way to a projector; nothing is to be learnt from it.
        if out.loss_sum.requires_grad:
            self.engine.backward(out.loss_sum * scale)
        self.tally.add(out.losses, kinds, sources)
        return out.loss_sum.detach()

    def _rates(self) -> dict[str, float]:
        """Set this step's learning rates; returns them by group."""
        position = float(self.state.step)
        if self.recipe.run.max_minutes is not None:
            position = max(position, self.total * self.state.elapsed_s / (60 * self.recipe.run.max_minutes))
        factor = lr_factor(min(position, self.total - 1e-6), self.total, self.recipe.optim)
        for settings, group in zip(self.engine.optimizer.param_groups, self.engine.groups, strict=True):
            settings["lr"] = group.learning_rate * factor
        return {group.name: group.learning_rate * factor for group in self.engine.groups}

    def _elapsed(self) -> float:
        return self._resumed_from + time.monotonic() - self._began

    def _out_of_time(self) -> bool:
        minutes = self.recipe.run.max_minutes
        return minutes is not None and self.state.elapsed_s >= 60 * minutes

    def _count_skipped(self) -> None:
        state = self.state
        state.skipped += 1
        state.skipped_in_row += 1
        log(f"{self.recipe.name}: step {state.step + 1}: the gradient is not finite, step left out")
        if state.skipped_in_row >= MAX_SKIPPED:
            raise PolymodalError(
                f"{self.recipe.name}: {MAX_SKIPPED} steps in a row had a gradient that is not finite; lower "
                "optim.learning_rate, or start again from an earlier checkpoint"
            )

    def _tallies(self) -> list[dict[str, Any]]:
        """The sums of all processes, by rank."""
        self.tally.fold()
        return self.world.gather({"kinds": self.tally.kinds, "sources": self.tally.sources})

    def _log(self, rates: dict[str, float], norm: float | None) -> None:
        state, window, size = self.state, self.window, self.world.size
        tallies = self._tallies()
        spent = max(1e-9, time.monotonic() - window.began)
        seen = size * window.padded_tokens
        line = {
            "step": state.step,
            "epoch": round(state.samples / self.steps.order.epoch_size, 4),
            "samples": state.samples,
            "trained_tokens": state.trained_tokens,
            "real_tokens": state.real_tokens,
            "loss": state.pending_loss / state.pending_tokens if state.pending_tokens else None,
            self.tallied[0]: means(merge(tally["kinds"] for tally in tallies)),
            self.tallied[1]: means(merge(tally["sources"] for tally in tallies)),
            "learning_rate": rates,
            "grad_norm": norm if norm is not None and math.isfinite(norm) else None,
            "tokens_per_s": round(window.real_tokens / spent, 2),
            "samples_per_s": round(window.samples / spent, 3),
            "padding": round(1 - window.real_tokens / seen, 4) if seen else None,
            "data_wait_s": round(window.data_wait_s, 3),
            "elapsed_s": round(state.elapsed_s, 2),
            "skipped": state.skipped,
        }
        if self.world.is_main:
            append_log(self.output_dir / "log.jsonl", line)
            self._track("train", line)
        state.pending_loss, state.pending_tokens = 0.0, 0
        self.tally.clear()
        self.window = Window()

    def _evaluate(self) -> None:
        """Score the held-out data; the clock of the training rate stands still."""
        if self.evaluation is None:
            return
        began = time.monotonic()
        line = self.evaluation(self.engine, self.state.step)
        if self.world.is_main:
            append_log(self.output_dir / "eval.jsonl", line)
            self._track("eval", line)
        policy.set_modes(self.engine.inner)
        self.window.began += time.monotonic() - began

    def _track(self, prefix: str, line: dict[str, Any]) -> None:
        for tracker in self.trackers:
            tracker.write(self.state.step, numbers_of(line, prefix))

    def _save(self) -> int:
        """Write a checkpoint; returns its step."""
        state = {
            "step": self.state.step,
            "progress": asdict(self.state),
            "tallies": self._tallies(),
            "fingerprint": self.feed.prepared.fingerprint,
            "recipe": identity(self.recipe),
            "world": self.world.size,
        }
        self.engine.save(self.output_dir, state, self.recipe.run.keep)
        return self.state.step


def total_steps(recipe: AnyRecipe, steps: Steps) -> int:
    """Optimizer steps of a run."""
    total = steps.total(recipe.run.epochs)
    return min(total, recipe.run.max_steps or total)


def step_seed(seed: int, step: int, rank: int) -> int:
    """One seed for dropout of each step and process, so that a resumed step draws the same numbers."""
    return int(np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0] >> 1)
