"""The processes of a run: who this one is, and how they wait for each other.

Everything on the host's side (barriers, gathered Python objects, errors) uses a gloo group of its own with a long
timeout: one process may prepare data for an hour while the others wait. A process that dies closes its connections,
and the others end with one line at once; one that hangs is noticed after `run.timeout_minutes`.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from polymodal.errors import PolymodalError, first_line

T = TypeVar("T")

HOST_TIMEOUT = timedelta(hours=24)
"""How long processes wait for another that prepares data or writes a checkpoint."""

_HOST_GROUP: list[Any] = []
"""The group of `World.host`; one for the life of the process, whatever it trains."""


@dataclass(frozen=True)
class World:
    """The processes of a run."""

    rank: int = 0  # This process, from 0
    size: int = 1  # How many there are
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))  # Of this process
    host: Any = None  # The gloo group for everything but gradients; None for a single process

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and talks."""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait for all processes."""
        if self.size > 1:
            dist.barrier(self.host)

    def gather(self, item: T) -> list[T]:
        """Plain data of every process, by rank."""
        if self.size == 1:
            return [item]
        items: list[Any] = [None] * self.size
        dist.all_gather_object(items, item, group=self.host)
        return items

    def sum(self, values: Sequence[float]) -> list[float]:
        """Sums over all processes, in float64, within the timeout of a step; every process gets the same numbers."""
        if self.size == 1:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(tensor)
        return [float(value) for value in tensor]

    @contextmanager
    def main_first(self) -> Iterator[None]:
        """Let the first process do something before the others, such as filling a cache that they read."""
        if not self.is_main:
            self.barrier()
        yield
        if self.is_main:
            self.barrier()

    @contextmanager
    def together(self) -> Iterator[None]:
        """Do something that may fail on one process only; then all raise that error, and none waits for ever."""
        error: PolymodalError | None = None
        try:
            yield
        except PolymodalError as caught:
            error = caught
        for found in self.gather(None if error is None else (type(error), str(error))):
            if found is not None:
                if error is not None:
                    raise error
                kind, text = found
                raise kind(text)


def join_world(timeout_minutes: float) -> World:
    """Join the processes that torchrun started; a process started otherwise is alone."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    rank, local = int(os.environ.get("RANK", "0")), int(os.environ.get("LOCAL_RANK", "0"))
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", local) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if size == 1:
        return World(device=device)
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
        dist.init_process_group(backend, timeout=timedelta(minutes=timeout_minutes))
        _HOST_GROUP.append(dist.new_group(backend="gloo", timeout=HOST_TIMEOUT))
    return World(rank, size, device, _HOST_GROUP[-1])


def leave_world() -> None:
    """Close the connections to the other processes, at the end of the program."""
    if dist.is_initialized():
        _HOST_GROUP.clear()
        dist.destroy_process_group()


@contextmanager
def clear_loss_of_peers(world: World, name: str) -> Iterator[None]:
    """Turn a collective's failure into one line that says what happened and what to do."""
    try:
        yield
    except RuntimeError as error:  # torch's DistError is one; gloo's own errors are bare RuntimeErrors
        if world.size == 1 or not _is_collective(error):
            raise
        raise PolymodalError(
            f"{name}: process {world.rank} of {world.size} stops, since another one ended or hangs "
            f"({first_line(error)[:120]}); its own output says why. Run the same command again to go on from the last "
            "checkpoint"
        ) from error


def _is_collective(error: RuntimeError) -> bool:
    text = str(error).lower()
    marks = ("gloo", "nccl", "connection closed", "connection reset", "broken pipe", "socket", "timed out", "timeout")
    return isinstance(error, dist.DistError) or any(mark in text for mark in marks)
