"""Sequences that make their items when they are asked for, so that nothing but what is used is in memory."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any, TypeVar

import numpy as np

T = TypeVar("T")


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
