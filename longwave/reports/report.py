"""The report about a comparison of trained models: from typed data to one self-contained `report.html`.

A report holds any number of models; the others are compared with one of them, the baseline. The wording of the headline
stands here beside its arithmetic, and says "slower" when a model is slower.
"""

# ruff: noqa: RUF001 (× is the sign people read)

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Literal, NamedTuple

from longwave import files
from longwave.files.jsonfile import finite
from longwave.reports.page import Fact, Headline, Kind, PassageToken

_PAGE = Kind("report", ("passage",))


class LossPoint(NamedTuple):
    """A loss in nats per token after `step` optimizer steps. mode: how a SUBLLM selected tokens for it."""

    step: int
    loss: float
    mode: Literal["", "threshold", "top-k"] = ""


class Generation(NamedTuple):
    """A sample of a model's text."""

    prompt: str
    continuation: str


@dataclass(frozen=True)
class ModelRun:
    """A trained model: its loss curves, its final figures on held-out text, and samples of its text.

    key: identifies the model within a report and in speed rows. name: the name that is shown.
    train, held_out: losses in nats per token. `train` is with tokens selected as in training (top-k for a SUBLLM),
    which says nothing about quality; `held_out` and the final figures do.
    """

    key: str
    name: str
    parameters: int
    layout: str
    train: Sequence[LossPoint]
    held_out: Sequence[LossPoint]
    final_loss: float
    bits_per_byte: float
    perplexity: float
    generations: Sequence[Generation] = ()


@dataclass(frozen=True)
class RetentionLevel:
    """The selection of one level of subsampling during training. Shares are of the tokens entering it, in [0, 1].

    target: nominal share of tokens kept. steps: the optimizer steps of the following shares, one each.
    kept: tokens with a score above the threshold, which inference would keep. live: tokens with a score in (0, 1); only
    these learn. falsely_kept: tokens kept by top-k that inference would drop; falsely_dropped: the reverse.
    final: the share kept on held-out text, selected as at inference.
    """

    name: str
    target: float
    steps: Sequence[int]
    kept: Sequence[float]
    live: Sequence[float]
    falsely_kept: Sequence[float]
    falsely_dropped: Sequence[float]
    final: float | None = None

    def __post_init__(self) -> None:
        for field in ("kept", "live", "falsely_kept", "falsely_dropped"):
            if (length := len(getattr(self, field))) != len(self.steps):
                raise ValueError(
                    f"{self.name}: {field} has {length} values; steps has {len(self.steps)}, one value each"
                )


@dataclass(frozen=True)
class Retention:
    """The levels of subsampling, outermost first, and the final held-out loss with tokens selected in two ways.

    top_k_loss: with tokens selected as in training. threshold_loss: as at inference. selection: how training selects:
    by top-k or, like inference, by a threshold.
    """

    levels: Sequence[RetentionLevel] = ()
    top_k_loss: float | None = None
    threshold_loss: float | None = None
    selection: Literal["top-k", "threshold"] = "top-k"


@dataclass(frozen=True)
class Bound:
    """The best possible value of a figure, by arithmetic.

    basis: the quantities that were counted for it, in words. kind: a `gain` is the largest possible ratio to the
    baseline of the same row (1.4: 1.4 times faster or smaller), a `floor` the smallest possible figure, in its unit.
    """

    value: float
    basis: str
    kind: Literal["gain", "floor"] = "gain"


@dataclass(frozen=True)
class Figure:
    """A measured quantity: the median, the smallest and the largest of its repeats. Less is always better.

    rounds: the repeats in order, for figures that were measured in turn; those of one row are compared round by round,
    so that what slows the machine for a while does not count.
    """

    median: float
    low: float
    high: float
    bound: Bound | None = None
    rounds: Sequence[float] = ()


@dataclass(frozen=True)
class Missing:
    """A figure that was not measured. reason: why, in words."""

    reason: str


@dataclass(frozen=True)
class SpeedRow:
    """A quantity at a context of `tokens` tokens. figures: by model key, in milliseconds, or in bytes for `memory`."""

    kind: Literal["prefill", "decode", "training", "memory"]
    label: str
    tokens: int
    figures: Mapping[str, Figure | Missing]


@dataclass(frozen=True)
class Speed:
    """Speed and memory of models. columns: the titles of the models' columns by key, in order.

    Models that were timed but not trained here, such as another library's, have a column too. Every row needs a figure
    for every column (ValueError). note: how busy the machine was with other work. disturbed: whether that was enough to
    disturb the figures.
    """

    columns: Mapping[str, str]
    rows: Sequence[SpeedRow]
    note: str = ""
    disturbed: bool = False

    def __post_init__(self) -> None:
        for row in self.rows:
            if set(row.figures) != set(self.columns):
                raise ValueError(
                    f"{row.label}: figures of {', '.join(row.figures)}; columns: {', '.join(self.columns)}"
                )


