"""What a run logs: JSONL lines, loss by kind and by source, `env.json`, and trackers for those who want them.

`run.trackers: [tensorboard, wandb]` get every line too; a run's own files never depend on them. A resumed run goes on
in the same charts: TensorBoard drops what it saw after the checkpoint's step, and wandb resumes the run whose id is
derived from the output folder.
"""

from __future__ import annotations

import hashlib
import json
import math
import platform
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from textwrap import shorten
from typing import Any

import numpy as np
import torch
from PIL import Image

from polymodal.errors import PolymodalError, unknown_name
from polymodal.utils.extras import extra
from polymodal.utils.files import write_text

ANSWER_KEYS = ("id", "question", "expected", "answer", "error")
"""What is shown of an answer."""
PACKAGES = ("polymodal", "torch", "transformers", "peft", "accelerate", "tokenizers", "numpy", "pillow", "safetensors")


def read_log(path: Path) -> list[dict[str, Any]]:
    """Read a JSONL log; a last line cut by a crash is left out."""
    if not path.is_file():
        return []
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(line))
        except ValueError:
            break
    return lines


def start_log(path: Path, step: int) -> None:
    """Keep only the log's lines up to a step, so that a resumed run writes each step once."""
    kept = [line for line in read_log(path) if line["step"] <= step]
    write_text(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in kept))


def append_log(path: Path, line: dict[str, Any]) -> None:
    """Append one JSONL line."""
    try:
        with path.open("a", encoding="utf-8") as handle:
            handle.write(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n")
    except OSError as error:
        raise PolymodalError(
            f"{path}: cannot be written ({error.strerror or error}); make room and run the same command again to go on "
            "from the last checkpoint"
        ) from error


def environment(device: torch.device) -> dict[str, Any]:
    """Versions and hardware, for `env.json`."""
    packages = {}
    for name in PACKAGES:
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            packages[name] = "not installed"
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "packages": packages,
    }


def finite(value: Any) -> Any:
    """Plain data with null for NaN and infinity, which JSON has not."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


Sums = dict[str, list[float]]
"""Name -> [sum of losses, tokens]."""


def told(line: Mapping[str, Any]) -> list[str]:
    """An evaluation for the terminal: its loss, and the first question with its answer."""
    found = []
    if line.get("loss") is not None:
        of = f" over {line['tokens']:,} tokens" if "tokens" in line else ""
        found.append(f"step {line['step']}: held-out loss {line['loss']:.4f}{of}")
    for entry in line.get("answers", [])[:1]:
        asked, said, wanted = (_short(entry.get(key, "")) for key in ("question", "answer", "expected"))
        said = f"failed: {_short(entry['error'])}" if "error" in entry else repr(said)
        found.append(f"step {line['step']}: {asked!r} was answered {said}; expected {wanted!r}")
    return found


def _short(text: str) -> str:
    return shorten("".join(char if char.isprintable() else " " for char in text), 100, placeholder=" ...")


class LossByKind:
    """Sums of losses by kind and by source since the last log line, of this process."""

    # Losses stay on the device until they are logged or saved, so nothing waits for a micro-batch. Sums are float64 and
    # added in order of micro-batches, so that a resumed run logs exactly what it would have logged.
    def __init__(self, kinds: Sums | None = None, sources: Sums | None = None) -> None:
        self.kinds: Sums = {name: list(sums) for name, sums in (kinds or {}).items()}
        self.sources: Sums = {name: list(sums) for name, sums in (sources or {}).items()}
        self._waiting: list[tuple[torch.Tensor, list[str], list[str]]] = []
        self._records: list[tuple[torch.Tensor, Sequence[str]]] = []

    def add(self, losses: torch.Tensor, kinds: list[str], sources: list[str], records: Sequence[str] = ()) -> None:
        """Remember a micro-batch."""
        # losses [R], kinds [R], sources [R], records [R]
        self._waiting.append((losses.detach(), kinds, sources))
        self.watch(losses, records)

    def watch(self, losses: torch.Tensor, records: Sequence[str]) -> None:
        """Remember whose losses these are, for `not_finite`."""
        # losses [R], records [R]
        self._records.append((losses.detach(), records))

    def not_finite(self) -> list[str]:
        """The records whose loss is NaN or infinite, each once."""
        found = [
            record
            for losses, records in self._records
            for record, good in zip(records, losses.isfinite().tolist(), strict=False)
            if not good
        ]
        return list(dict.fromkeys(found))

    def take(self, step: LossByKind) -> None:
        """Add a step's losses, once it is known that the step counts."""
        self._waiting += step._waiting
        self.kinds = merge([self.kinds, step.kinds])
        self.sources = merge([self.sources, step.sources])

    def fold(self) -> None:
        """Add what is waiting to the sums; waits for the device."""
        for losses, kinds, sources in self._waiting:
            values = losses.double().cpu().numpy()
            self.kinds = merge([self.kinds, _sums_of(kinds, values)])
            self.sources = merge([self.sources, _sums_of(sources, values)])
        self._waiting = []

    def clear(self) -> None:
        """Start anew, after a log line."""
        self.kinds, self.sources = {}, {}


