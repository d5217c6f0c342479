"""What a run says: a JSONL line every few steps, a progress bar on a terminal, plain lines elsewhere, `env.json`."""

from __future__ import annotations

import json
import os
import platform
import sys
import time
from collections.abc import Iterable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

import torch

from polymodal.errors import PolymodalError
from polymodal.files import write_text

T = TypeVar("T")
PLAIN_EVERY_S = 30.0
PACKAGES = ("polymodal", "torch", "transformers", "peft", "accelerate", "tokenizers", "numpy", "pillow", "safetensors")


def say(line: str) -> None:
    """Print one line of news to standard error, around a progress bar; of several processes only the first speaks."""
    from tqdm import tqdm

    if os.environ.get("RANK", "0") != "0":
        return

    tqdm.write(line, file=sys.stderr)
    sys.stderr.flush()


def duration(seconds: float) -> str:
    """Write a duration as h:mm:ss or m:ss."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def progress(items: Iterable[T], label: str, total: int) -> Iterator[T]:
    """Yield items under a progress bar; away from a terminal, a plain line every 30 s.

    Args:
        items: What is yielded.
        label: What is being done.
        total: How many items there are.

    Yields:
        The items.
    """
    meter = Meter(label, total)
    try:
        for item in items:
            yield item
            meter.advance(1)
    finally:
        meter.close()


class Meter:
    """A progress bar with time left on a terminal, plain lines elsewhere.

    Args:
        label: What is being done.
        total: How many units there are.
        start: Units done before, as after a resume; they do not count for the rate.
        unit: Name of a unit.
        shown: False keeps silent, as on all processes but the first.
    """

    def __init__(self, label: str, total: int, start: int = 0, unit: str = "it", shown: bool = True) -> None:
        self.label, self.total, self.done, self.start, self.unit = label, total, start, start, unit
        self.shown = shown and os.environ.get("RANK", "0") == "0"
        self._began = self._spoke = time.monotonic()
        self._bar: Any = None
        if self.shown and sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=total, initial=start, desc=label, unit=unit, dynamic_ncols=True, smoothing=0.1)

    def advance(self, count: int, note: str = "") -> None:
        """Count units; `note` follows the numbers."""
        self.done += count
        if self._bar is not None:
            if note:
                self._bar.set_postfix_str(note, refresh=False)
            self._bar.update(count)
            return
        now = time.monotonic()
        if self.shown and now - self._spoke >= PLAIN_EVERY_S:
            self._spoke = now
            rate = (self.done - self.start) / (now - self._began)
            left = duration((self.total - self.done) / rate) if rate else "?"
            say(f"{self.label}: {self.done}/{self.total} {self.unit}, {rate:.2f} {self.unit}/s, {left} left {note}")

    def close(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.close()


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
    """Keep only the log's lines up to a step, so that a resumed run writes each step once.

    Args:
        path: The JSONL file.
        step: The step that the run goes on from; 0 empties the log.
    """
    kept = [line for line in read_log(path) if line["step"] <= step]
    write_text(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in kept))


def append_log(path: Path, line: dict[str, Any]) -> None:
    """Append one JSONL line.

    Args:
        path: The file.
        line: Plain data.

    Raises:
        PolymodalError: It cannot be written, as on a full disk.
    """
    try:
        with path.open("a", encoding="utf-8") as handle:
            handle.write(json.dumps(line, ensure_ascii=False) + "\n")
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
