from __future__ import annotations

import threading

import numpy as np
import pytest

from polymodal.errors import ConfigError
from polymodal.training.sft.packing import micro_batches
from polymodal.training.steps import Order, Steps, epoch_order, step_seed
from polymodal.utils.threads import ahead


def test_an_epoch_has_every_sample_as_often_as_asked() -> None:
    sources = ((range(0, 10), 2.0), (range(10, 20), 0.5))
    order = epoch_order(sources, seed=3, epoch=1)
    counts = np.bincount(order, minlength=20)
    assert counts[:10].tolist() == [2] * 10
    assert sorted(counts[10:].tolist()) == [0] * 5 + [1] * 5
    assert order.tolist() == epoch_order(sources, seed=3, epoch=1).tolist()
    assert order.tolist() != epoch_order(sources, seed=3, epoch=2).tolist()
    assert order.tolist() != epoch_order(sources, seed=4, epoch=1).tolist()


def test_positions_do_not_depend_on_how_they_are_read() -> None:
    order = Order(((range(7), 1.0),), seed=0)
    whole = order.take(0, 30)
    pieces = np.concatenate([Order(((range(7), 1.0),), seed=0).take(start, 5) for start in range(0, 30, 5)])
    assert whole.tolist() == pieces.tolist()
    assert sorted(whole[7:14].tolist()) == list(range(7))


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("group", [True, False])
def test_processes_share_a_step_without_overlap(world: int, group: bool) -> None:
    lengths = np.random.default_rng(0).integers(5, 90, 40)
    indices = np.arange(8, 40)
    parts = [micro_batches(indices, lengths, 3, group, rank, world) for rank in range(world)]
    assert len({len(part) for part in parts}) == 1
    seen = np.concatenate([np.concatenate(part) for part in parts])
    assert sorted(seen.tolist()) == indices.tolist()
    if group:
        for part in parts:
            flat = lengths[np.concatenate(part)]
            assert (np.diff(flat) >= 0).all()


def test_ahead_keeps_order_is_bounded_and_raises() -> None:
    taken = []
    lock = threading.Lock()

    def items() -> object:
        for number in range(100):
            with lock:
                taken.append(number)
            yield number

    results = ahead(lambda n: n * n, items(), workers=3, depth=5)  # type: ignore[arg-type]
    assert [next(results) for _ in range(10)] == [n * n for n in range(10)]
    assert len(taken) <= 15

    def broken(number: int) -> int:
        if number == 2:
            raise ValueError("two")
        return number

    with pytest.raises(ValueError, match="two"):
        list(ahead(broken, range(5), workers=2))


@pytest.mark.parametrize(
    ("size", "epochs", "counts"), [(8, 1.0, [8, 3]), (32, 1.0, [11]), (11, 2.0, [11, 11]), (4, 0.5, [4, 2])]
)
def test_a_short_last_step_sees_each_record_exactly_as_often_as_asked(
    size: int, epochs: float, counts: list[int]
) -> None:
    order = Order(((range(11), 1.0),), seed=0)
    steps = Steps(order, size, samples=round(epochs * 11))
    taken = [steps.indices(step) for step in range(steps.total(epochs))]
    assert [len(indices) for indices in taken] == counts
    assert np.concatenate(taken).tolist() == order.take(0, sum(counts)).tolist()
    assert steps.taken(len(counts)) == sum(counts)


def test_what_never_ends_or_fills_the_memory_is_refused() -> None:
    with pytest.raises(ConfigError, match="an epoch has 1e"):
        Order(((range(10**9), 10_000.0),), seed=0)
    with pytest.raises(ConfigError, match="step would see each 90909 times"):
        Steps(Order(((range(11), 1.0),), seed=0), 10**6)


def test_members_are_the_records_that_steps_see() -> None:
    steps = Steps(Order(((range(100), 1.0),), seed=0), 8)
    assert steps.members(3, 100).tolist() == sorted(steps.order.take(0, 24).tolist())
    assert steps.members(10**9, 100).tolist() == list(range(100))


def test_each_step_and_process_of_each_seed_draws_its_own_numbers() -> None:
    seeds = {step_seed(seed, step, rank) for seed in range(3) for step in range(50) for rank in range(4)}
    assert len(seeds) == 3 * 50 * 4 and step_seed(1, 2, 3) == step_seed(1, 2, 3)