def merge(sums: Iterable[Sums]) -> Sums:
    """Add sums, of several processes or micro-batches, in order."""
    total: Sums = {}
    for own in sums:
        for name, (loss, tokens) in own.items():
            entry = total.setdefault(name, [0.0, 0.0])
            entry[0] += loss
            entry[1] += tokens
    return total


def means(sums: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Loss per token by name, sorted."""
    return {name: loss / tokens for name, (loss, tokens) in sorted(sums.items()) if tokens}


def _sums_of(names: Sequence[str], values: np.ndarray) -> Sums:
    distinct, inverse = np.unique(np.array(names, dtype=np.str_), return_inverse=True)
    losses = np.bincount(inverse, weights=values, minlength=len(distinct)).tolist()
    counts = np.bincount(inverse, minlength=len(distinct)).tolist()
    return {str(name): [loss, float(count)] for name, loss, count in zip(distinct, losses, counts, strict=True)}


@dataclass(frozen=True)
class Tracker:
    """Where log lines go besides the log."""

    write: Callable[[int, dict[str, float]], None]  # Takes a step and numbers by name
    show: Callable[[int, Sequence[Mapping[str, Any]], Path], None]  # Takes a step, answers, and where their images lie
    close: Callable[[], None]  # Flushes


def open_trackers(
    names: Sequence[str], output_dir: Path, run_name: str, recipe: dict[str, Any], step: int
) -> list[Tracker]:
    """Open the trackers of a run."""
    for name in names:
        if name not in TRACKERS:
            raise unknown_name("run.trackers entry", name, TRACKERS)
    return [TRACKERS[name](output_dir, run_name, recipe, step) for name in names]


def numbers_of(line: dict[str, Any], prefix: str) -> dict[str, float]:
    """Flatten a log line to what charts can show."""
    found: dict[str, float] = {}
    for key, value in line.items():
        if isinstance(value, dict):
            found |= numbers_of(value, f"{prefix}/{key}")
        elif isinstance(value, (int, float)) and not isinstance(value, bool) and key != "step":
            found[f"{prefix}/{key}"] = float(value)
    return found


def _tensorboard(output_dir: Path, run_name: str, recipe: dict[str, Any], step: int) -> Tracker:
    writer: Any = tracker_module("tensorboard").SummaryWriter(
        str(output_dir / "tensorboard"), purge_step=step + 1 if step else None
    )

    def write(step: int, numbers: dict[str, float]) -> None:
        for name, value in numbers.items():
            writer.add_scalar(name, value, step)

    def show(step: int, answers: Sequence[Mapping[str, Any]], folder: Path) -> None:
        for number, entry in enumerate(answers):
            name = f"answers/{number}"
            lines = [f"**{key}**: {entry[key]}" for key in ANSWER_KEYS if key in entry]
            writer.add_text(name, "\n\n".join(lines), step)
            for place, file in enumerate(entry.get("images", ())):
                with Image.open(folder / file) as image:
                    writer.add_image(f"{name}/image {place}", np.asarray(image.convert("RGB")), step, dataformats="HWC")

    return Tracker(write, show, writer.close)


def _wandb(output_dir: Path, run_name: str, recipe: dict[str, Any], step: int) -> Tracker:
    wandb = tracker_module("wandb")
    identity = hashlib.sha256(str(output_dir.resolve()).encode()).hexdigest()[:12]
    run: Any = wandb.init(
        project="polymodal", name=run_name, id=identity, resume="allow", dir=str(output_dir), config=recipe
    )

    def show(step: int, answers: Sequence[Mapping[str, Any]], folder: Path) -> None:
        rows = []
        for entry in answers:
            image = next((wandb.Image(str(folder / file)) for file in entry.get("images", ())), None)
            rows.append([*(str(entry.get(key, "")) for key in ANSWER_KEYS), image])
        run.log({"eval/answers": wandb.Table(columns=[*ANSWER_KEYS, "image"], data=rows)}, step=step)

    return Tracker(lambda step, numbers: run.log(numbers, step=step), show, run.finish)


def tracker_module(name: str) -> Any:
    """The module behind a tracker."""
    module = "torch.utils.tensorboard" if name == "tensorboard" else name
    return extra(module, "run.trackers needs", name, package=name)


TRACKERS: dict[str, Callable[[Path, str, dict[str, Any], int], Tracker]] = {
    "tensorboard": _tensorboard,
    "wandb": _wandb,
}
"""Each tracker and what opens it."""
