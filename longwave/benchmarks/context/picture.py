"""The picture of `longwave bench context`: time and memory over the context, both axes logarithmic."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from longwave.benchmarks.context.growth import Curve, Exponent, curves
from longwave.benchmarks.context.run import ContextResults
from longwave.benchmarks.results.picture import INK, LINE, QUIET, colours_of, drawing, plain_axes
from longwave.units import short_bytes

_SIZE = (11.0, 7.2)
_BYTES = ("peak memory", "state")


def draw_growth(results: ContextResults, path: str | Path) -> None:
    """Draws the picture to a file; the same results give the same bytes."""
    found, colours = curves(results.rows), colours_of(row.subject for row in results.rows)
    figures = list(dict.fromkeys(curve.figure for curve in found))
    exponents = {(one.subject, one.figure): one for one in results.growth}
    with drawing(path, _SIZE, results, "in brackets: the exponent of growth") as drawn:
        for axes, figure in zip(drawn.subplots(2, 2).flat, figures, strict=True):
            for curve in found:
                if curve.figure == figure and curve.contexts:
                    _line(axes, curve, exponents.get((curve.subject, figure)), colours[curve.subject], results.stopped)
            _dress(axes, figure, results)


def _line(axes: Any, curve: Curve, growth: Exponent | None, colour: str, stopped: dict[str, str]) -> None:
    """Draws a curve, with a cross at its end if its model was stopped."""
    label = curve.subject if growth is None else f"{curve.subject} ({growth.exponent:.2f})"
    axes.plot(curve.contexts, curve.values, color=colour, marker="o", markersize=4, linewidth=1.6, label=label)
    if curve.subject in stopped:
        axes.plot(curve.contexts[-1:], curve.values[-1:], color=colour, marker="x", markersize=11, mew=1.8)
        axes.annotate("stopped", (curve.contexts[-1], curve.values[-1]), (8, 6), textcoords="offset points", fontsize=8)


def _dress(axes: Any, figure: str, results: ContextResults) -> None:
    contexts = results.options.contexts
    from matplotlib.ticker import LogLocator, NullLocator

    of_bytes = figure in _BYTES
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.margins(y=0.12)
    axes.set_xlim(contexts[0] / 1.3, 1.3 * contexts[-1])
    axes.set_xticks(contexts, [_short(context) for context in contexts])
    axes.yaxis.set_major_locator(LogLocator(2) if of_bytes else LogLocator(10, subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(lambda value, _: short_bytes(value) if of_bytes else _short_time(value))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_minor_locator(NullLocator())
    plain_axes(axes, figure, "tokens")
    axes.grid(color=LINE, linewidth=0.6)
    axes.tick_params(labelsize=8, colors=QUIET)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize=8, labelcolor=INK)


def _short_time(seconds: float) -> str:
    """Seconds as `20 ms`; `duration` would give a round number too many figures."""
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= 0.999 * size:
            return f"{seconds / size:.3g} {unit}"
    return f"{1e6 * seconds:.3g} us"


def _short(tokens: int) -> str:
    """Tokens as `64k` where they are a multiple of 1024, else in full."""
    for unit, size in (("M", 1 << 20), ("k", 1 << 10)):
        if tokens % size == 0:
            return f"{tokens // size}{unit}"
    return f"{tokens:,}"
