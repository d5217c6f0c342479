"""Which samples make an optimizer step, and which of them go through the model together.

Both are planned from lengths alone, before a sample is touched. A step is `batch.global_size` samples, or about
`batch.global_tokens` tokens; either way it is a pure function of (seed, epoch, lengths) that no number of processes
changes. Within a step, `packing: pack` puts samples end to end in rows of at most `batch.micro_tokens` tokens by
best-fit decreasing (Johnson 1973: at most 11/9 of the fewest rows), and shares the rows so that every process gets
equally many of about equal cost. Packing within the step, not over the whole epoch as most trainers do, keeps the
step's samples, and with them a published learning rate, as they were.
"""

from bisect import bisect_left

import numpy as np

from polymodal.errors import ConfigError
from polymodal.training.recipes.sft import BatchConfig

LINEAR_COST = 6144
"""Tokens at which attention (quadratic) costs a decoder layer as much as its matrices (linear): 6 times a usual width
of 1024, counted in multiplications; only the balance between processes depends on it."""


def plan_micro(
    indices: np.ndarray, lengths: np.ndarray, batch: BatchConfig, rank: int = 0, world: int = 1
) -> list[np.ndarray]:
    """Cut one step's samples into the micro-batches of one process."""
    # indices [G]
    if len(indices) < world:
        raise ConfigError(
            f"a step of {len(indices)} samples cannot be shared by {world} processes; raise batch.global_size or "
            "batch.global_tokens"
        )
    if batch.packing == "pack":
        return deal(make_packs(indices, lengths, batch.micro_tokens, world), lengths, rank, world)
    if len(indices) % world == 0:
        return micro_batches(indices, lengths, batch.micro_size, batch.group_by_length, rank, world)
    if batch.group_by_length:
        indices = indices[np.argsort(lengths[indices], kind="stable")]
    most = -(-len(indices) // world)
    # The process with the fewest samples has one less than `most`, at least one: no part is empty.
    return np.array_split(indices[rank::world], min(-(-most // batch.micro_size), len(indices) // world))


def micro_batches(
    indices: np.ndarray, lengths: np.ndarray, micro_size: int, group_by_length: bool, rank: int = 0, world: int = 1
) -> list[np.ndarray]:
    """Cut one step's samples into micro-batches."""
    # indices [G]
    if group_by_length:
        indices = indices[np.argsort(lengths[indices], kind="stable")]
    mine = indices[rank::world]
    return [mine[i : i + micro_size] for i in range(0, len(mine), micro_size)]


def make_packs(indices: np.ndarray, lengths: np.ndarray, capacity: int, multiple: int = 1) -> list[np.ndarray]:
    """Pack samples into rows by best-fit decreasing."""
    # indices [G]
    packs: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (free tokens, pack), sorted
    for index in indices[np.argsort(-lengths[indices], kind="stable")].tolist():
        length = int(lengths[index])
        place = bisect_left(room, (length, -1))
        if place < len(room):
            free, pack = room.pop(place)
            packs[pack].append(index)
        else:
            free, pack = capacity, len(packs)
            packs.append([index])
        if free - length > 0:
            entry = (free - length, pack)
            room.insert(bisect_left(room, entry), entry)
    while len(packs) % multiple:
        parted = max((pack for pack in packs if len(pack) > 1), key=lambda pack: _cost(lengths[pack]), default=None)
        if parted is None:
            packs.sort(key=lambda pack: -int(lengths[pack].sum()))
            packs[-2:] = [packs[-2] + packs[-1]]
        else:
            packs.remove(parted)
            packs += _halves(parted, lengths)
    return [np.array(pack) for pack in packs]


def deal(packs: list[np.ndarray], lengths: np.ndarray, rank: int, world: int) -> list[np.ndarray]:
    """Share packs so that processes work on packs of like cost at the same time, and on equal cost in all."""
    costs = np.array([_cost(lengths[pack]) for pack in packs])
    ranked = [packs[i] for i in np.argsort(-costs, kind="stable")]
    # To and fro: whoever got the dearest of one round gets the cheapest of the next.
    return [
        ranked[start + (rank if start // world % 2 == 0 else world - 1 - rank)]
        for start in range(0, len(ranked), world)
    ]


def _cost(lengths: np.ndarray) -> int:
    """Relative time of a pack: matrices see every token, attention every pair within a sample."""
    return int((lengths.astype(np.int64) * (lengths + LINEAR_COST)).sum())


def _halves(pack: list[int], lengths: np.ndarray) -> list[list[int]]:
    """Part a pack into two of about equal cost."""
    parts: tuple[list[int], list[int]] = ([], [])
    costs = [0, 0]
    for index in sorted(pack, key=lambda i: -int(lengths[i])):
        lighter = int(costs[1] < costs[0])
        parts[lighter].append(index)
        costs[lighter] += _cost(lengths[[index]])
    return list(parts)
