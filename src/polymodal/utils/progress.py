"""Progress on a terminal, plain lines elsewhere."""

import os
import sys
import time
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

from tqdm import tqdm

T = TypeVar("T")

PLAIN_EVERY_S = 30.0


def log(line: str) -> None:
    """Print a line to standard error, around a progress bar; of several processes only the first does."""
    if os.environ.get("RANK", "0") == "0":
        tqdm.write(line, file=sys.stderr)
        sys.stderr.flush()


def duration(seconds: float) -> str:
    """Write a duration as h:mm:ss or m:ss."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def progress(items: Iterable[T], label: str, total: int) -> Iterator[T]:
    """Yield items under a progress bar; away from a terminal, a plain line every 30 s."""
    meter = Meter(label, total)
    try:
        for item in items:
            yield item
            meter.advance(1)
    finally:
        meter.close()


class Meter:
    """A progress bar with time left on a terminal, plain lines elsewhere."""

    def __init__(self, label: str, total: int, start: int = 0, unit: str = "it", shown: bool = True) -> None:
        self.label, self.total, self.done, self.start, self.unit = label, total, start, start, unit
        self.shown = shown and os.environ.get("RANK", "0") == "0"
        self._began = self._spoke = time.monotonic()
        self._bar: Any = None
        if self.shown and sys.stderr.isatty():
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
            log(f"{self.label}: {self.done}/{self.total} {self.unit}, {rate:.2f} {self.unit}/s, {left} left {note}")

    def close(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.close()
