"""Trains recipes, with one process or several, and kills processes at the moments it is told; a script of tests.

The libraries are imported once; every process is a forked child, a real process that takes no time to start. A moment
is one of

    ["clock", step, ms]   so many milliseconds after the child's n-th step began, wherever it is then
    ["stop", step]        the same, but it only stops (SIGSTOP), as a process that hangs
    ["file", n]           at the child's n-th operation on a file in the run's folder (open, rename, make, remove)
    ["half", name]        while a checkpoint's file of that name is half written
    null                  never

Usage: run_driver.py JOBS.json, a list of {"recipe", "order", "moments": [one a process], "force"}; prints a list of
[exit statuses by rank, last lines of stderr by rank, seconds].
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch

from polymodal.training import train
from polymodal.training.process_group import leave_world
from polymodal.training.recipes.load import load_any_recipe
from polymodal.training.sft.task import SFTTask
from polymodal.training.trainer import Trainer

TIMEOUT_S = 120
"""A process that takes longer hangs, and is ended by a signal."""

FILE_EVENTS = {"open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.truncate"}


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def at_step(step: int, act: Callable[[], Any]) -> None:
    inner, begun = Trainer.step, [0]

    def counted(run: Trainer, *rest: Any) -> float:
        begun[0] += 1
        if begun[0] == step:
            threading.Thread(target=act, daemon=True).start()
        return inner(run, *rest)

    Trainer.step = counted  # type: ignore[method-assign]


def die_by_file(number: int, folder: str) -> None:
    seen = [0]

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event in FILE_EVENTS and arguments and str(arguments[0]).startswith(folder):
            seen[0] += 1
            if seen[0] == number:
                die()

    sys.addaudithook(hook)


def die_half_written(name: str) -> None:
    inner = safetensors.torch.save_file

    def half(tensors: Any, path: Path, *rest: Any, **kwargs: Any) -> None:
        inner(tensors, path, *rest, **kwargs)
        if Path(path).name == name:
            os.truncate(path, Path(path).stat().st_size // 2)
            die()

    safetensors.torch.save_file = half


def record_order(path: Path) -> None:
    """Append the ids of each micro-batch, with its step, when it goes through the model."""
    backward, forward_backward = SFTTask.backward, SFTTask.forward_backward
    at = [0]

    def counted(task: SFTTask, engine: Any, plan: Any, *rest: Any) -> Any:
        at[0] = plan.step
        return backward(task, engine, plan, *rest)

    def recorded(task: SFTTask, engine: Any, named: Any, *rest: Any) -> Any:
        with path.open("a") as file:
            file.write(json.dumps([at[0], list(named.batch.ids)]) + "\n")
        return forward_backward(task, engine, named, *rest)

    SFTTask.backward = counted  # type: ignore[method-assign]
    SFTTask.forward_backward = recorded  # type: ignore[method-assign]


def child(job: dict[str, Any], rank: int, port: int) -> None:
    """Train in this process, and end it."""
    signal.alarm(TIMEOUT_S)
    if len(job["moments"]) > 1:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(len(job["moments"])))
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    sys.stderr = open(f"{job['order']}.{rank}.err", "w", buffering=1)  # noqa: SIM115  # closed with the process
    recipe = load_any_recipe(job["recipe"])
    record_order(Path(f"{job['order']}.{rank}"))
    kind, *values = job["moments"][rank] or ["never"]
    if kind == "clock":
        at_step(values[0], lambda: (time.sleep(values[1] / 1000), die()))
    elif kind == "stop":
        at_step(values[0], lambda: os.kill(os.getpid(), signal.SIGSTOP))
    elif kind == "file":
        die_by_file(values[0], recipe.output_dir)
    elif kind == "half":
        die_half_written(values[0])
    try:
        train(recipe, force=job.get("force", False))
        leave_world()
    except SystemExit as stopped:
        os._exit(stopped.code)
    except BaseException as error:
        traceback.print_exception(error)
        os._exit(1)
    os._exit(0)


def run_job(job: dict[str, Any]) -> list[Any]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    began = time.monotonic()
    children = []
    for rank in range(len(job["moments"])):
        pid = os.fork()
        if pid == 0:
            child(job, rank, port)
        children.append(pid)
    statuses: list[int | None] = [None] * len(children)
    stops = [rank for rank, moment in enumerate(job["moments"]) if moment and moment[0] == "stop"]
    for rank in sorted(range(len(children)), key=lambda rank: rank in stops):
        if rank in stops:
            os.kill(children[rank], signal.SIGKILL)
        statuses[rank] = os.waitstatus_to_exitcode(os.waitpid(children[rank], 0)[1])
    ends = [Path(f"{job['order']}.{rank}.err").read_text().splitlines()[-1:] for rank in range(len(children))]
    return [statuses, ["".join(end) for end in ends], time.monotonic() - began]


def main() -> None:
    print(json.dumps([run_job(job) for job in json.loads(Path(sys.argv[1]).read_text())]))


if __name__ == "__main__":
    main()
