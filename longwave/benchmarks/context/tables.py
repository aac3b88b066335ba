"""The results of `longwave bench context` as tables: the figures, how they grow, and why a model was stopped."""

from __future__ import annotations

from rich.console import RenderableType
from rich.table import Table

from longwave.benchmarks.context.growth import Exponent
from longwave.benchmarks.context.run import ContextResults
from longwave.benchmarks.results.table import heading, table, tables


def context_tables(results: ContextResults) -> list[RenderableType]:
    """The heading with the notes, a table per quantity, the table of growth, and a line for each stopped model."""
    _, *quantities, _bars = tables(results)
    growth = [growth_table(results.growth)] if results.growth else []
    stopped = [f"{name} stopped: {reason}" for name, reason in results.stopped.items()]
    return ["\n".join([heading(results), *results.notes]), *quantities, *growth, *stopped]


def growth_table(exponents: list[Exponent]) -> Table:
    """The exponents of growth, and the contexts that they were fitted over."""
    lines = [
        [one.figure, one.subject, f"{one.exponent:.2f}", f"{one.last:.2f}", _over(one.contexts)] for one in exponents
    ]
    title = "growth: figure ~ context ^ exponent (least squares of the logarithms)"
    return table(title, ["figure", "model", "exponent", "last two", "over"], lines)


def _over(contexts: tuple[int, ...]) -> str:
    return f"{len(contexts)} points, {contexts[0]:,} - {contexts[-1]:,}"
