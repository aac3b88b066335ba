"""The curves of a report: means over seeds with their intervals, and gaps to the baseline, paired by seed.

A loss is in nats per token, or in bits per byte where models read text through different tokenizers.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from itertools import chain
from statistics import fmean
from typing import Literal, NamedTuple

from longwave.intervals import Interval, mean_interval, paired
from longwave.reports.content import LossPoint, ModelRun, SeedRun

Axis = Literal["tokens", "flops", "seconds"]
AXES: tuple[Axis, ...] = ("tokens", "flops", "seconds")
_MOST = 300  # points of a curve of training
_TOGETHER = 0.02  # ends of two runs that lie no further apart count as one


class BandPoint(NamedTuple):
    """A mean over seeds after so many optimizer steps, with its interval; None where a seed's loss is not finite."""

    tokens: float
    flops: float
    seconds: float
    mean: float | None
    low: float | None = None
    high: float | None = None


class GapPoint(NamedTuple):
    """The relative difference to the baseline where both have spent as much, `x`, with its interval over seeds."""

    x: float
    mean: float
    low: float | None = None
    high: float | None = None


# Figures at the end of training ---------------------------------------------------------------------------------------


def final(run: SeedRun, comparable: bool) -> float:
    """The final loss, or where losses do not compare the bits per byte; lower is better."""
    return run.final_loss if comparable else run.bits_per_byte


def final_mean(model: ModelRun, comparable: bool) -> Interval | None:
    """The mean over seeds; None where a run has diverged."""
    return mean_over_seeds([final(run, comparable) for run in model.runs])


def final_gap(model: ModelRun, baseline: ModelRun, comparable: bool) -> Interval | None:
    """The relative difference of the final figures, paired by seed; None where a run has diverged."""
    pairs = [(final(ours, comparable), final(theirs, comparable)) for ours, theirs in _pairs(model, baseline)]
    usable = all(math.isfinite(value) and value > 0 for value in chain(*pairs))
    return _difference(pairs) if usable else None


def _difference(pairs: Sequence[tuple[float, float]]) -> Interval:
    return paired([own for own, _ in pairs], [other for _, other in pairs])


def mean_over_seeds(values: Sequence[float | None]) -> Interval | None:
    """The mean of one value for each seed; None where one is not finite."""
    known = [value for value in values if value is not None and math.isfinite(value)]
    return mean_interval(known) if known and len(known) == len(values) else None


def _pairs(model: ModelRun, baseline: ModelRun) -> list[tuple[SeedRun, SeedRun]]:
    """The runs that belong together: those of one seed; where no seed is shared any two will do, if less exactly."""
    theirs = {run.seed: run for run in baseline.runs}
    same = [(run, theirs[run.seed]) for run in model.runs if run.seed in theirs]
    return same or list(zip(model.runs, baseline.runs, strict=False))


# Curves of one model --------------------------------------------------------------------------------------------------


def held_out_curve(model: ModelRun, comparable: bool) -> list[BandPoint]:
    """The held-out losses, a point for every step at which all seeds were evaluated."""
    points = []
    for row in _rows([_measured(run, run.held_out, comparable) for run in model.runs]):
        found = mean_over_seeds([point.loss for point in row])
        values = (found.mean, found.low, found.high) if found else (None,)
        points.append(BandPoint(*_spent(row), *values))
    return points


def training_curve(model: ModelRun, comparable: bool) -> list[BandPoint]:
    """The training losses, averaged over seeds and over neighbouring steps to at most 300 points."""
    rows = _rows([_measured(run, run.train, comparable) for run in model.runs])
    buckets = [list(chain(*rows[start:stop])) for start, stop in spans(len(rows))]
    return [BandPoint(*_spent(bucket), _known_mean([point.loss for point in bucket])) for bucket in buckets]


