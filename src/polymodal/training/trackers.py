"""TensorBoard and Weights & Biases, for those who want them; a run's own files never depend on them.

`run.trackers: [tensorboard, wandb]`. A resumed run goes on in the same charts: TensorBoard drops what it saw after the
checkpoint's step, and wandb resumes the run whose id is derived from the output folder.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from polymodal.errors import ConfigError, unknown_name


@dataclass(frozen=True)
class Tracker:
    """Where log lines go besides the log.

    Attributes:
        write: Takes a step and numbers by name.
        close: Flushes.
    """

    write: Callable[[int, dict[str, float]], None]
    close: Callable[[], None]


def open_trackers(
    names: Sequence[str], output_dir: Path, run_name: str, recipe: dict[str, Any], step: int
) -> list[Tracker]:
    """Open the trackers of a run.

    Args:
        names: Of `TRACKERS`.
        output_dir: The run's folder.
        run_name: The recipe's name.
        recipe: The recipe as plain data.
        step: The step that the run goes on from.

    Returns:
        The trackers.

    Raises:
        ConfigError: A name is unknown, or its package is not installed.
    """
    for name in names:
        if name not in TRACKERS:
            raise unknown_name("run.trackers entry", name, TRACKERS)
    return [TRACKERS[name](output_dir, run_name, recipe, step) for name in names]


def numbers_of(line: dict[str, Any], prefix: str) -> dict[str, float]:
    """Flatten a log line to what charts can show.

    Args:
        line: Of `log.jsonl` or `eval.jsonl`.
        prefix: Put before every name, as in "train/loss".

    Returns:
        Numbers by slash-separated name.
    """
    found: dict[str, float] = {}
    for key, value in line.items():
        if isinstance(value, dict):
            found |= numbers_of(value, f"{prefix}/{key}")
        elif isinstance(value, (int, float)) and not isinstance(value, bool) and key != "step":
            found[f"{prefix}/{key}"] = float(value)
    return found


def _tensorboard(output_dir: Path, run_name: str, recipe: dict[str, Any], step: int) -> Tracker:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise _missing("tensorboard") from None
    writer: Any = SummaryWriter(str(output_dir / "tensorboard"), purge_step=step + 1 if step else None)

    def write(step: int, numbers: dict[str, float]) -> None:
        for name, value in numbers.items():
            writer.add_scalar(name, value, step)

    return Tracker(write, writer.close)


def _wandb(output_dir: Path, run_name: str, recipe: dict[str, Any], step: int) -> Tracker:
    try:
        import wandb
    except ImportError:
        raise _missing("wandb") from None
    identity = hashlib.sha256(str(output_dir.resolve()).encode()).hexdigest()[:12]
    run: Any = wandb.init(
        project="polymodal", name=run_name, id=identity, resume="allow", dir=str(output_dir), config=recipe
    )
    return Tracker(lambda step, numbers: run.log(numbers, step=step), run.finish)


def _missing(name: str) -> ConfigError:
    return ConfigError(f"run.trackers: {name} is not installed; run `pip install {name}`, or leave it out")


TRACKERS: dict[str, Callable[[Path, str, dict[str, Any], int], Tracker]] = {
    "tensorboard": _tensorboard,
    "wandb": _wandb,
}
"""Each tracker and what opens it."""
