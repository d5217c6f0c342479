"""Loss by kind and by source: which sort of question, and which data set, is learnt.

A kind belongs to a turn: a conversation may describe an image in one turn and read it in the next. Losses stay on the
device until they are logged or saved, so nothing waits for a micro-batch. Sums are kept in float64 and added in order
of micro-batches, so that a resumed run logs exactly what it would have logged.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from polymodal.data.readers.conversations import Record
    from polymodal.processing.collate import Sample

Sums = dict[str, list[float]]
"""Name -> [sum of losses, tokens]."""


def turn_of_target(sample: Sample) -> np.ndarray:  # -> [R]
    """Number the assistant's turns, runs of the loss mask, for each token that is a target."""
    mask = sample.loss_mask.numpy()
    starts = mask & ~np.concatenate(([False], mask[:-1]))
    return (np.cumsum(starts) - 1)[1:][mask[1:]]


def kinds_of_targets(record: Record, sample: Sample, last_answer_only: bool = False) -> list[str]:
    """The kind of each target: its turn's where the record has as many `kinds` as turns, else the record's."""
    turns = turn_of_target(sample)
    kinds = record.extra.get("kinds")
    answers = sum(message.role == "assistant" for message in record.messages)
    if not isinstance(kinds, (list, tuple)) or len(kinds) != answers or not len(turns) or turns[-1] >= answers:
        return [record.kind] * len(turns)
    return [str(kinds[-1 if last_answer_only else turn]) for turn in turns]


class Tally:
    """Sums of losses by kind and by source since the last log line, of this process."""

    def __init__(self, kinds: Sums | None = None, sources: Sums | None = None) -> None:
        self.kinds: Sums = {name: list(sums) for name, sums in (kinds or {}).items()}
        self.sources: Sums = {name: list(sums) for name, sums in (sources or {}).items()}
        self._waiting: list[tuple[torch.Tensor, list[str], list[str]]] = []

    def add(self, losses: torch.Tensor, kinds: list[str], sources: list[str]) -> None:
        """Remember a micro-batch."""
        # losses [R], kinds [R], sources [R]
        self._waiting.append((losses.detach(), kinds, sources))

    def fold(self) -> None:
        """Add what is waiting to the sums; waits for the device."""
        for losses, kinds, sources in self._waiting:
            values = losses.double().cpu().numpy()
            _add(self.kinds, kinds, values)
            _add(self.sources, sources, values)
        self._waiting = []

    def clear(self) -> None:
        """Start anew, after a log line."""
        self.kinds, self.sources = {}, {}


def merge(parts: Iterable[Sums]) -> Sums:
    """Add the sums of several processes, in order."""
    total: Sums = {}
    for part in parts:
        for name, (loss, tokens) in part.items():
            entry = total.setdefault(name, [0.0, 0.0])
            entry[0] += loss
            entry[1] += tokens
    return total


def means(sums: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Loss per token by name, sorted."""
    return {name: loss / tokens for name, (loss, tokens) in sorted(sums.items()) if tokens}


def _add(sums: Sums, names: Sequence[str], values: np.ndarray) -> None:
    distinct, inverse = np.unique(np.array(names, dtype=np.str_), return_inverse=True)
    losses = np.bincount(inverse, weights=values, minlength=len(distinct))
    counts = np.bincount(inverse, minlength=len(distinct))
    for name, loss, count in zip(distinct, losses, counts, strict=True):
        entry = sums.setdefault(str(name), [0.0, 0.0])
        entry[0] += float(loss)
        entry[1] += float(count)
