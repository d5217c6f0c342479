"""How often each source of a mixture is seen in an epoch."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from polymodal.config import parse_config
from polymodal.data.mixture import epoch_counts, epoch_repeats
from polymodal.errors import ConfigError
from polymodal.training.recipes.sft import DataConfig


@pytest.mark.parametrize(
    ("sizes", "repeats", "weights", "counts"),
    [
        ([10, 4], [1, 1], None, [10, 4]),
        ([10, 4], [0.25, 2.5], [None, None], [2, 10]),
        ([90, 10], [1, 1], [1, 1], [50, 50]),
        ([90, 10], [1, 1], [3, 1], [75, 25]),
        ([5, 5], [1, 1], [2, 1], [7, 3]),  # 6.67 and 3.33: the remainder goes to the first
        ([1, 1, 1], [1, 1, 1], [1, 1, 1], [1, 1, 1]),
        ([2, 0], [1, 1], [1, 9], [2, 0]),  # a source whose records were all left out
        ([0, 0], [1, 1], [1, 9], [0, 0]),
    ],
)
def test_counts(sizes: list[int], repeats: list[float], weights: Any, counts: list[int]) -> None:
    assert epoch_counts(sizes, repeats, weights) == counts


@given(st.lists(st.tuples(st.integers(1, 700_000), st.floats(0.001, 1000)), min_size=1, max_size=8))
def test_weights_share_the_epoch(pairs: list[tuple[int, float]]) -> None:
    sizes, weights = [size for size, _ in pairs], [weight for _, weight in pairs]
    counts = epoch_counts(sizes, [1.0] * len(sizes), weights)
    assert sum(counts) == sum(sizes)
    for count, weight in zip(counts, weights, strict=True):
        assert abs(count - sum(sizes) * weight / sum(weights)) < 1 + 1e-6
    factors = epoch_repeats(sizes, [1.0] * len(sizes), weights)
    assert [round(size * factor) for size, factor in zip(sizes, factors, strict=True)] == counts


@given(st.lists(st.tuples(st.integers(0, 1000), st.floats(0.01, 9)), min_size=1))
def test_without_weights_repeats_stay_as_they_are(pairs: list[tuple[int, float]]) -> None:
    sizes, repeats = [size for size, _ in pairs], [repeat for _, repeat in pairs]
    assert epoch_repeats(sizes, repeats, [None] * len(sizes)) == repeats
    assert epoch_counts(sizes, repeats) == [round(size * repeat) for size, repeat in pairs]


@pytest.mark.parametrize(
    ("repeats", "weights"), [([1, 2], [1, 1]), ([1, 1], [1, None]), ([1, 1], [0, 0]), ([1, 1], [2, -1])]
)
def test_what_does_not_go_together(repeats: list[float], weights: Any) -> None:
    with pytest.raises(ConfigError, match=r"data\.mix"):
        epoch_counts([3, 4], repeats, weights)


@pytest.mark.parametrize(
    ("mix", "complaint"),
    [
        ([{"path": "a", "weight": 1}, {"path": "b"}], "give every source of the mix a `weight` or none; b has none"),
        ([{"path": "a", "weight": 1, "repeat": 2}], "give `repeat` or `weight`, not both"),
        ([{"path": "a", "weight": 0}], "weight"),
        ([{"path": "a", "formt": "llava"}], "'format'"),
        ([{"path": "a", "format": "lava"}], "unknown data format 'lava'; did you mean 'llava'"),
        ([{"path": "a", "format": "vqav2"}], "format vqav2 needs its second file; set `annotations`"),
    ],
)
def test_recipes_with_a_mistake(mix: list[dict[str, Any]], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        parse_config(DataConfig, {"mix": mix}, "recipe")
    assert parse_config(DataConfig, {"mix": [{"path": "a", "weight": 1}, {"path": "b", "weight": 2}]}, "recipe")
