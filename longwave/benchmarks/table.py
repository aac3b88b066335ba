"""Results of a benchmark: a table for people, and one JSON object."""

from __future__ import annotations

import dataclasses
import platform
from importlib.metadata import version
from typing import Any

import torch
from rich.table import Table

from longwave.benchmarks.bench import Results, Row
from longwave.device import device_of
from longwave.doctor import cpu_name

_COLUMNS = ("context", "batch", "model", "time", "spread", "tokens/s", "MFU", "MBU", "of bound")
_COMPARED = ("time ratio", "bound ratio", "gain of bound")
_DERIVED = ("mfu", "mbu", "of_bound", "gain_of_bound")


def table(results: Results) -> Table:
    """One line per row, the quantities apart."""
    compared = any(row.ratio is not None for row in results.rows)
    view = Table(title=_title(results), title_justify="left")
    view.add_column("quantity")
    for column in (*_COLUMNS, *(_COMPARED if compared else ()), "retention", "state (reserved)"):
        view.add_column(column, justify="left" if column == "model" else "right")
    for row, following in zip(results.rows, [*results.rows[1:], None], strict=True):
        last = following is None or (row.quantity, row.context, row.batch) != _place(following)
        view.add_row(*_cells(row, compared), end_section=last)
    return view


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


def _title(results: Results) -> str:
    facts = hardware(results)
    peaks = f"{results.peaks.flops / 1e9:,.0f} GFLOP/s and {results.peaks.bandwidth / 1e9:,.1f} GB/s, measured"
    lines = [f"{results.kind}, {facts['dtype']}: {facts['device']}, {facts['threads']} threads, {peaks}"]
    return "\n".join([*lines, *(f"{name}: {layout}" for name, layout in results.models.items())])


def _place(row: Row) -> tuple[str, int, int]:
    return row.quantity, row.context, row.batch


def _cells(row: Row, compared: bool) -> list[str]:
    timing, ratios = row.timing, (row.ratio, row.bound_ratio, row.gain_of_bound)
    return [
        row.quantity,
        f"{row.context:,}",
        str(row.batch),
        row.subject,
        _seconds(timing.median),
        f"{_seconds(timing.low)} - {_seconds(timing.high)}",
        f"{row.tokens / timing.median:,.1f}",
        f"{row.mfu:.0%}",
        f"{row.mbu:.0%}",
        f"{row.of_bound:.0%}",
        *((f"{ratio:.3f}" if ratio is not None else "" for ratio in ratios) if compared else ()),
        " ".join(f"{share:.3f}" for share in row.retention),
        "" if row.state_used is None else f"{_mib(row.state_used)} ({_mib(row.state_reserved or 0)})",
    ]


def _seconds(seconds: float) -> str:
    return f"{seconds:.3f} s" if seconds >= 1 else f"{1000 * seconds:.2f} ms"


def _mib(count: int) -> str:
    return f"{count / 2**20:.1f} MiB"


def _plain(row: Row) -> dict[str, Any]:
    derived = {name: getattr(row, name) for name in _DERIVED}
    seconds = {"median": row.timing.median, "low": row.timing.low, "high": row.timing.high}
    own = {name: value for name, value in dataclasses.asdict(row).items() if name not in ("timing", "peaks")}
    return (
        own
        | {"seconds": seconds, "samples": list(row.timing.seconds), "per_second": row.tokens / row.timing.median}
        | derived
    )
