"""Means and shares and what they allow to be said: t-intervals, differences in pairs, and intervals of a share."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist, fmean, stdev

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Interval:
    """A mean with its confidence interval. low, high: None where one value tells of no spread."""

    mean: float
    low: float | None = None
    high: float | None = None

    @property
    def excludes_zero(self) -> bool:
        """Whether all of the interval lies on one side of zero; False without an interval."""
        return self.low is not None and self.high is not None and self.low * self.high > 0


def mean_interval(values: Sequence[float], confidence: float = CONFIDENCE) -> Interval:
    """The mean of values drawn alike, and the t-interval that holds their true mean with the given confidence."""
    mean = fmean(values)
    if len(values) < 2:
        return Interval(mean)
    half = t_quantile((1 + confidence) / 2, len(values) - 1) * stdev(values) / math.sqrt(len(values))
    return Interval(mean, mean - half, mean + half)


def paired(ours: Sequence[float], theirs: Sequence[float], confidence: float = CONFIDENCE) -> Interval:
    """The relative difference, ours / theirs - 1, of values that belong together pair by pair, as runs of one seed."""
    return mean_interval([own / other - 1 for own, other in zip(ours, theirs, strict=True)], confidence)


def wilson(right: int, rows: int, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Wilson's interval of a share (1927): where a binomial share could lie of which `right` of `rows` were seen."""
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    share, spread = right / rows, z * z / rows
    middle = (share + spread / 2) / (1 + spread)
    half = z / (1 + spread) * math.sqrt(share * (1 - share) / rows + spread / (4 * rows))
    return max(0.0, middle - half), min(1.0, middle + half)


def t_quantile(probability: float, freedom: int) -> float:
    """The value that Student's t with `freedom` (1 or more) degrees of freedom stays below; probability from 0.5."""
    low, high = 0.0, 1.0
    while _t_below(high, freedom) < probability:
        high *= 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if _t_below(middle, freedom) < probability else (low, middle)
    return high


def _t_below(value: float, freedom: int) -> float:
    """P(t <= value) for value >= 0: the finite sums of Abramowitz and Stegun, 26.7.3 and 26.7.4."""
    angle = math.atan(value / math.sqrt(freedom))
    cosine = math.cos(angle)
    odd = freedom % 2
    term = total = cosine if odd else 1.0
    for k in range(2 + odd, freedom - 1, 2):
        term *= cosine * cosine * (k - 1) / k
        total += term
    if not odd:
        return 0.5 + math.sin(angle) * total / 2
    return 0.5 + (angle + (math.sin(angle) * total if freedom > 1 else 0)) / math.pi
