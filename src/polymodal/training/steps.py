"""Which samples make an optimizer step: the order of an epoch, and its cut into steps.

Both are pure functions of (sizes, repeats, seed, epoch), so a resumed run needs one integer, and the number of
processes does not matter.
"""

from collections.abc import Sequence

import numpy as np

from polymodal.errors import ConfigError

MAX_EPOCH = 2**29
"""Records of an epoch at most: their order is held in memory, 8 bytes each."""

MAX_EPOCHS_A_STEP = 1000
"""More in one step is a slip, and takes for ever."""


def epoch_order(sources: Sequence[tuple[range, float]], seed: int, epoch: int) -> np.ndarray:  # -> [n]
    """The order of one epoch."""
    rng = np.random.default_rng([seed, epoch])
    parts = []
    for indices, repeat in sources:
        count = round(len(indices) * repeat)
        whole, rest = divmod(count, max(1, len(indices)))
        members = np.arange(indices.start, indices.stop)
        parts += [members] * whole + [rng.permutation(members)[:rest]]
    order = np.concatenate(parts)
    rng.shuffle(order)
    return order


class Order:
    """The endless sequence of sample indices, epoch after epoch."""

    def __init__(self, sources: Sequence[tuple[range, float]], seed: int) -> None:
        self.sources = sources
        self.seed = seed
        size = sum(len(indices) * repeat for indices, repeat in sources)
        if size > MAX_EPOCH:
            raise ConfigError(f"data.mix: an epoch has {size:.3g} records, at most {MAX_EPOCH:,}; lower `repeat`")
        self.epoch_size = len(epoch_order(sources, seed, 0))
        if self.epoch_size == 0:
            raise ConfigError("data.mix: `repeat` is so small that an epoch has no record")
        self._cached: tuple[int, np.ndarray] = (-1, np.empty(0, dtype=np.int64))

    def take(self, start: int, count: int) -> np.ndarray:
        """Indices at positions start .. start + count - 1; an epoch's end is not padded or dropped."""
        found = []
        while count > 0:
            epoch, offset = divmod(start, self.epoch_size)
            if self._cached[0] != epoch:
                self._cached = (epoch, epoch_order(self.sources, self.seed, epoch))
            part = self._cached[1][offset : offset + count]
            found.append(part)
            start, count = start + len(part), count - len(part)
        return np.concatenate(found)


class Steps:
    """The samples of each optimizer step: equally many, or of about equally many tokens."""

    def __init__(
        self,
        order: Order,
        global_size: int,
        global_tokens: int | None = None,
        lengths: np.ndarray | None = None,  # [n], with global_tokens
        samples: int | None = None,  # of the run, whose last step then takes what is left; None makes steps whole
    ) -> None:
        self.order, self.global_size, self.samples = order, global_size, samples
        self.per_epoch: float = order.epoch_size / global_size
        self._lengths: np.ndarray | None = None
        self._cuts: tuple[int, np.ndarray] = (-1, np.empty(0, dtype=np.int64))
        if global_tokens is not None and lengths is not None:
            self._lengths = lengths
            tokens = int(lengths[order.take(0, order.epoch_size)].sum())
            self.per_epoch = min(max(1, round(tokens / global_tokens)), order.epoch_size)
        elif global_size > MAX_EPOCHS_A_STEP * order.epoch_size:
            raise ConfigError(
                f"batch.global_size {global_size}: the data have {order.epoch_size} records, so a step would see each "
                f"{global_size // order.epoch_size} times; lower it"
            )

    def total(self, epochs: float) -> int:
        """Optimizer steps of a run."""
        if self.samples is not None:
            return -(-self.samples // self.global_size)
        return max(1, round(epochs * self.per_epoch))

    def taken(self, steps: int) -> int:
        """Samples of so many steps of `global_size`."""
        return steps * self.global_size if self.samples is None else min(steps * self.global_size, self.samples)

    def members(self, steps: int, count: int) -> np.ndarray:  # -> [n]
        """Which of `count` records so many steps see."""
        seen = np.zeros(count, dtype=bool)
        for step in range(steps):
            seen[self.indices(step)] = True
            if step % 64 == 0 and seen.all():
                break
        return np.flatnonzero(seen)

    def indices(self, step: int) -> np.ndarray:
        """The samples of one step, [G]."""
        if self._lengths is None:
            return self.order.take(step * self.global_size, self.taken(step + 1) - self.taken(step))
        epoch, number = divmod(step, int(self.per_epoch))
        start = epoch * self.order.epoch_size
        if self._cuts[0] != epoch:
            members = self.order.take(start, self.order.epoch_size)
            self._cuts = (epoch, equal_cuts(self._lengths[members], int(self.per_epoch)))
        first, last = self._cuts[1][number : number + 2]
        return self.order.take(start + int(first), int(last - first))


def equal_cuts(lengths: np.ndarray, count: int) -> np.ndarray:  # lengths [n] -> [count + 1]
    """Cut a sequence of samples into parts of about equally many tokens."""
    ends = np.cumsum(lengths)
    marks = ends[-1] * np.arange(1, count) / count
    inner = np.searchsorted(ends - lengths / 2, marks)
    # A very long sample may lie over several marks: every part keeps at least one sample.
    steps = np.arange(1, count)
    inner = np.maximum.accumulate(np.maximum(inner, 1) - steps) + steps
    inner = np.minimum(inner, len(lengths) - count + steps)
    return np.concatenate(([0], inner, [len(lengths)])).astype(np.int64)


def step_seed(seed: int, step: int, rank: int) -> int:
    """One seed for dropout of each step and process, so that a resumed step draws the same numbers."""
    return int(np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0] >> 1)
