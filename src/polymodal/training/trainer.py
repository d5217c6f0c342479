"""The trainer: one optimizer step after the other, exact under accumulation, resume and crash, whatever the task.

The loss of a step is the sum of its losses divided by the step's count of targets over all processes, never a mean of
means, so accumulation gives the gradient of the large batch. That count is known beforehand, since all data are
tokenised first. The Trainer of `transformers` averages per batch, saves in place and hides the order of the data;
`training.distributed` is all that differs between one device and many.
"""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Generator, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from polymodal.errors import DataError, MediaError, PolymodalError, first_line
from polymodal.training.checkpoint import State, identity, read_state
from polymodal.training.distributed import Engine
from polymodal.training.optimizer import lr_factor, set_modes
from polymodal.training.reporting.log import LossByKind, Tracker, append_log, finite, means, merge, numbers_of, told
from polymodal.training.steps import step_seed
from polymodal.training.task import Task
from polymodal.utils.devices import peak_memory
from polymodal.utils.progress import Meter, log
from polymodal.utils.threads import ahead

MAX_SKIPPED = 5
"""Steps in a row whose gradient may be NaN or infinite before the run is given up."""

NAMED = 5
"""Records that a message about a step names at most."""

SHOWN = 60
"""Characters of a question or an answer on the terminal."""


class StopRequest:
    """Remembers the first SIGTERM or Ctrl-C; a second one acts at once, as it would without us."""

    def __init__(self) -> None:
        self.number: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        """Take over both signals; only the main thread may."""
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._remember)
        return self

    def __exit__(self, *_: object) -> None:
        """Give the signals back."""
        self._give_back()

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.number = number
        self._give_back()

    def _give_back(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}


@dataclass
class Window:
    """Measurements since the last log line; not part of a checkpoint."""

    began: float = field(default_factory=time.monotonic)
    samples: int = 0
    real_tokens: int = 0
    padded_tokens: int = 0
    data_wait_s: float = 0.0


