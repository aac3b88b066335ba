"""What a growing context costs, in words: ratios to the baseline, where a model was stopped, what was computed."""

from __future__ import annotations

from longwave.benchmarks.growth import Growth, GrowthCurve, GrowthPoint
from longwave.reports.content import Report

_FIGURES = {"first_token": "time to the first token", "per_token": "time per token", "state": "state"}
_COMPUTED = (
    "Beyond the points, state is what the cost formulas give at the retention that was really kept, and times are the "
    "formulas' FLOPs and bytes at the rates that fit the points, to {misfit:.0%} at worst."
)
_UNCERTAIN = "The times of {names} scatter by more than a fifth, so they are not computed on."
_WINDOWS = (
    "The models were trained on windows of {window:,} tokens: beyond, what it costs is as shown, what it would say is "
    "not."
)


def growth_words(data: Report) -> tuple[list[str], list[str]]:
    """A sentence for each model against the baseline, and notes on how far to trust the charts."""
    if data.growth is None:
        return [], []
    names = {model.key: model.name for model in data.models}
    curves = {curve.model: curve for curve in data.growth.curves if curve.measured}
    baseline = curves.pop(data.baseline, None)
    others = curves.items() if baseline else ()
    sentences = [_against(names[key], curve, names[data.baseline], baseline) for key, curve in others if baseline]
    return [one for one in sentences if one], _notes(data.growth, names)


def _against(name: str, curve: GrowthCurve, other: str, baseline: GrowthCurve) -> str:
    """The ratios at the longest context that was measured of both, and at the longest that was computed."""
    both = {point.tokens for point in curve.measured} & {point.tokens for point in baseline.measured}
    longest = max(both, default=0)
    last = max(curve.points.keys() & baseline.points.keys(), default=0)
    parts = []
    if longest:
        ratios = _ratios(curve.points[longest], baseline.points[longest])
        parts.append(f"at {longest:,} tokens, the most that both were measured at, {name} needs {ratios} than {other}")
    if last > longest:
        parts.append(f"at {last:,} tokens, computed, {_ratios(curve.points[last], baseline.points[last])}")
    text = "; ".join(parts)
    return f"{text[:1].upper()}{text[1:]}." if text else ""


def _ratios(own: GrowthPoint, theirs: GrowthPoint) -> str:
    pairs = {words: (getattr(own, field), getattr(theirs, field)) for field, words in _FIGURES.items()}
    found = [_ratio(mine, other, words) for words, (mine, other) in pairs.items() if mine and other]
    return ", ".join(found)


def _ratio(own: float, other: float, words: str) -> str:
    return f"{max(other / own, own / other):.3g} times {'less' if own < other else 'more'} {words}"


def _notes(growth: Growth, names: dict[str, str]) -> list[str]:
    stopped = [f"{names[one.model]} was stopped: {one.stopped}." for one in growth.curves if one.stopped]
    computed = [one for one in growth.curves if one.computed]
    uncertain = [names[one.model] for one in computed if None in one.computed[0]]
    misfits = [one.misfit for one in computed if None not in one.computed[0]]
    notes = [_COMPUTED.format(misfit=max(misfits))] if misfits else []
    notes += [_UNCERTAIN.format(names=", ".join(uncertain))] if uncertain else []
    windows = [one.window for one in growth.curves if max(one.points, default=0) > one.window]
    notes += [_WINDOWS.format(window=max(windows))] if windows else []
    busy = f"; {growth.note}" if growth.note else ""
    return [*stopped, *notes, f"Measured in {growth.seconds:.0f} s in all{busy}."]
