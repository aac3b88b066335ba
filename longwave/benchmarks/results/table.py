"""Results of a benchmark as text for people: tables, and bars of time beside the bound."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby

from rich import box
from rich.console import Console, RenderableType
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from longwave.benchmarks.measure.profile import Spent
from longwave.benchmarks.results.results import Results, Row
from longwave.units import short_bytes

_COMPARED = ("time ratio", "by bounds", "gain of bound")
_LEFT = ("model", "figure", "form", "checked", "part", "verdict")
_BAR, _KINDS = 40, 10  # characters of the longest bar, and kinds of parts that are told apart
_SOLID, _LIGHT, _AHEAD = "█", "░", "·"
_PASSES = ("forward", "backward")


def show(*views: RenderableType) -> None:
    """Prints tables and text; a table that is wider than the terminal is printed at its full width, never cut."""
    console = Console()
    for view in views:
        wide = console.options.update(max_width=1 << 16)
        Console(width=max(console.width, Measurement.get(console, wide, view).maximum)).print(view)


def tables(results: Results) -> list[RenderableType]:
    """The heading, one table per quantity, and the bars."""
    quantities = dict.fromkeys(row.quantity for row in results.rows)
    views = [_table(quantity, [row for row in results.rows if row.quantity == quantity]) for quantity in quantities]
    return [heading(results), *views, bars(results.rows)]


def heading(results: Results) -> str:
    """The kind of benchmark, the hardware with its measured peaks, and a line for each model."""
    facts = results.hardware
    peaks = f"{results.peaks.flops / 1e9:,.0f} GFLOP/s, {results.peaks.bandwidth / 1e9:,.1f} GB/s"
    threads = f"{facts['threads']} thread{'s' if facts['threads'] > 1 else ''}"
    lines = [f"{results.kind} in {facts['dtype']} on {facts['device']}, {threads}; measured: {peaks}"]
    return "\n".join([*lines, *(f"{name}: {model.layout}" for name, model in results.models.items())])


def by_place(rows: Iterable[Row]) -> list[list[Row]]:
    """The rows in groups of one quantity and size, which are compared with each other."""
    return [list(group) for _, group in groupby(rows, lambda row: row.place)]


def table(title: str, columns: Sequence[str], lines: Iterable[Sequence[str] | None]) -> Table:
    """A table of cells by column; None in place of a line of cells draws a rule."""
    view = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, min_width=len(title))
    for column in columns:
        view.add_column(column, justify="left" if column in _LEFT else "right", no_wrap=True)
    for line in lines:
        if line is None:
            view.add_section()
        else:
            view.add_row(*line)
    return view


def _table(quantity: str, rows: list[Row]) -> Table:
    columns = _columns(rows)
    lines: list[Sequence[str] | None] = []
    for together in by_place(rows):
        lines += [*([_cell(row, column) for column in columns] for row in together), None]
    return table(quantity, columns, lines)


def _columns(rows: list[Row]) -> list[str]:
    """The columns for which these rows have figures."""
    first, of_op = rows[0], rows[0].error is not None
    columns = ["context", "batch", "form" if of_op else "model", "time", "spread", "bound"]
    columns += ["MBU" if first.mbu > first.mfu else "MFU", *(() if of_op else ("tokens/s",))]
    columns += _COMPARED if any(row.ratio is not None for row in rows) else ()
    columns += ["retention"] if any(row.retention for row in rows) else ()
    columns += ["state", "reserved"] if first.state_used is not None else ()
    columns += ["formula"] if first.state_formula is not None else ()
    columns += ["peak memory"] if first.peak_memory is not None else ()
    return columns + (["error", "checked"] if of_op else [])


def _cell(row: Row, column: str) -> str:
    timing = row.timing
    cells = {
        "context": lambda: f"{row.context:,}",
        "batch": lambda: str(row.batch),
        "model": lambda: row.subject,
        "form": lambda: row.subject,
        "time": lambda: duration(timing.median),
        "spread": lambda: f"{duration(timing.low)} - {duration(timing.high)}",
        "bound": lambda: duration(row.bound),
        "tokens/s": lambda: f"{row.tokens / timing.median:,.1f}",
        "MFU": lambda: f"{row.mfu:.0%}",
        "MBU": lambda: f"{row.mbu:.0%}",
        "time ratio": lambda: _ratio(row.ratio),
        "by bounds": lambda: _ratio(row.bound_ratio),
        "gain of bound": lambda: _ratio(row.gain_of_bound),
        "retention": lambda: " ".join(f"{share:.3f}" for share in row.retention),
        "state": lambda: short_bytes(row.state_used or 0),
        "reserved": lambda: short_bytes(row.state_reserved or 0),
        "formula": lambda: short_bytes(row.state_formula or 0),
        "peak memory": lambda: short_bytes(row.peak_memory or 0),
        "error": lambda: "" if row.error is None else f"{row.error:.1e}",
        "checked": lambda: row.checked or "",
    }
    return cells[column]()


def _ratio(ratio: float | None) -> str:
    """The ratio in three decimals, or an empty cell where there is no reference."""
    return "" if ratio is None else f"{ratio:.3f}"


def bars(rows: Sequence[Row]) -> Text:
    """A bar of time for every row, its part up to the bound solid; those of one quantity and size share a scale."""
    text, width = Text(), max((len(row.subject) for row in rows), default=0)
    for together in by_place(rows):
        longest = max(max(row.timing.median, row.bound) for row in together)
        text.append(f"{together[0].place}\n", "bold")
        for row in together:
            text.append(f"  {row.subject:<{width}}  {_bar(row, longest)}  {beside_bound(row)}\n")
    return text.append(f"  {_SOLID} up to the bound  {_LIGHT} beyond it  {_AHEAD} less than the bound", "dim")


def beside_bound(row: Row) -> str:
    """The time and the bound in words."""
    return f"{duration(row.timing.median)}, bound {duration(row.bound)} ({row.of_bound:.0%})"


def _bar(row: Row, longest: float) -> str:
    time, bound = (round(_BAR * seconds / longest) for seconds in (row.timing.median, row.bound))
    solid = min(time, bound)
    return (_SOLID * solid + _LIGHT * (time - solid) + _AHEAD * (bound - solid)).ljust(_BAR)


def where_time_went(title: str, spent: Mapping[str, Spent]) -> Table:
    """A table of the time of one traced task by kind of part, with one row for the sum of the smallest kinds."""
    whole = sum(one.seconds for one in spent.values())
    shown, small = dict(list(spent.items())[:_KINDS]), list(spent.items())[_KINDS:]
    if small:
        calls, forward, backward = (sum(getattr(one, name) for _, one in small) for name in ("calls", *_PASSES))
        shown[f"{len(small)} others"] = Spent(calls, forward, backward)
    passes = [name for name in _PASSES if any(getattr(one, name) for one in shown.values())]
    lines = [
        [kind, f"{one.calls or ''}", *(duration(getattr(one, name)) for name in passes), f"{one.seconds / whole:.0%}"]
        for kind, one in shown.items()
    ]
    return table(title, ["part", "calls", *passes, "share"], lines)


def duration(seconds: float) -> str:
    """Seconds in a unit that gives about four figures."""
    if seconds >= 1:
        return f"{seconds:.3f} s"
    return f"{1e3 * seconds:.2f} ms" if seconds >= 1e-3 else f"{1e6 * seconds:.1f} us"
