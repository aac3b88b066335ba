"""A comparison: the results of its runs, means over seeds, and what the intervals allow to be said."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Literal

from longwave.comparison.budgets import Budget, equal_words
from longwave.comparison.grid import Choice
from longwave.comparison.results import Result
from longwave.errors import require
from longwave.intervals import Interval, mean_interval, paired
from longwave.reports.content import Speed, Statement

Measure = Literal["loss", "bits_per_byte"]
_NAMES: dict[Measure, str] = {"loss": "held-out loss", "bits_per_byte": "bits per byte"}


@dataclass(frozen=True)
class Row:
    """One model at one budget, over all its seeds.

    loss, bits_per_byte: means over seeds. gap: to the first model, relative, paired by seed; None for that model
    itself, and where no seed is shared. tokens, flops, seconds: means; seconds of training alone. ended: number of
    runs that diverged.
    """

    model: str
    setting: str
    budget: Budget
    seeds: tuple[int, ...]
    parameters: int
    layout: str
    tokens: float
    flops: float
    seconds: float
    loss: Interval | None
    bits_per_byte: Interval | None
    retention: tuple[float, ...]
    gap: Interval | None
    ended: int = 0


@dataclass(frozen=True)
class Comparison:
    """The outcome of a comparison.

    measure: what is compared, `loss` or, where tokenizers differ, `bits_per_byte`. rows: every model at every budget.
    choices: of a grid, for every model. statements: one for every model but the first, at every budget.
    notes: of what the comparison leaves open. results: of every run at its model's best setting. speed: of the models
    that were trained here, which is no part of what comparisons can be equal in.
    """

    measure: Measure
    rows: tuple[Row, ...]
    choices: tuple[Choice, ...]
    statements: tuple[Statement, ...]
    notes: tuple[str, ...]
    results: tuple[Result, ...]
    speed: Speed = field(default=Speed({}, ()), compare=False)


def summarised(results: Sequence[Result], choices: Sequence[Choice] = ()) -> Comparison:
    """The comparison of finished runs, each at its model's setting; the first model is the one to compare with.

    UserError for runs that cannot be compared: of no common unit of budget, or one model in two settings.
    """
    require(bool(results), "no results: give some")
    _check(results)
    models = _models(results)
    results = sorted(results, key=lambda one: (models.index(one.model), one.budget, one.seed))
    measure: Measure = "loss" if len({one.data["tokenizer"] for one in results}) == 1 else "bits_per_byte"
    rows = tuple(_rows(results, measure))
    statements = tuple(_statement(row, rows, measure) for row in rows if row.model != rows[0].model)
    notes = (*_notes(results, measure), *(choice.words() for choice in choices if choice.at_edge))
    return Comparison(measure, rows, tuple(choices), statements, notes, tuple(results))


def _check(results: Sequence[Result]) -> None:
    units = sorted({one.budget.unit for one in results})
    require(len(units) == 1, f"budgets in {' and in '.join(units)}: compare those of one unit")
    for model in _models(results):
        settings = sorted({str(dict(one.setting)) for one in results if one.model == model})
        require(len(settings) == 1, f"{model}: results of {len(settings)} settings ({', '.join(settings)}); give one")
    seen = [(one.model, one.budget, one.seed) for one in results]
    double = [one for one in results if seen.count((one.model, one.budget, one.seed)) > 1]
    require(not double, f"{double[0].words() if double else ''}: two results of this run; give one")


def _models(results: Sequence[Result]) -> list[str]:
    """The names of the models, in the order of their first results."""
    return list(dict.fromkeys(one.model for one in results))


def _rows(results: Sequence[Result], measure: Measure) -> Iterable[Row]:
    models = _models(results)
    for budget in sorted({one.budget for one in results}):
        at = {name: [one for one in results if (one.model, one.budget) == (name, budget)] for name in models}
        for name in models:
            if at[name]:
                yield _row(at[name], at[models[0]] if name != models[0] else [], measure)


def _row(runs: Sequence[Result], baseline: Sequence[Result], measure: Measure) -> Row:
    first = runs[0]
    retention = [one.retention for one in runs if one.retention]
    return Row(
        first.model,
        ", ".join(f"{key} = {value}" for key, value in first.setting.items()),
        first.budget,
        tuple(one.seed for one in runs),
        first.parameters,
        first.layout,
        fmean(one.tokens for one in runs),
        fmean(one.flops for one in runs),
        fmean(one.seconds.training for one in runs),
        _mean(one.loss for one in runs),
        _mean(one.bits_per_byte for one in runs),
        tuple(fmean(level) for level in zip(*retention, strict=True)),
        _gap(runs, baseline, measure),
        sum(bool(one.ended) for one in runs),
    )


def _mean(values: Iterable[float | None]) -> Interval | None:
    """The mean over seeds; None where a run diverged, since the others alone would flatter the model."""
    found = list(values)
    known = [value for value in found if value is not None and math.isfinite(value)]
    return mean_interval(known) if len(known) == len(found) else None


def _gap(runs: Sequence[Result], baseline: Sequence[Result], measure: Measure) -> Interval | None:
    theirs = {one.seed: getattr(one, measure) for one in baseline}
    pairs = [(getattr(one, measure), theirs[one.seed]) for one in runs if one.seed in theirs]
    if not pairs or None in [value for pair in pairs for value in pair]:
        return None
    return paired([own for own, _ in pairs], [other for _, other in pairs])


def _statement(row: Row, rows: Sequence[Row], measure: Measure) -> Statement:
    first = next((one for one in rows if one.model == rows[0].model and one.budget == row.budget), None)
    several = len({one.budget for one in rows}) > 1
    where = equal_words(row.budget.unit) + (f", {row.budget.words()}" if several else "")
    if first is None or row.gap is None:
        why = f"{row.ended or (first.ended if first else 0)} of the runs diverged" if first else "no run of it"
        return Statement(f"{row.model} and {rows[0].model} cannot be compared {where}: {why}.", "unknown")
    shared = len(set(row.seeds) & set(first.seeds))
    return said(row.model, first.model, row.gap, f"{where} ({_seeds(shared)})", measure)


def said(model: str, other: str, gap: Interval, where: str, measure: Measure = "loss") -> Statement:
    """The sentence that a gap allows: which is lower and by how much, or that the two are not told apart."""
    quantity = "" if measure == "loss" else f" in {_NAMES[measure]}"
    if gap.low is None or gap.high is None:
        side = f"{abs(gap.mean):.1%} {'higher' if gap.mean > 0 else 'lower'}"
        return Statement(
            f"{model} is {side} than {other}{quantity} {where}; no interval, so it can be chance.", "unknown"
        )
    if not gap.excludes_zero:
        spread = f"{gap.low:+.1%} to {gap.high:+.1%}"
        return Statement(f"{model} and {other} are not told apart{quantity} {where}: {spread}.", "same")
    small, large = sorted((abs(gap.low), abs(gap.high)))
    side = "higher" if gap.mean > 0 else "lower"
    text = f"{model} is {small:.1%} to {large:.1%} {side} than {other}{quantity} {where}."
    return Statement(text, "worse" if gap.mean > 0 else "better")


def _seeds(count: int) -> str:
    return f"{count} seed" if count == 1 else f"{count} seeds"


def _notes(results: Sequence[Result], measure: Measure) -> Iterable[str]:
    if measure == "bits_per_byte":
        yield "The models have different tokenizers, so they are compared in bits per byte only."
    orders = {(one.data["tokens"], *_batch(one)) for one in results}
    if len(orders) > 1 and measure == "loss":
        yield "The models did not see the same tokens in the same order: data, windows or batches differ."
    seeds = {model: {one.seed for one in results if one.model == model} for model in _models(results)}
    if any(len(found) < 2 for found in seeds.values()):
        yield "One seed tells of no spread, so there is no interval: seeds of one recipe differ, often by a percent."
    if len({frozenset(found) for found in seeds.values()}) > 1:
        yield "The models have different seeds; differences are of the seeds that both have."
    if len({one.threads for one in results}) > 1:
        yield "The runs had different numbers of threads, so their times cannot be compared."


def _batch(result: Result) -> tuple[int, int]:
    training = result.recipe["training"]
    return training["window"], training["batch_windows"]
