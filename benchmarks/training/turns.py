"""Interleaving: every system lives in a process of its own and is stopped while another one takes its turn.

A turn is a number of whole optimizer steps. The clock is the same for all: a hook that torch calls after every
optimizer step, and a hook before the model's forward, where the process stops itself (SIGSTOP, so that no thread of
it reads ahead while others are measured) until the parent lets it go on. Tokens are counted in the same hook, from the
batch that the model is really given.
"""

from __future__ import annotations

import inspect
import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from benchmarks.training.setting import Job

COUNTS = ("samples", "real_tokens", "trained_tokens", "slots")


class Done(BaseException):
    """The last turn is over; no Trainer catches this."""


class Clock:
    """The worker's side.

    Args:
        job: How many steps and turns.

    Attributes:
        first_loss: Reads the loss of the first step from the system's own log.
    """

    def __init__(self, job: Job) -> None:
        self.job = job
        self.first_loss: Callable[[], float] = lambda: float("nan")
        self._steps = self._turn = 0
        self._began_setup = time.perf_counter()
        self._setup_s: float | None = None
        self._names: list[str] = []
        self._pad_id = -1
        self._restart()
        register_optimizer_step_post_hook(self._after_step)

    def watch(self, model: torch.nn.Module, pad_id: int) -> None:
        """Begin set-up, and count the batches that are given to this model.

        Args:
            model: The one that training calls.
            pad_id: Stands for nothing else in the rows, so that padding is seen whatever mask comes with it.
        """
        self._pad_id = pad_id
        self._names = list(inspect.signature(type(model).forward).parameters)[1:]
        model.register_forward_pre_hook(self._before_forward, with_kwargs=True)
        self._began_setup = time.perf_counter()

    def _restart(self) -> None:
        self._began, self._began_cpu = time.perf_counter(), time.process_time()
        self._counts: dict[str, Any] = dict.fromkeys(COUNTS, 0)

    def _after_step(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        # accelerate's wrapper calls the optimizer inside it: count that one only.
        self._steps += isinstance(optimizer, torch.optim.AdamW)

    def _before_forward(self, _model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._setup_s is None:
            self._setup_s = time.perf_counter() - self._began_setup
            self._restart()
        if self._steps == self.job.steps:
            self._end_turn()
        given = {**dict(zip(self._names, args)), **kwargs}
        labels, input_ids = given["labels"], given["input_ids"]
        segments = given.get("segments")
        self._counts["samples"] += len(labels) if segments is None else len(segments)
        # Tensors until the turn is over: reading them now would make a GPU wait in every micro-batch.
        self._counts["trained_tokens"] += (labels[:, 1:] != -100).sum()
        self._counts["real_tokens"] += (input_ids != self._pad_id).sum()
        self._counts["slots"] += labels.numel()

    def _end_turn(self) -> None:
        if self.job.device == "cuda":
            torch.cuda.synchronize()
        line = {
            "turn": self._turn,
            "wall_s": time.perf_counter() - self._began,
            "cpu_s": time.process_time() - self._began_cpu,
            **{name: int(count) for name, count in self._counts.items()},
            "setup_s": self._setup_s,
            "first_loss": self.first_loss(),
            "peak_bytes": peak_bytes(self.job.device),
        }
        with self.job.events.open("a") as file:
            file.write(json.dumps(line) + "\n")
        if self._turn == self.job.runs:
            raise Done
        self._turn += 1
        self._steps = 0
        os.kill(os.getpid(), signal.SIGSTOP)
        self._restart()


def peak_bytes(device: str) -> int:
    """The most memory this process has had: resident, or on the GPU."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


class Worker:
    """The parent's side of one process.

    Args:
        job: What it runs.
    """

    def __init__(self, job: Job) -> None:
        self.job = job
        folder = Path(job.folder)
        folder.mkdir(parents=True, exist_ok=True)
        self._log = folder / "worker.log"
        threads = str(job.threads)
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": threads,
            "MKL_NUM_THREADS": threads,
            "TOKENIZERS_PARALLELISM": "false",
            "HF_HUB_OFFLINE": "1",
            "HF_DATASETS_CACHE": str(folder / "datasets"),
        }
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.training.worker", job.dump()],
                cwd=Path(__file__).resolve().parents[2],
                env=environment,
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def turn(self) -> dict[str, Any]:
        """Let it take one turn (the first one is set-up and warm-up) and stop again.

        Returns:
            What it measured.

        Raises:
            RuntimeError: It failed; the end of its log is in the message.
        """
        self._process.send_signal(signal.SIGCONT)
        _, status = os.waitpid(self._process.pid, os.WUNTRACED)
        if not os.WIFSTOPPED(status):
            self._process.returncode = os.waitstatus_to_exitcode(status)
        if self._process.returncode:
            tail = "\n".join(self._log.read_text(errors="replace").splitlines()[-15:])
            raise RuntimeError(f"{self.job.system} ({self.job.mode}) ended with {self._process.returncode}:\n{tail}")
        lines = self.job.events.read_text().splitlines()
        found: dict[str, Any] = json.loads(lines[-1])
        return found

    def kill(self) -> None:
        """End it, stopped or not."""
        if self._process.returncode is None:
            self._process.kill()
            self._process.wait()
