"""The words and figures of a report: its headline, which says "slower" when a model is slower, and its speed table."""

# ruff: noqa: RUF001 (× is the sign people read)

import math
from statistics import median
from typing import Any, NamedTuple

from longwave.intervals import Interval
from longwave.reports.content import Figure, Missing, ModelRun, Report, Speed, SpeedRow
from longwave.reports.curves import final_gap, final_mean
from longwave.reports.page import Headline, Verdict

_BEYOND = "the timing is noisy, or the baseline is further from its own bound"

# The headline: figures in words ---------------------------------------------------------------------------------------

_SPEED_HEADLINES = {"prefill": "Reading a prompt", "decode": "Writing a token", "memory": "Memory of the context"}


def headline(data: Report) -> tuple[Headline, ...]:
    """The final loss of every model against the baseline's, and its speed and memory where they were measured.

    Each figure has a sentence that says what was compared with what.
    """
    if not data.others:
        return (Headline(_quality(data), "—", "No second model to compare with.", "unknown"),)
    found = [_loss_headline(model, data) for model in data.others]
    for kind, quantity in _SPEED_HEADLINES.items():
        if any(row.kind == kind for row in data.speed.rows):
            found += [_speed_headline(quantity, kind, data.speed, data.baseline, one.key) for one in data.others]
    if len(data.others) == 1:
        return tuple(found)
    names = [model.name for model in data.others]
    return tuple(figure._replace(about=names[index % len(names)]) for index, figure in enumerate(found))


def _quality(data: Report) -> str:
    return "Held-out loss" if data.loss_comparable else "Bits per byte"


def _loss_headline(model: ModelRun, data: Report) -> Headline:
    label, baseline = _quality(data), data.yardstick
    gap = final_gap(model, baseline, data.loss_comparable)
    ends = [final_mean(one, data.loss_comparable) for one in (model, baseline)]
    if gap is None or None in ends:
        return Headline(label, "—", "A loss is not a finite number: training diverged.", "unknown")
    own, reference = (f"{end.mean:.3f}" for end in ends if end is not None)
    sentence = (
        f"{model.name} ends at {own} on held-out text, {baseline.name} at {reference}, over all of it; lower is "
        f"better. {_certainty(gap, len(model.runs))}"
    )
    shown = f"{abs(gap.mean):.1%}"
    if shown == "0.0%":
        return Headline(label, "level", sentence, "same")
    verdict: Verdict = "worse" if gap.mean > 0 else "better"
    told_apart = gap.low is None or gap.excludes_zero
    value = f"{shown} {'higher' if gap.mean > 0 else 'lower'}"
    return Headline(label, value, sentence, verdict if told_apart else "same")


def _certainty(gap: Interval, runs: int) -> str:
    """How sure a gap is, in a sentence."""
    if gap.low is None or gap.high is None:
        return "One run each, so a small gap can be chance." if runs == 1 else "One pair of runs, so it can be chance."
    verdict = "" if gap.excludes_zero else ": not told apart"
    return f"Means of {runs} runs; the gap lies between {gap.low:+.1%} and {gap.high:+.1%} (95%){verdict}."


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


def _gain_words(gain: float | None, kind: str) -> tuple[str, Verdict]:
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


def cell(figure: Figure | Missing, reference: Figure | Missing | None, kind: str) -> dict[str, Any]:
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