class Trainer:
    """One stage in progress."""

    def __init__(self, task: Task, engine: Engine, trackers: Sequence[Tracker] = ()) -> None:
        self.task, self.engine, self.trackers = task, engine, trackers
        self.recipe, self.world = task.recipe, engine.world
        self.output_dir = Path(task.recipe.output_dir)
        self.total = task.total_steps
        self.state, self.losses, self.window = State(), LossByKind(), Window()
        self.stopped: int | None = None  # The signal that ended the loop
        self._resumed_from = 0.0
        self._lost = 0  # Targets of this step's micro-batches that turned out unreadable
        self._began = time.monotonic()

    def resume(self, folder: Path, force: bool = False) -> None:
        """Go on from a checkpoint."""
        stored = read_state(folder)
        if stored["fingerprint"] != self.task.fingerprint:
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
        sums = stored.get("tallies", [])
        # Each process takes its own sums; where their number changed, the first one takes all.
        if len(sums) == self.world.size:
            self.losses = LossByKind(**sums[self.world.rank])
        elif self.world.is_main:
            self.losses = LossByKind(*(merge(own[name] for own in sums) for name in ("kinds", "sources")))
        log(f"{self.recipe.name}: going on after step {self.state.step}")

    def loop(self, stop: StopRequest) -> None:
        """Take steps until the run is over or a signal came, then save."""
        state, run = self.state, self.recipe.run
        if state.finished:
            return
        set_modes(self.engine.inner)
        self._began, self._resumed_from = time.monotonic(), state.elapsed_s
        meter = Meter(self.recipe.name, self.total, state.step, "step", self.world.is_main)
        batches = self.batches()
        saved = state.step
        self.window = Window()
        try:
            while state.step < self.total and not self._out_of_time() and self.stopped is None:
                loss = self.step(batches, stop)
                meter.advance(1, f"loss {loss:.3f}")
                if state.step < self.total:
                    if run.eval_every and state.step % run.eval_every == 0:
                        self._evaluate()
                    if run.save_every and state.step % run.save_every == 0:
                        saved = self.save()
                if self.world.size == 1:
                    self.stopped = stop.number
        except (DataError, MediaError) as error:
            # Of several processes only one knows; the others cannot take part in saving.
            if self.world.size > 1 or state.step == saved:
                raise
            step = self.save()
            raise type(error)(
                f"{error}; saved after step {step}: mend it and run the same command to go on", error.code
            ) from error
        finally:
            batches.close()
            meter.close()
        state.finished = state.step >= self.total or self._out_of_time()
        if state.finished:
            if state.pending_tokens:
                self._log(self._rates(), None)
            self._evaluate()
        if state.finished or saved != state.step:
            self.save()

    def batches(self) -> Generator[Any, None, None]:
        """All micro-batches of the rest of the run, made a few ahead in threads."""
        plans = (self.task.plan(step) for step in range(self.state.step, self.total))
        return ahead(self.task.load, (micro for plan in plans for micro in plan.micro), self.recipe.run.workers)

    def step(self, batches: Iterator[Any], stop: StopRequest | None = None) -> float:
        """Take one optimizer step; returns its loss per target."""
        state, window, run = self.state, self.window, self.recipe.run
        plan = self.task.plan(state.step)
        rates = self._rates()
        torch.manual_seed(step_seed(run.seed, state.step, self.world.rank))
        self._lost, losses = 0, LossByKind()
        total = self.task.backward(self.engine, plan, self._take(batches, len(plan.micro)), losses)
        number = stop.number if stop is not None and stop.number is not None else 0
        clock = self._resumed_from + time.monotonic() - self._began if self.world.is_main else 0.0
        loss_sum, lost, state.elapsed_s, signals, askers = self.world.sum(
            [float(total), self._lost, clock, number, number > 0]
        )
        if askers and self.world.size > 1:
            self.stopped = round(signals / askers)
        targets = plan.targets - round(lost)
        usable = targets > 0 and math.isfinite(loss_sum)
        norm = self.engine.step(plan.targets / targets if usable else math.nan)
        self.task.after_step()
        if usable and math.isfinite(norm):
            state.skipped_in_row = 0
            state.pending_loss += loss_sum
            state.pending_tokens += targets
            self.losses.take(losses)
        else:
            self._count_skipped("gradient" if usable else "loss", losses)
        state.step += 1
        state.samples += plan.samples
        state.trained_tokens += targets
        state.real_tokens += plan.tokens
        window.samples += plan.samples
        window.real_tokens += plan.tokens
        if state.step % run.log_every == 0:
            self._log(rates, norm)
        return loss_sum / max(1, targets)

    def _take(self, batches: Iterator[Any], count: int) -> Iterator[Any]:
        """The next micro-batches, with the time that they are waited for."""
        for _ in range(count):
            began = time.monotonic()
            batch = next(batches)
            self.window.data_wait_s += time.monotonic() - began
            self.window.padded_tokens += self.task.padded_tokens(batch)
            self._lost += self.task.lost_targets(batch)
            yield batch

    def _rates(self) -> dict[str, float]:
        """Set this step's learning rates; returns them by group."""
        position = float(self.state.step)
        if self.recipe.run.max_minutes is not None:
            position = max(position, self.total * self.state.elapsed_s / (60 * self.recipe.run.max_minutes))
        factor = lr_factor(min(position, self.total - 1e-6), self.total, self.recipe.optim)
        for settings, group in zip(self.engine.optimizer.param_groups, self.engine.groups, strict=True):
            settings["lr"] = group.learning_rate * factor
        return {group.name: group.learning_rate * factor for group in self.engine.groups}

    def _out_of_time(self) -> bool:
        minutes = self.recipe.run.max_minutes
        return minutes is not None and self.state.elapsed_s >= 60 * minutes

    def _count_skipped(self, what: str, losses: LossByKind) -> None:
        state = self.state
        state.skipped += 1
        state.skipped_in_row += 1
        found = [name for own in self.world.gather(losses.not_finite()) for name in own]
        names = f" (of {', '.join(found[:NAMED])}{', ...' * (len(found) > NAMED)})" if found else ""
        log(f"{self.recipe.name}: step {state.step + 1}: the {what} is not finite{names}, step left out")
        if state.skipped_in_row >= MAX_SKIPPED:
            raise PolymodalError(
                f"{self.recipe.name}: {MAX_SKIPPED} steps in a row had a {what} that is not finite{names}; lower "
                "optim.learning_rate, or start again from an earlier checkpoint"
            )

    def _gather_losses(self) -> list[dict[str, Any]]:
        """The sums of all processes, by rank."""
        self.losses.fold()
        return self.world.gather({"kinds": self.losses.kinds, "sources": self.losses.sources})

    def _log(self, rates: dict[str, float], norm: float | None) -> None:
        state, window, size = self.state, self.window, self.world.size
        losses = self._gather_losses()
        spent = max(1e-9, time.monotonic() - window.began)
        seen = size * window.padded_tokens
        kinds, sources = self.task.log_keys
        line = {
            "step": state.step,
            "epoch": round(state.samples / self.task.steps.order.epoch_size, 4),
            "samples": state.samples,
            "trained_tokens": state.trained_tokens,
            "real_tokens": state.real_tokens,
            "loss": state.pending_loss / state.pending_tokens if state.pending_tokens else None,
            kinds: means(merge(own["kinds"] for own in losses)),
            sources: means(merge(own["sources"] for own in losses)),
            "learning_rate": rates,
            "grad_norm": norm if norm is not None and math.isfinite(norm) else None,
            "tokens_per_s": round(window.real_tokens / spent, 2),
            "samples_per_s": round(window.samples / spent, 3),
            "padding": round(1 - window.real_tokens / seen, 4) if seen else None,
            "data_wait_s": round(window.data_wait_s, 3),
            "elapsed_s": round(state.elapsed_s, 2),
            "skipped": state.skipped,
            "peak_memory_gib": None if (peak := peak_memory()) is None else round(peak / 2**30, 3),
        }
        self._write("train", "log.jsonl", line)
        state.pending_loss, state.pending_tokens = 0.0, 0
        self.losses.clear()
        self.window = Window()

    def _evaluate(self) -> None:
        """Score the held-out data; the clock of the training rate stands still."""
        began = time.monotonic()
        line = self.task.evaluate(self.engine, self.state.step)
        if line is None:
            return
        self._write("eval", "eval.jsonl", line)
        self._show(line)
        set_modes(self.engine.inner)
        self.window.began += time.monotonic() - began

    def _write(self, prefix: str, name: str, line: dict[str, Any]) -> None:
        if self.world.is_main:
            line = finite(line)
            append_log(self.output_dir / name, line)
            for tracker in self.trackers:
                tracker.write(self.state.step, numbers_of(line, prefix))

    def _show(self, line: dict[str, Any]) -> None:
        """Say on the terminal how an evaluation went, and give the trackers its answers."""
        for text in told(line) if self.world.is_main else ():
            log(f"{self.recipe.name}: {text}")
        for tracker in self.trackers if line.get("answers") else ():
            try:
                tracker.show(self.state.step, line["answers"], self.output_dir)
            except Exception as error:  # an image that went away, a tracker of another version: the run goes on
                log(f"{self.recipe.name}: a tracker shows no answers: {first_line(error)}")

    def save(self) -> int:
        """Write a checkpoint; returns its step."""
        state = {
            "step": self.state.step,
            "progress": asdict(self.state),
            "tallies": self._gather_losses(),
            "fingerprint": self.task.fingerprint,
            "recipe": identity(self.recipe),
            "world": self.world.size,
        }
        self.engine.save(self.output_dir, state, self.recipe.run.keep)
        return self.state.step
