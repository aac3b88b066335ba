"""A picture of the results: a panel per quantity and size, bars of time with their spread beside the bound."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from io import BytesIO
from math import ceil
from pathlib import Path
from typing import Any

from longwave import files
from longwave.benchmarks.results.results import Results, Row
from longwave.benchmarks.results.table import beside_bound, by_place, heading
from longwave.errors import UserError, require

_SUFFIXES = (".svg", ".png")
INK, QUIET, LINE = "#20242a", "#646b76", "#e3e1da"
_PAPER = "#ffffff"
_COLOURS = ("#1f65ad", "#b9691c", "#6d7480", "#2d8a68", "#7a4fa3")
_COLUMNS = 2


def check_picture(path: str | Path) -> None:
    """UserError for a name that is not .svg or .png, and where matplotlib is not installed."""
    suffix = Path(path).suffix
    require(suffix in _SUFFIXES, f"plot = {path}: name a file that ends in {' or '.join(_SUFFIXES)}")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise UserError("plot: matplotlib is not installed; pip install 'longwave[plot]'") from None


def draw(results: Results, path: str | Path) -> None:
    """Draws the picture to a file; the same results give the same bytes."""
    groups = by_place(results.rows)
    colours = colours_of(row.subject for row in results.rows)
    columns, lines = min(_COLUMNS, len(groups)), ceil(len(groups) / _COLUMNS)
    height = 0.9 + lines * (0.75 + 0.34 * max(map(len, groups)))
    legend = "solid: up to the bound · pale: beyond it · line: spread of the rounds"
    with drawing(path, (6.2 * columns, height), results, legend) as figure:
        axes = figure.subplots(lines, columns, squeeze=False)
        for index, place in enumerate(axes.flat):
            if index < len(groups):
                _panel(place, groups[index], colours)
            else:
                place.set_axis_off()


@contextmanager
def drawing(path: str | Path, size: tuple[float, float], results: Results, legend: str) -> Iterator[Any]:
    """A figure of the given size in inches, with the heading of the results; it is written when the context ends."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    style: dict[Any, Any] = {
        "svg.hashsalt": "longwave",
        "font.family": "sans-serif",
        "font.size": 9,
        "text.color": INK,
    }
    with matplotlib.rc_context(style):
        layout = ConstrainedLayoutEngine(h_pad=0.12, w_pad=0.15, rect=(0, 0, 1, 1 - 0.6 / size[1]))
        figure = Figure(figsize=size, facecolor=_PAPER, layout=layout)
        _head(figure, results, legend, size[1])
        yield figure
        files.write_file(path, _encoded(figure, Path(path).suffix[1:]))


def colours_of(subjects: Iterable[str]) -> dict[str, str]:
    """A colour for every name, in the order in which names first appear."""
    return {name: _COLOURS[index % len(_COLOURS)] for index, name in enumerate(dict.fromkeys(subjects))}


def plain_axes(axes: Any, title: str, unit: str) -> None:
    """Axes without a frame but for a grey line below; the title on the left, the horizontal axis' unit on the right."""
    axes.set_title(title, loc="left", fontsize=9.5, weight="bold")
    axes.set_xlabel(unit, color=QUIET, fontsize=8, loc="right", labelpad=1)
    axes.tick_params(length=0, colors=QUIET)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(LINE)
    axes.set_axisbelow(True)


def _head(figure: Any, results: Results, legend: str, height: float) -> None:
    first, *models = heading(results).splitlines()
    figure.text(0.01, 1 - 0.12 / height, f"longwave bench {first}", fontsize=10, weight="bold", va="top")
    figure.text(0.01, 1 - 0.36 / height, "   ".join([*models, legend]), fontsize=8, color=QUIET, va="top")


def _panel(axes: Any, rows: list[Row], colours: dict[str, str]) -> None:
    """Draws a bar of milliseconds for each row, the first row on top."""
    for level, row in enumerate(rows):
        time, bound, colour = 1e3 * row.timing.median, 1e3 * row.bound, colours[row.subject]
        axes.barh(level, time, height=0.56, color=colour, alpha=0.32)
        axes.barh(level, min(time, bound), height=0.56, color=colour)
        axes.plot([1e3 * row.timing.low, 1e3 * row.timing.high], [level, level], color=INK, linewidth=1.1)
        axes.plot([bound, bound], [level - 0.36, level + 0.36], color=INK, linewidth=1.6)
        beside = max(1e3 * row.timing.high, bound)
        axes.annotate(beside_bound(row), (beside, level), (5, 0), textcoords="offset points", va="center", fontsize=8)
    axes.set_yticks(range(len(rows)), [row.subject for row in rows])
    axes.set_ylim(len(rows) - 0.45, -0.55)
    axes.set_xlim(0, 1.7 * max(1e3 * max(row.timing.high, row.bound) for row in rows))
    plain_axes(axes, rows[0].place, "ms")
    axes.tick_params(axis="y", labelcolor=INK)
    axes.grid(axis="x", color=LINE, linewidth=0.6)


def _encoded(figure: Any, format: str) -> bytes:
    buffer = BytesIO()
    undated = {"Date": None} if format == "svg" else {"Software": None}
    figure.savefig(buffer, format=format, dpi=160, metadata=undated, facecolor=_PAPER)
    return buffer.getvalue()
