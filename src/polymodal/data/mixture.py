"""How often each source of a mixture is seen in an epoch. Integers only, so every machine gets the same.

Two ways to say it, never both in one mixture:

- `repeat`: each source by itself. 2.0 shows every record twice in an epoch, 0.25 a quarter of them, drawn anew each
  epoch. The epoch has the sum.
- `weight`: the sources against each other. The epoch is as long as the records of all sources together; each source
  gets its share of that, so small ones are repeated and large ones drawn from. Weights of n ** a with 0 <= a <= 1 are
  what is called a temperature.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

from polymodal.errors import ConfigError


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