@dataclass(frozen=True)
class Passage:
    """A passage of held-out text as a model read it. code: whether it is shown in a monospaced face."""

    source: str = ""
    tokens: Sequence[PassageToken] = ()
    code: bool = False


@dataclass(frozen=True)
class Report:
    """The content of a report. baseline: the key of the model among `models` with which the others are compared.

    curve_note: how the held-out losses along the training differ from the final ones, where they do.
    """

    title: str
    created: str
    machine: Sequence[Fact]
    run: Sequence[Fact]
    models: Sequence[ModelRun]
    baseline: str
    retention: Retention
    speed: Speed
    passage: Passage
    notes: Sequence[str]
    command: str
    subtitle: str = ""
    curve_note: str = ""

    def __post_init__(self) -> None:
        keys = [model.key for model in self.models]
        if self.baseline not in keys:
            raise ValueError(f"baseline = {self.baseline!r}: no such model; the models are {', '.join(keys)}")


def write_report(data: Report, path: Path) -> None:
    """Writes the page of `data` to `path`; a reader sees the old page or the whole new one."""
    files.write_file(path, _PAGE.render(data.title, _payload(data)).encode())


_BEYOND = "the timing is noisy, or the baseline is further from its own bound"

# The headline: figures in words ---------------------------------------------------------------------------------------

_SPEED_HEADLINES = {"prefill": "Reading a prompt", "decode": "Writing a token", "memory": "Memory of the context"}


def headline(data: Report) -> tuple[Headline, ...]:
    """Four figures for every model but the baseline, each with a sentence that says what was compared with what."""
    baseline, others = baseline_of(data), [model for model in data.models if model.key != data.baseline]
    if not others:
        return (Headline("Held-out loss", "—", "No second model to compare with.", "unknown"),)

    def label(quantity: str, model: ModelRun) -> str:
        return quantity if len(others) == 1 else f"{quantity}, {model.name}"

    found = [_loss_headline(label("Held-out loss", model), model, baseline) for model in others]
    for kind, quantity in _SPEED_HEADLINES.items():
        found += [_speed_headline(label(quantity, one), kind, data.speed, data.baseline, one.key) for one in others]
    return tuple(found)


def baseline_of(data: Report) -> ModelRun:
    """The model with which the others are compared."""
    return next(model for model in data.models if model.key == data.baseline)


def relative_gap(model: ModelRun, baseline: ModelRun) -> float | None:
    """The difference of the final held-out losses as a share of the baseline's; None where either run diverged."""
    gap = model.final_loss / baseline.final_loss - 1 if baseline.final_loss else math.nan
    return gap if math.isfinite(gap) else None


def _loss_headline(label: str, model: ModelRun, baseline: ModelRun) -> Headline:
    gap = relative_gap(model, baseline)
    if gap is None:
        return Headline(label, "—", "A loss is not a finite number: training diverged.", "unknown")
    sentence = (
        f"{model.name} ends at {model.final_loss:.3f} on held-out text, {baseline.name} at "
        f"{baseline.final_loss:.3f}, over all of it; lower is better. One run each, so a small gap can be chance."
    )
    shown = f"{abs(gap):.1%}"
    if shown == "0.0%":
        return Headline(label, "level", sentence, "same")
    return Headline(label, f"{shown} {'higher' if gap > 0 else 'lower'}", sentence, "worse" if gap > 0 else "better")


class _Column(NamedTuple):
    """A figure of a row and the title of its column."""

    title: str
    figure: Figure


def _speed_headline(label: str, kind: str, speed: Speed, baseline: str, model: str) -> Headline:
    """The comparison at the most tokens for which both models have a figure of this kind; else why there is none."""
    reasons: list[str] = []
    for row in sorted((row for row in speed.rows if row.kind == kind), key=lambda row: -row.tokens):
        figures = {key: row.figures[key] for key in (baseline, model) if key in row.figures}
        found = [_Column(speed.columns[key], one) for key, one in figures.items() if isinstance(one, Figure)]
        if len(found) == 2:
            return _compare(label, row, *found)
        reasons += [one.reason for one in figures.values() if isinstance(one, Missing)]
    why = f"Not measured: {reasons[0].rstrip('.')}." if reasons else "Not measured in this run."
    return Headline(label, "—", why, "unknown")


class _Gain(NamedTuple):
    """How many times less a figure is than the baseline's: the median, the least and the most."""

    median: float
    low: float
    high: float

    @property
    def is_certain(self) -> bool:
        """Whether the figure was always on the same side of the baseline's."""
        return self.low > 1 or self.high < 1


def _gain(figure: Figure, baseline: Figure) -> _Gain | None:
    """The gain over the baseline: round by round where both have rounds, else of the medians; None where one is 0."""
    if figure.rounds and len(figure.rounds) == len(baseline.rounds):
        gains = [_ratio(theirs, own) for own, theirs in zip(figure.rounds, baseline.rounds, strict=True)]
        known = [gain for gain in gains if gain is not None]
        return _Gain(median(known), min(known), max(known)) if len(known) == len(gains) else None
    pairs = ((baseline.median, figure.median), (baseline.low, figure.high), (baseline.high, figure.low))
    found = [_ratio(*pair) for pair in pairs]
    return None if None in found else _Gain(*(gain for gain in found if gain is not None))


