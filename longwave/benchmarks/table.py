"""Results of a benchmark: a table for people, and one JSON object."""

from __future__ import annotations

import dataclasses
import platform
from importlib.metadata import version
from typing import Any

import torch
from rich import box
from rich.console import Group
from rich.table import Table

from longwave.benchmarks.bench import Results, Row
from longwave.device import device_of
from longwave.doctor import cpu_name

_COLUMNS = ("context", "batch", "model", "time", "spread", "tokens/s")
_COMPARED = ("time ratio", "by bounds", "gain of bound")
_DERIVED = ("mfu", "mbu", "of_bound", "gain_of_bound")


def tables(results: Results) -> Group:
    """What it ran on, and one table per quantity; the bound of decoding is of bytes, the others' of FLOPs."""
    quantities = dict.fromkeys(row.quantity for row in results.rows)
    views = [_table(quantity, [row for row in results.rows if row.quantity == quantity]) for quantity in quantities]
    return Group(_heading(results), *views)


def to_json(results: Results) -> dict[str, Any]:
    """Plain values: what it ran on, what was asked for, and every row with all it knows."""
    return {
        "kind": results.kind,
        "hardware": hardware(results),
        "models": results.models,
        "options": dataclasses.asdict(results.options),
        "peaks": dataclasses.asdict(results.peaks),
        "rows": [_plain(row) for row in results.rows],
    }


def hardware(results: Results) -> dict[str, Any]:
    """What the numbers belong to."""
    device = device_of(results.options.device)
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "dtype": results.options.dtype,
    }


def _heading(results: Results) -> str:
    facts = hardware(results)
    peaks = f"{results.peaks.flops / 1e9:,.0f} GFLOP/s, {results.peaks.bandwidth / 1e9:,.1f} GB/s"
    lines = [f"{results.kind} in {facts['dtype']} on {facts['device']}, {facts['threads']} threads; measured: {peaks}"]
    return "\n".join([*lines, *(f"{name}: {layout}" for name, layout in results.models.items())])


def _table(quantity: str, rows: list[Row]) -> Table:
    columns = _columns(rows)
    view = Table(title=quantity, title_justify="left", box=box.SIMPLE_HEAD)
    for column in columns:
        view.add_column(column, justify="left" if column == "model" else "right", no_wrap=True)
    for row, following in zip(rows, [*rows[1:], None], strict=True):
        last = following is None or (row.context, row.batch) != (following.context, following.batch)
        view.add_row(*(_cell(row, column) for column in columns), end_section=last)
    return view


def _columns(rows: list[Row]) -> list[str]:
    """Those that have something to say about these rows."""
    columns = [*_COLUMNS, "MBU" if rows[0].quantity == "decode" else "MFU"]
    columns += _COMPARED if rows[0].ratio is not None else ()
    columns += ["retention"] if any(row.retention for row in rows) else ()
    return columns + (["state", "reserved"] if rows[0].state_used is not None else [])


def _cell(row: Row, column: str) -> str:
    timing = row.timing
    cells = {
        "context": lambda: f"{row.context:,}",
        "batch": lambda: str(row.batch),
        "model": lambda: row.subject,
        "time": lambda: _seconds(timing.median),
        "spread": lambda: f"{_seconds(timing.low)} - {_seconds(timing.high)}",
        "tokens/s": lambda: f"{row.tokens / timing.median:,.1f}",
        "MFU": lambda: f"{row.mfu:.0%}",
        "MBU": lambda: f"{row.mbu:.0%}",
        "time ratio": lambda: f"{row.ratio:.3f}",
        "by bounds": lambda: f"{row.bound_ratio:.3f}",
        "gain of bound": lambda: f"{row.gain_of_bound:.3f}",
        "retention": lambda: " ".join(f"{share:.3f}" for share in row.retention),
        "state": lambda: _mib(row.state_used or 0),
        "reserved": lambda: _mib(row.state_reserved or 0),
    }
    return cells[column]()


def _seconds(seconds: float) -> str:
    return f"{seconds:.3f} s" if seconds >= 1 else f"{1000 * seconds:.2f} ms"


def _mib(count: int) -> str:
    return f"{count / 2**20:.1f} MiB"


def _plain(row: Row) -> dict[str, Any]:
    own = {name: value for name, value in dataclasses.asdict(row).items() if name not in ("timing", "peaks")}
    timing = row.timing
    seconds = {"median": timing.median, "low": timing.low, "high": timing.high, "all": list(timing.seconds)}
    derived = {name: getattr(row, name) for name in _DERIVED}
    return own | {"seconds": seconds, "tokens_per_second": row.tokens / timing.median} | derived
