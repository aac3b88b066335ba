"""How figures grow with the context: exponents, by least squares of log figure on log tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import log
from statistics import linear_regression

from longwave.benchmarks.results.results import Row

PREFILL, DECODE = "time to first token", "decode"


@dataclass(frozen=True)
class Curve:
    """A figure of one model over the contexts; values of 0 are left out, since they have no logarithm."""

    subject: str
    figure: str
    contexts: tuple[int, ...]
    values: tuple[float, ...]


@dataclass(frozen=True)
class Exponent:
    """The exponent of figure ~ context ** exponent, over all contexts of a curve; last: over the last two alone."""

    subject: str
    figure: str
    exponent: float
    last: float
    contexts: tuple[int, ...]


def curves(rows: Sequence[Row]) -> list[Curve]:
    """The curve of every figure and model, figure by figure."""
    figures = {
        PREFILL: (PREFILL, lambda row: row.timing.median),
        "time per decoded token": (DECODE, lambda row: row.timing.median),
        "peak memory": (PREFILL, lambda row: row.peak_memory),
        "state": (DECODE, lambda row: row.state_used),
    }
    models = dict.fromkeys(row.subject for row in rows)
    found = []
    for figure, (quantity, value) in figures.items():
        for model in models:
            own = [row for row in rows if (row.quantity, row.subject) == (quantity, model) and (value(row) or 0) > 0]
            points = tuple(row.context for row in own), tuple(float(value(row)) for row in own)
            found.append(Curve(model, figure, *points))
    return found


def exponents(rows: Sequence[Row]) -> list[Exponent]:
    """The exponents of all curves of two contexts or more."""
    return list(_exponents(curves(rows)))


def _exponents(found: Sequence[Curve]) -> Iterator[Exponent]:
    for curve in found:
        if len(curve.contexts) < 2:
            continue
        tokens, values = ([log(one) for one in axis] for axis in (curve.contexts, curve.values))
        exponent, last = (linear_regression(tokens[start:], values[start:]).slope for start in (0, -2))
        yield Exponent(curve.subject, curve.figure, exponent, last, curve.contexts)
