"""The few statistics that the benchmarks use."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Sequence
from statistics import median


def quantile(values: Iterable[float], q: float) -> float:
    """The smallest value that at least the share `q` of all values do not exceed.

    An actual value, never one in between: of fewer than 100 values, the 99 % quantile is the largest.
    """
    ordered = sorted(values)
    return ordered[max(0, math.ceil(q * len(ordered)) - 1)]


def paired_ratio(above: Sequence[float | None], below: Sequence[float | None]) -> float | None:
    """The median over rounds of `above / below`; None without a round that has both.

    Two figures of one round were taken within seconds of each other, so a machine that is slow
    for a while slows both, and their ratio stays.
    """
    ratios = [a / b for a, b in zip(above, below, strict=True) if a is not None and b is not None and b > 0]
    return median(ratios) if ratios else None


def paired_difference(more: Sequence[float | None], less: Sequence[float | None]) -> float | None:
    """The median over rounds of `more - less`; None without a round that has both."""
    differences = [a - b for a, b in zip(more, less, strict=True) if a is not None and b is not None]
    return median(differences) if differences else None


def fairness(counts: Sequence[float]) -> float:
    """The worst client's share of the mean: 1 when all got the same, 0 when one got nothing."""
    mean = sum(counts) / len(counts)
    return min(counts) / mean if mean else 0.0


def thin(values: Sequence[float], most: int, rng: random.Random) -> Sequence[float]:
    """At most `most` of the values, drawn evenly, so that quantiles stay what they are."""
    return values if len(values) <= most else rng.sample(values, most)