def spans(count: int) -> list[tuple[int, int]]:
    """The places of `count` values in at most 300 groups of neighbours, as starts and stops."""
    groups = min(count, _MOST)
    return [(group * count // groups, (group + 1) * count // groups) for group in range(groups)]


def _known_mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None and math.isfinite(value)]
    return fmean(known) if known else None


def _rows(curves: Sequence[Sequence[LossPoint]]) -> list[list[LossPoint]]:
    """The points of all curves step by step, at the steps that all of them have."""
    by_step = [{point.step: point for point in curve} for curve in curves]
    shared = set.intersection(*map(set, by_step))
    return [[points[step] for points in by_step] for step in sorted(shared)]


def _spent(points: Sequence[LossPoint]) -> tuple[float, float, float]:
    tokens, flops, seconds = (fmean(getattr(point, axis) for point in points) for axis in AXES)
    return tokens, flops, seconds


def _measured(run: SeedRun, points: Sequence[LossPoint], comparable: bool) -> list[LossPoint]:
    """The points in the unit of comparison; bits per byte by the tokens per byte of all held-out text."""
    if comparable:
        return list(points)
    factor = run.bits_per_byte / run.final_loss if run.final_loss else math.nan
    return [point._replace(loss=None if point.loss is None else _finite(point.loss * factor)) for point in points]


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


# Gaps to the baseline -------------------------------------------------------------------------------------------------


def gap_curve(model: ModelRun, baseline: ModelRun, axis: Axis, comparable: bool) -> list[GapPoint]:
    """The model's held-out loss relative to the baseline's where both have spent as much, a point for each evaluation.

    The baseline's loss there is interpolated between its evaluations, in the logarithms of loss and of what was spent,
    in which curves of training are nearly straight.
    """
    pairs = _pairs(model, baseline)
    curves = [_curve(theirs, axis, comparable) for _, theirs in pairs]
    found = [_measured(ours, ours.held_out, comparable) for ours, _ in pairs]
    points = (_gap(row, curves, axis) for row in _rows(found))
    return [point for point in points if point is not None]


class _Curve(NamedTuple):
    """A baseline's finite losses, over what had been spent: both ascending lists of the same length."""

    spent: list[float]
    losses: list[float]

    def at(self, spent: float) -> float | None:
        """The loss when so much had been spent; None where the curve does not reach."""
        if not self.spent or not self.spent[0] <= spent <= self.spent[-1] * (1 + _TOGETHER):
            return None
        right = min(bisect_left(self.spent, spent), len(self.spent) - 1)
        if self.spent[right] <= spent:
            return self.losses[right]
        left = right - 1
        share = math.log(spent / self.spent[left]) / math.log(self.spent[right] / self.spent[left])
        return self.losses[left] * (self.losses[right] / self.losses[left]) ** share


def _curve(run: SeedRun, axis: Axis, comparable: bool) -> _Curve:
    points = _measured(run, run.held_out, comparable)
    known = {getattr(point, axis): point.loss for point in points if point.loss and getattr(point, axis) > 0}
    spent = sorted(known)
    return _Curve(spent, [known[one] for one in spent])


def _gap(row: Sequence[LossPoint], curves: Sequence[_Curve], axis: Axis) -> GapPoint | None:
    """The mean over seeds; None where one has no finite loss, or its baseline has not been tried there."""
    pairs = [(point.loss, curve.at(getattr(point, axis))) for point, curve in zip(row, curves, strict=True)]
    known = [(own, other) for own, other in pairs if own is not None and other is not None]
    if len(known) < len(pairs):
        return None
    found = _difference(known)
    return GapPoint(fmean(getattr(point, axis) for point in row), found.mean, found.low, found.high)


def end_together(models: Sequence[ModelRun], axis: Axis) -> bool:
    """Whether all runs have spent the same in the end, to two percent."""
    ends = [getattr(run.end, axis) for model in models for run in model.runs if run.end]
    return not ends or max(ends) <= min(ends) * (1 + _TOGETHER)
