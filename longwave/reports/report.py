"""The page a training comparison ends in: typed data in, one self-contained `report.html` out.

The wording of the headline is written here, beside the arithmetic it rests on, and says "slower" when it is slower.
"""

# ruff: noqa: RUF001 (× is the sign people read)

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from longwave import files
from longwave.reports.page import Fact, Headline, Kind, PassageToken, finite

_PAGE = Kind("report", ("passage",))


class LossPoint(NamedTuple):
    """A loss in nats per token after `step` optimizer steps; `mode` is how a SUBLLM's tokens were chosen meanwhile."""

    step: int
    loss: float
    mode: Literal["", "threshold", "top-k"] = ""


class Generation(NamedTuple):
    prompt: str
    continuation: str


@dataclass(frozen=True)
class ModelRun:
    """One trained model: its curves, its final figures on held-out text and samples of what it writes.

    Losses are nats per token. `train` holds the loss in the mode the model trains in (top-k for a SUBLLM), which is no
    measure of quality; `held_out` and the final figures are.
    """

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
    """What one level of subsampling did in training; every share, in [0, 1], is of the tokens that enter that level.

    `kept` score above the threshold, so inference would keep them; `live` have a score in (0, 1), the only ones that
    learn; `falsely_kept` were kept by top-k although inference would drop them; `falsely_dropped` the reverse. `final`
    is the share kept in threshold mode on held-out text.
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
    """The levels, outermost first, and the final held-out loss under training's choice of tokens and inference's.

    selection: whether training chooses by top-k or, like inference, by a threshold.
    """

    levels: Sequence[RetentionLevel] = ()
    top_k_loss: float | None = None
    threshold_loss: float | None = None
    selection: Literal["top-k", "threshold"] = "top-k"


@dataclass(frozen=True)
class Bound:
    """The best a figure could be by arithmetic, and `basis`, what was counted to say so.

    A `gain` is the largest ratio to the longwave Llama of the same row (1.4: 1.4 times faster or smaller); a `floor` is
    the smallest value of the figure itself, in its unit.
    """

    value: float
    basis: str
    kind: Literal["gain", "floor"] = "gain"


@dataclass(frozen=True)
class Figure:
    """A measured quantity: the median of its repeats, the smallest and the largest. Less is better in every row."""

    median: float
    low: float
    high: float
    bound: Bound | None = None


@dataclass(frozen=True)
class Missing:
    """A figure that was not measured, and why."""

    reason: str


@dataclass(frozen=True)
class SpeedRow:
    """One quantity in three implementations: milliseconds, or bytes for `memory`, at `tokens` tokens."""

    kind: Literal["prefill", "decode", "training", "memory"]
    label: str
    tokens: int
    transformers: Figure | Missing
    llama: Figure | Missing
    subllm: Figure | Missing


@dataclass(frozen=True)
class Passage:
    """A run of held-out text as the model read it; `code` sets it in a monospaced face."""

    source: str = ""
    tokens: Sequence[PassageToken] = ()
    code: bool = False


@dataclass(frozen=True)
class Report:
    """Everything the page shows; the first of `models` is the yardstick that the second, the SUBLLM, is held to."""

    title: str
    created: str
    machine: Sequence[Fact]
    run: Sequence[Fact]
    models: Sequence[ModelRun]
    retention: Retention
    speed: Sequence[SpeedRow]
    passage: Passage
    notes: Sequence[str]
    command: str
    subtitle: str = "A Llama and a SUBLLM of one shape, trained on the same tokens."


def write_report(data: Report, path: Path) -> None:
    """Write the page of `data` to `path` in one step: whoever opens it sees the old page or the whole new one."""
    files.write_file(path, _PAGE.render(data.title, _payload(data)).encode())


# The headline: four figures in words ----------------------------------------------------------------------------------


def headline(data: Report) -> tuple[Headline, ...]:
    """The four figures at the head of the page; each says in words what was measured and against what."""
    return (
        _loss_headline(data.models),
        _speed_headline("Reading a prompt", "prefill", data.speed),
        _speed_headline("Writing a token", "decode", data.speed),
        _speed_headline("Memory of the context", "memory", data.speed),
    )


def relative_gap(model: ModelRun, yardstick: ModelRun) -> float | None:
    """How much higher `model`'s final held-out loss is, as a share of the yardstick's; None where either diverged."""
    gap = model.final_loss / yardstick.final_loss - 1 if yardstick.final_loss else math.nan
    return gap if math.isfinite(gap) else None


def _loss_headline(models: Sequence[ModelRun]) -> Headline:
    label = "Held-out loss"
    if len(models) < 2:
        return Headline(label, "—", "No second model to compare with.", "unknown")
    yardstick, model = models[0], models[1]
    gap = relative_gap(model, yardstick)
    if gap is None:
        return Headline(label, "—", "A loss is not a finite number: training diverged.", "unknown")
    sentence = (
        f"{model.name} ends at {model.final_loss:.3f} on held-out text, {yardstick.name} at "
        f"{yardstick.final_loss:.3f}; lower is better. One run each, so a small gap can be chance."
    )
    shown = f"{abs(gap):.1%}"
    if shown == "0.0%":
        return Headline(label, "level", sentence, "same")
    return Headline(label, f"{shown} {'higher' if gap > 0 else 'lower'}", sentence, "worse" if gap > 0 else "better")


def _speed_headline(label: str, kind: str, rows: Sequence[SpeedRow]) -> Headline:
    """The row of this kind at the most tokens where both figures exist; otherwise the reason why there is none."""
    candidates = sorted((row for row in rows if row.kind == kind), key=lambda row: -row.tokens)
    for row in candidates:
        if isinstance(row.llama, Figure) and isinstance(row.subllm, Figure):
            return _compare(label, row, row.llama, row.subllm)
    reasons = [cell.reason for row in candidates for cell in (row.llama, row.subllm) if isinstance(cell, Missing)]
    why = f"Not measured: {reasons[0].rstrip('.')}." if reasons else "Not measured in this run."
    return Headline(label, "—", why, "unknown")


def _compare(label: str, row: SpeedRow, llama: Figure, subllm: Figure) -> Headline:
    gain = _ratio(llama.median, subllm.median)
    parts = [f"{row.label}: SUBLLM {_show(subllm.median, row.kind)}, longwave Llama {_show(llama.median, row.kind)}."]
    overlap = subllm.low <= llama.high and llama.low <= subllm.high
    if overlap and llama.median != subllm.median:
        parts.append("The spreads of the two overlap, so the difference may be noise.")
    if subllm.bound:
        parts.append(_bound_words(subllm, llama, row.kind))
    value, verdict = _gain_words(gain, row.kind)
    return Headline(label, value, " ".join(parts), "same" if overlap else verdict)


def _gain_words(gain: float | None, kind: str) -> tuple[str, Literal["better", "worse", "same", "unknown"]]:
    if gain is None or gain <= 0:
        return "—", "unknown"
    better, worse = ("smaller", "larger") if kind == "memory" else ("faster", "slower")
    shown = f"×{max(gain, 1 / gain):.2f}"
    if shown == "×1.00":
        return "level", "same"
    return f"{shown} {better if gain > 1 else worse}", "better" if gain > 1 else "worse"


def _bound_words(figure: Figure, llama: Figure, kind: str) -> str:
    assert figure.bound
    bound, share = figure.bound, _share_of_bound(figure, llama)
    limit = f"×{bound.value:.2f}" if bound.kind == "gain" else _show(bound.value, kind)
    reached = f", of which {share:.0%} was reached" if share is not None else ""
    return f"The computed bound is {limit}{reached} ({bound.basis})."


# The speed table: each cell as it is shown ----------------------------------------------------------------------------


def _cell(figure: Figure | Missing, row: SpeedRow) -> dict[str, Any]:
    if isinstance(figure, Missing):
        return {"missing": figure.reason}
    yardstick = row.llama if isinstance(row.llama, Figure) else None
    bound, kind = figure.bound, row.kind
    return {
        "value": _show(figure.median, kind),
        "spread": None if figure.low == figure.high else f"{_show(figure.low, kind)} to {_show(figure.high, kind)}",
        "ratio": None if yardstick is None or figure is yardstick else _ratio(yardstick.median, figure.median),
        "bound": bound and (f"×{bound.value:.2f}" if bound.kind == "gain" else _show(bound.value, kind)),
        "kind": bound and bound.kind,
        "basis": bound and bound.basis,
        "share": _share_of_bound(figure, yardstick),
    }


def _share_of_bound(figure: Figure, llama: Figure | None) -> float | None:
    """Measured over bound, so that 1 is the bound itself, whichever kind of bound it is."""
    if figure.bound is None:
        return None
    if figure.bound.kind == "floor":
        return _ratio(figure.bound.value, figure.median)
    gain = None if llama is None else _ratio(llama.median, figure.median)
    return None if gain is None else _ratio(gain, figure.bound.value)


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
    return {
        "report": finite(dataclasses.asdict(data)),
        "headline": [figure._asdict() for figure in headline(data)],
        "gaps": [relative_gap(model, data.models[0]) for model in data.models],
        "cells": [[_cell(figure, row) for figure in (row.transformers, row.llama, row.subllm)] for row in data.speed],
    }
