"""How sure a mean is: 95% intervals that stay wide where there is little to go by."""

import math
from collections.abc import Callable, Hashable, Sequence
from statistics import NormalDist
from typing import Any

import numpy as np

Z = NormalDist().inv_cdf(0.975)
FEW = 30
"""Below this many values a bootstrap is too narrow."""


def mean_interval(
    values: np.ndarray,
    counts: np.ndarray | None = None,
    bounds: tuple[float, float] = (0.0, 1.0),
    seed: int = 0,
    resamples: int = 10_000,
) -> tuple[float, float]:
    """95% interval of a mean within `bounds`; of sums over groups, such as an image's captions, with their counts."""
    # Right or wrong: Wilson's (1927). All alike: as many exceptions as so many values may lack by chance (the rule of
    # three), each as far off as can be. Few values: Student's. Else a bootstrap. values [n], counts [n]
    values = np.asarray(values, dtype=float)
    means = values if counts is None else values / counts
    low, high = bounds
    if counts is None and np.isin(values, bounds).all():
        share = wilson(float(((values - low) / (high - low)).mean()), len(values))
        return low + share[0] * (high - low), low + share[1] * (high - low)
    mean = float(values.sum() / (len(values) if counts is None else counts.sum()))
    if np.ptp(means) == 0:
        exceptions = 1 - 0.025 ** (1 / len(values))
        return mean - exceptions * (mean - low), mean + exceptions * (high - mean)
    if len(values) < FEW:
        half = student(len(values) - 1) * float(means.std(ddof=1)) / math.sqrt(len(values))
        return max(low, mean - half), min(high, mean + half)
    counts = np.ones(len(values)) if counts is None else counts
    random = np.random.default_rng(seed)
    drawn = []
    step = max(1, 5_000_000 // len(values))
    for start in range(0, resamples, step):
        chosen = random.integers(0, len(values), (min(step, resamples - start), len(values)))
        drawn.append(values[chosen].sum(axis=1) / counts[chosen].sum(axis=1))
    ends = np.percentile(np.concatenate(drawn), [2.5, 97.5])
    return float(ends[0]), float(ends[1])


def wilson(share: float, count: int) -> tuple[float, float]:
    """Wilson's interval of a share of `count` trials."""
    middle = (share + Z * Z / (2 * count)) / (1 + Z * Z / count)
    half = Z / (1 + Z * Z / count) * math.sqrt(share * (1 - share) / count + Z * Z / (4 * count * count))
    return max(0.0, middle - half), min(1.0, middle + half)


def student(freedom: int) -> float:
    """The 97.5% quantile of Student's distribution, by the expansion of Abramowitz and Stegun (26.7.5)."""
    exact = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776}
    if freedom < 5:
        return exact.get(freedom, math.inf)
    return (
        Z
        + (Z**3 + Z) / (4 * freedom)
        + (5 * Z**5 + 16 * Z**3 + 3 * Z) / (96 * freedom**2)
        + (3 * Z**7 + 19 * Z**5 + 17 * Z**3 - 15 * Z) / (384 * freedom**3)
    )


def grouped_interval(
    items: Sequence[Any],
    group_of: Sequence[Hashable],
    figure: Callable[[Sequence[Any]], float],
    bounds: tuple[float, float] = (0.0, 1.0),
    seed: int = 0,
    resamples: int = 300,
) -> tuple[float, float]:
    """95% interval of any figure of some items, of which whole groups are drawn, or left out where they are few."""
    groups: dict[Hashable, list[Any]] = {}
    for item, group in zip(items, group_of, strict=True):
        groups.setdefault(group, []).append(item)
    parts = list(groups.values())
    low, high = bounds
    if len(parts) == 1:
        return bounds
    whole = figure(items)
    if len(parts) < FEW:  # the jackknife's standard error, and Student's distribution
        without = np.array([figure([item for part in parts if part is not own for item in part]) for own in parts])
        half = student(len(parts) - 1) * math.sqrt((len(parts) - 1) * float(((without - without.mean()) ** 2).mean()))
        ends = whole - half, whole + half
    else:
        random = np.random.default_rng(seed)
        chosen = (random.integers(0, len(parts), len(parts)) for _ in range(resamples))
        figures = [figure([item for number in numbers for item in parts[number]]) for numbers in chosen]
        ends = float(np.percentile(figures, 2.5)), float(np.percentile(figures, 97.5))
    if ends[1] - ends[0] <= 1e-9 * (high - low):  # all groups alike
        exceptions = 1 - 0.025 ** (1 / len(parts))
        ends = whole - exceptions * (whole - low), whole + exceptions * (high - whole)
    return max(low, ends[0]), min(high, ends[1])
