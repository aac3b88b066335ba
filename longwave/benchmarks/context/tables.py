"""Growing contexts as text for people: tables of the figures, of how they grow, and why a model went no further."""

from __future__ import annotations

from rich.console import RenderableType
from rich.table import Table

from longwave.benchmarks.context.growth import Growth
from longwave.benchmarks.context.run import ContextResults
from longwave.benchmarks.table import heading, table, tables


def context_views(results: ContextResults) -> list[RenderableType]:
    """What it ran on and what to know of it, and the tables."""
    _, *quantities, _bars = tables(results)
    growth = [growth_table(results.growth)] if results.growth else []
    stopped = [f"{name} stopped: {reason}" for name, reason in results.stopped.items()]
    return ["\n".join([heading(results), *results.notes]), *quantities, *growth, *stopped]


def growth_table(growths: list[Growth]) -> Table:
    """Exponents, and the contexts that they were fitted over."""
    lines = [
        [one.figure, one.subject, f"{one.exponent:.2f}", f"{one.last:.2f}", _over(one.contexts)] for one in growths
    ]
    title = "growth: figure ~ context ^ exponent (least squares of the logarithms)"
    return table(title, ["figure", "model", "exponent", "last two", "over"], lines)


def _over(contexts: tuple[int, ...]) -> str:
    return f"{len(contexts)} points, {contexts[0]:,} - {contexts[-1]:,}"
