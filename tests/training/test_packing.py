"""Plans of steps, micro-batches and packs: nothing lost, nothing twice, nothing that depends on the process count."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from polymodal.errors import ConfigError
from polymodal.processing.collate import IGNORE, Sample, collate_packed
from polymodal.training.recipes.sft import BatchConfig
from polymodal.training.sft.packing import make_packs, micro_batches, plan_micro
from polymodal.training.steps import Order, Steps, equal_cuts


def lengths_like_llava(count: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return np.clip(rng.lognormal(5.2, 0.7, count).astype(np.int64), 3, 1500)


def test_without_packing_the_plan_is_the_old_one() -> None:
    lengths = lengths_like_llava(64)
    indices = np.random.default_rng(1).permutation(64)
    for world in (1, 2, 4):
        for rank in range(world):
            new = plan_micro(indices, lengths, BatchConfig(micro_size=5), rank, world)
            old = micro_batches(indices, lengths, 5, True, rank, world)
            assert [part.tolist() for part in new] == [part.tolist() for part in old]


@pytest.mark.parametrize("packing", ["pack", "none"])
@pytest.mark.parametrize("world", [1, 2, 3, 4])
@pytest.mark.parametrize("count", [4, 7, 33, 128])
def test_every_process_gets_as_many_and_together_they_have_all(packing: str, world: int, count: int) -> None:
    lengths = lengths_like_llava(200)
    indices = np.random.default_rng(count).permutation(200)[:count]
    batch = BatchConfig(packing=packing, micro_tokens=1024, micro_size=3)
    plans = [plan_micro(indices, lengths, batch, rank, world) for rank in range(world)]
    assert len({len(plan) for plan in plans}) == 1
    parts = [part for plan in plans for part in plan]
    assert all(len(part) > 0 for part in parts)
    assert sorted(np.concatenate(parts).tolist()) == sorted(indices.tolist())
    if packing == "pack" and count % world == 0:
        assert all(lengths[part].sum() <= 1024 or len(part) == 1 for part in parts)


def test_packs_are_full_and_the_processes_balanced() -> None:
    lengths = lengths_like_llava(4000)
    indices = np.arange(512)
    batch = BatchConfig(packing="pack", micro_tokens=2048)
    packs = make_packs(indices, lengths, 2048)
    assert lengths[indices].sum() / (2048 * len(packs)) > 0.97
    totals = [sum(lengths[part].sum() for part in plan_micro(indices, lengths, batch, rank, 8)) for rank in range(8)]
    assert max(totals) / min(totals) < 1.1


def test_a_sample_longer_than_a_pack_goes_alone() -> None:
    lengths = np.array([10, 5000, 12, 20])
    packs = make_packs(np.arange(4), lengths, 64)
    assert sorted(sorted(pack.tolist()) for pack in packs) == [[0, 2, 3], [1]]


def test_rows_that_cannot_be_parted_are_joined_so_that_no_process_is_idle() -> None:
    lengths = np.array([60, 50, 40])
    plans = [plan_micro(np.arange(3), lengths, BatchConfig(packing="pack", micro_tokens=64), r, 2) for r in (0, 1)]
    assert sorted(sorted(part.tolist()) for plan in plans for part in plan) == [[0], [1, 2]]


def test_fewer_samples_than_processes_is_an_error() -> None:
    with pytest.raises(ConfigError, match="a step of 2 samples cannot be shared by 3 processes"):
        plan_micro(np.arange(2), np.array([5, 5]), BatchConfig(packing="pack"), 0, 3)


def test_steps_by_tokens_are_even_cover_the_epoch_and_come_back_alike() -> None:
    lengths = lengths_like_llava(1000)
    sources = ((range(0, 600), 1.0), (range(600, 1000), 0.5))
    steps = Steps(Order(sources, 3), 32, 8000, lengths)
    count = int(steps.per_epoch)
    assert count == pytest.approx(800 * lengths.mean() / 8000, rel=0.1)
    tokens = [int(lengths[steps.indices(step)].sum()) for step in range(2 * count)]
    assert max(tokens) < 8000 + 1600 and min(tokens) > 8000 - 1600
    first = np.concatenate([steps.indices(step) for step in range(count)])
    assert len(first) == 800 and set(range(600)) <= set(first.tolist())
    again = Steps(Order(sources, 3), 32, 8000, lengths)
    for step in (count + 3, 1, count - 1):
        assert again.indices(step).tolist() == steps.indices(step).tolist()
    assert steps.total(2.0) == 2 * count


def test_steps_by_samples_are_the_old_ones() -> None:
    order = Order(((range(50), 1.0),), 0)
    steps = Steps(order, 16)
    assert steps.total(3.0) == round(3 * 50 / 16)
    assert steps.indices(5).tolist() == order.take(80, 16).tolist()


@pytest.mark.parametrize("count", [1, 2, 5])
def test_cuts_leave_no_part_empty(count: int) -> None:
    for lengths in ([9000, 1, 1, 1, 1], [1, 1, 1, 1, 9000], [1, 9000, 1, 1, 1], [5, 5, 5, 5, 5]):
        cuts = equal_cuts(np.array(lengths), count)
        assert len(cuts) == count + 1 and cuts[0] == 0 and cuts[-1] == 5
        assert (np.diff(cuts) > 0).all()


def test_a_packed_batch_holds_every_sample_and_no_label_reaches_back() -> None:
    samples = [
        Sample(torch.arange(10 * n, 10 * n + length), torch.arange(length) % 2 == 0, id=f"s{n}")
        for n, length in enumerate((4, 1, 5))
    ]
    batch = collate_packed(samples)
    assert batch.segments == (4, 1, 5) and batch.ids == ("s0", "s1", "s2")
    assert batch.input_ids.tolist() == [[0, 1, 2, 3, 10, 20, 21, 22, 23, 24]]
    # The first token of each sample would be predicted by the sample before it.
    assert batch.labels.tolist() == [[IGNORE, IGNORE, 2, IGNORE, IGNORE, IGNORE, IGNORE, 22, IGNORE, 24]]
    assert all(bool(sample.loss_mask[0]) for sample in samples)
