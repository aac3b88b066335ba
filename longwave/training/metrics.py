"""`metrics.jsonl`: one JSON object per line, appended as a run goes, cut back to the checkpoint when it resumes."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from longwave import files
from longwave.errors import UserError


@runtime_checkable
class Observer(Protocol):
    """Whoever watches a run: the metrics file, a progress bar, TensorBoard."""

    def record(self, entry: dict[str, Any]) -> None:
        """Takes one entry, which has a `step`."""
        ...

    def close(self) -> None:
        """The run is over."""
        ...


class MetricsFile:
    """Appends every `every`-th entry and every evaluation to a file; entries beyond `resumed_at` are dropped first."""

    def __init__(self, path: Path, resumed_at: int, every: int = 1) -> None:
        self._every = every
        kept = [entry for entry in read_metrics(path) if entry["step"] <= resumed_at] if resumed_at else []
        write_metrics(path, kept)
        self._file = path.open("a", encoding="utf8")

    def record(self, entry: dict[str, Any]) -> None:
        """Writes one line at once."""
        if entry["step"] % self._every and entry["step"] != 1 and "held_out_loss" not in entry:
            return
        self._file.write(json.dumps(entry) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Every complete entry of a metrics file; none if there is no file. A line cut by a crash is left out."""
    if not path.exists():
        return []
    entries = []
    for line in path.read_text(encoding="utf8").splitlines():
        try:
            entries.append(json.loads(line))
        except ValueError:
            continue
    return entries


def write_metrics(path: Path, entries: Iterable[dict[str, Any]]) -> None:
    """Writes a whole metrics file in one step."""
    files.write_file(path, "".join(json.dumps(entry) + "\n" for entry in entries).encode())


class TensorBoard:
    """The numbers of every entry as TensorBoard scalars; what was shown beyond `resumed_at` is taken back."""

    def __init__(self, folder: Path, resumed_at: int = 0) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise UserError("training.tensorboard = true needs tensorboard: pip install 'longwave[track]'") from None
        self._writer = SummaryWriter(str(folder), purge_step=resumed_at + 1)

    def record(self, entry: dict[str, Any]) -> None:
        """Writes every number, lists by index."""
        for name, value in entry.items():
            values = value if isinstance(value, list) else [value]
            for index, one in enumerate(values):
                if isinstance(one, int | float) and name != "step":
                    self._writer.add_scalar(f"{name}/{index}" if value is values else name, one, entry["step"])

    def close(self) -> None:
        """Flushes the event file."""
        self._writer.close()
