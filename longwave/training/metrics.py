"""Metrics of a run: `metrics.jsonl`, one JSON object per line, and TensorBoard.

When a run resumes, entries beyond its checkpoint are dropped.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from longwave import files
from longwave.errors import UserError
from longwave.files.jsonfile import finite

METRICS = "metrics.jsonl"


@runtime_checkable
class Observer(Protocol):
    """A receiver of a run's metrics, such as the metrics file, a progress bar or TensorBoard."""

    def record(self, entry: dict[str, Any]) -> None:
        """Takes the entry of one step: a `step`, and figures by name, None for one that is not finite."""
        ...

    def close(self) -> None:
        """Called when the run is over."""
        ...


class MetricsFile:
    """Appends every `every`-th entry and every evaluation to a file.

    resumed_at: the step of the checkpoint from which the run continues (0: none); entries after it are dropped first,
    since the run repeats their steps.
    """

    def __init__(self, path: Path, resumed_at: int, every: int = 1) -> None:
        self._every = every
        kept = [entry for entry in read_metrics(path) if entry["step"] <= resumed_at] if resumed_at else []
        write_metrics(path, kept)
        self._file = path.open("a", encoding="utf8")

    def record(self, entry: dict[str, Any]) -> None:
        """Writes the entry as a line, and flushes it, if its step is due; a skipped update is always told."""
        is_due = entry["step"] == 1 or not entry["step"] % self._every
        if is_due or "held_out_loss" in entry or "skipped" in entry:
            self._file.write(_line(entry))
            self._file.flush()

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The entries of a metrics file; [] if there is no file. Lines that a crash or a power cut spoiled are left out."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf8", errors="replace").splitlines()
    return [entry for entry in map(_entry, lines) if entry is not None]


def _entry(line: str) -> dict[str, Any] | None:
    """The entry in a line; None if it is none."""
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return entry if isinstance(entry, dict) and isinstance(entry.get("step"), int) else None


def write_metrics(path: Path, entries: Iterable[dict[str, Any]]) -> None:
    """Writes a whole metrics file; a reader sees the old one or the new one, never a part."""
    files.write_file(path, "".join(map(_line, entries)).encode())


def _line(entry: dict[str, Any]) -> str:
    """An entry as a line of JSON, which has null where a figure is not finite."""
    return json.dumps(finite(entry), allow_nan=False) + "\n"


class TensorBoard:
    """Writes the numbers of every entry as TensorBoard scalars; scalars of steps after `resumed_at` are hidden."""

    def __init__(self, folder: Path, resumed_at: int = 0) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise UserError("training.tensorboard = true: needs a package; pip install 'longwave[track]'") from None
        self._writer = SummaryWriter(str(folder), purge_step=resumed_at + 1)

    def record(self, entry: dict[str, Any]) -> None:
        """Writes every number of the entry; a list gives a scalar for each index."""
        for name, value in entry.items():
            values = value if isinstance(value, list) else [value]
            for index, one in enumerate(values):
                if isinstance(one, int | float) and name != "step":
                    self._writer.add_scalar(f"{name}/{index}" if value is values else name, one, entry["step"])

    def close(self) -> None:
        """Flushes and closes the event file."""
        self._writer.close()
