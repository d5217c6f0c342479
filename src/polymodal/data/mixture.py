"""How often each source of a mixture is seen in an epoch, and sequences that make their items when asked for them.

Counts are integers, so every machine gets the same. Two ways to give them, never both in one mixture:

- `repeat`: each source by itself. 2.0 shows every record twice in an epoch, 0.25 a quarter of them, drawn anew each
  epoch. The epoch has the sum.
- `weight`: the sources against each other. The epoch is as long as the records of all sources together; each source
  gets its share of that, so small ones are repeated and large ones drawn from. Weights of n ** a with 0 <= a <= 1 are
  what is called a temperature.
"""

from bisect import bisect_right
from collections.abc import Callable, Sequence
from fractions import Fraction
from itertools import accumulate
from typing import Any, TypeVar

import numpy as np

from polymodal.errors import ConfigError

T = TypeVar("T")


def epoch_counts(
    sizes: Sequence[int], repeats: Sequence[float], weights: Sequence[float | None] | None = None
) -> list[int]:
    """Count the samples that each source gives to an epoch."""
    given = [weight for weight in weights or [] if weight is not None]
    if not given:
        return [round(size * repeat) for size, repeat in zip(sizes, repeats, strict=True)]
    if len(given) != len(sizes) or any(repeat != 1 for repeat in repeats):
        raise ConfigError("data.mix: give every source a `weight` and none a `repeat`, or no source a `weight`")
    if any(weight < 0 for weight in given) or not any(given):
        raise ConfigError("data.mix: weights must not be negative, and one must be more than 0")
    # A source without a usable record has no share; Fraction(float) is exact, so no rounding hides in here.
    shares = [Fraction(weight) if size else Fraction(0) for weight, size in zip(given, sizes, strict=True)]
    total, whole = sum(sizes), sum(shares)
    if whole == 0:
        return [0] * len(sizes)
    exact = [total * share / whole for share in shares]
    counts = [int(value) for value in exact]
    order = sorted(range(len(sizes)), key=lambda i: (counts[i] - exact[i], i))
    for index in order[: total - sum(counts)]:
        counts[index] += 1
    return counts


def epoch_repeats(
    sizes: Sequence[int], repeats: Sequence[float], weights: Sequence[float | None] | None = None
) -> list[float]:
    """The `repeat` of each source that gives `epoch_counts`; `repeats` itself where there are no weights."""
    if all(weight is None for weight in weights or []):
        return list(repeats)
    counts = epoch_counts(sizes, repeats, weights)
    return [count / size if size else 0.0 for count, size in zip(counts, sizes, strict=True)]


class Picked(Sequence[T]):
    """Items made from row numbers."""

    def __init__(self, make: Callable[[int], T], rows: np.ndarray) -> None:  # rows [n]
        self._make, self._rows = make, rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self._make(int(row)) for row in self._rows[index]]
        return self._make(int(self._rows[index]))


class Joined(Sequence[T]):
    """Several sequences as one."""

    def __init__(self, parts: Sequence[Sequence[T]]) -> None:
        self._parts = parts
        self._ends = list(accumulate(len(part) for part in parts))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        index = int(index)
        at = index + len(self) if index < 0 else index
        if not 0 <= at < len(self):
            raise IndexError(f"index {index} of {len(self)} items")
        which = bisect_right(self._ends, at)
        return self._parts[which][at - (self._ends[which - 1] if which else 0)]