def _compare(label: str, row: SpeedRow, baseline: _Column, model: _Column) -> Headline:
    own, reference = model.figure, baseline.figure
    shown = (f"{one.title} {_show(one.figure.median, row.kind)}" for one in (model, baseline))
    parts, gain = [f"{row.label}: {', '.join(shown)}."], _gain(own, reference)
    if gain is not None and not gain.is_certain and reference.median != own.median:
        parts.append(_doubt_words(gain, bool(own.rounds)))
    if own.bound:
        parts.append(_bound_words(own, reference, row.kind))
    value, verdict = _gain_words(gain and gain.median, row.kind)
    return Headline(label, value, " ".join(parts), "same" if gain and not gain.is_certain else verdict)


def _doubt_words(gain: _Gain, by_round: bool) -> str:
    if by_round:
        return f"From round to round it was ×{gain.low:.2f} to ×{gain.high:.2f}, so the difference may be noise."
    return "The spreads of the two overlap, so the difference may be noise."


def _gain_words(gain: float | None, kind: str) -> tuple[str, Literal["better", "worse", "same", "unknown"]]:
    if gain is None or gain <= 0:
        return "—", "unknown"
    better, worse = ("smaller", "larger") if kind == "memory" else ("faster", "slower")
    shown = f"×{max(gain, 1 / gain):.2f}"
    if shown == "×1.00":
        return "level", "same"
    return f"{shown} {better if gain > 1 else worse}", "better" if gain > 1 else "worse"


def _bound_words(figure: Figure, baseline: Figure, kind: str) -> str:
    assert figure.bound
    bound, share = figure.bound, _share_of_bound(figure, baseline)
    limit = f"×{bound.value:.2f}" if bound.kind == "gain" else _show(bound.value, kind)
    if share is not None and share > 1:
        return f"That is beyond the computed bound of {limit} ({bound.basis}): {_BEYOND}."
    reached = f", of which {share:.0%} was reached" if share is not None else ""
    return f"The computed bound is {limit}{reached} ({bound.basis})."


# The speed table: each cell as it is shown ----------------------------------------------------------------------------


def _cell(figure: Figure | Missing, reference: Figure | Missing | None, kind: str) -> dict[str, Any]:
    if isinstance(figure, Missing):
        return {"missing": figure.reason}
    bound, baseline = figure.bound, reference if isinstance(reference, Figure) else None
    gain = None if baseline is None or figure is baseline else _gain(figure, baseline)
    return {
        "value": _show(figure.median, kind),
        "spread": None if figure.low == figure.high else f"{_show(figure.low, kind)} to {_show(figure.high, kind)}",
        "ratio": gain and gain.median,
        "ratios": f"×{gain.low:.2f} to ×{gain.high:.2f}" if gain and figure.rounds and gain.low != gain.high else None,
        "bound": bound and (f"×{bound.value:.2f}" if bound.kind == "gain" else _show(bound.value, kind)),
        "kind": bound and bound.kind,
        "basis": bound and bound.basis,
        "share": _share_of_bound(figure, baseline),
    }


def _share_of_bound(figure: Figure, baseline: Figure | None) -> float | None:
    """The share of the bound that the figure reaches, for either kind of bound; 1 is the bound itself."""
    if figure.bound is None:
        return None
    if figure.bound.kind == "floor":
        return _ratio(figure.bound.value, figure.median)
    gain = None if baseline is None else _gain(figure, baseline)
    return None if gain is None else _ratio(gain.median, figure.bound.value)


def _ratio(over: float, under: float) -> float | None:
    return over / under if under and math.isfinite(over / under) else None


def _show(value: float, kind: str) -> str:
    """Milliseconds or bytes to three or four digits, in the unit that fits."""
    if kind == "memory":
        power = min(int(math.log(value, 1024)), 4) if value >= 1 else 0
        return f"{_digits(value / 1024**power)} {('B', 'KiB', 'MiB', 'GiB', 'TiB')[power]}"
    if value >= 10_000:
        return f"{_digits(value / 1000)} s"
    return f"{_digits(value)} ms" if value >= 0.1 else f"{_digits(value * 1000)} µs"


def _digits(value: float) -> str:
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:,.0f}"


# The page -------------------------------------------------------------------------------------------------------------


def _payload(data: Report) -> dict[str, Any]:
    baseline, columns = baseline_of(data), data.speed.columns
    return {
        "report": finite(dataclasses.asdict(data)),
        "headline": [figure._asdict() for figure in headline(data)],
        "gaps": [None if model is baseline else relative_gap(model, baseline) for model in data.models],
        "columns": list(columns.values()),
        "cells": [
            [_cell(row.figures[key], row.figures.get(data.baseline), row.kind) for key in columns]
            for row in data.speed.rows
        ],
    }
