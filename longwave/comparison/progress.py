"""Progress of a whole comparison on stderr: a bar in a terminal, a line every few seconds elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from longwave.comparison.runs import Line, Run
from longwave.progress import say, shown_loss

_EVERY = 10.0  # seconds between lines outside a terminal


class Watch:
    """Shows how far the runs of some lines are, by their FLOPs. on: whether anything is shown."""

    def __init__(self, lines: Sequence[Line], on: bool) -> None:
        self._total, self._on = float(sum(line.flops for line in lines)), on
        self._done: dict[str, float] = {}
        self._started = self._spoken = time.monotonic()
        self._before: float | None = None
        self._bar = _bar() if on and sys.stderr.isatty() else None
        if self._bar is not None:
            self._bar.start()
            self._task = self._bar.add_task("comparing", total=self._total, facts="")

    def __call__(self, number: int, run: Run, entry: dict[str, Any]) -> None:
        """Shows the entry of a step; the number of its line tells nothing that the run does not."""
        self._done[str(run.folder)] = float(entry["flops"])
        done = sum(self._done.values())
        self._before = done if self._before is None else self._before
        facts = f"{run.words()}: step {entry['step']}/{run.recipe.steps}  loss {shown_loss(entry['loss'])}"
        if self._bar is not None:
            self._bar.update(self._task, completed=min(done, self._total), facts=facts)
        elif self._on and time.monotonic() - self._spoken >= _EVERY:
            self._spoken = time.monotonic()
            say(f"{done / self._total:.0%}{self._left(done)}  {facts}")

    def finished(self, run: Run) -> None:
        """Counts a run as done, which a session found finished."""
        self._done[str(run.folder)] = float(run.recipe.steps * run.recipe.step_flops)

    def close(self) -> None:
        """Stops the bar, which stays on the screen."""
        if self._bar is not None:
            self._bar.stop()

    def _left(self, done: float) -> str:
        """The time that the rest will take at the pace of this session."""
        pace = (done - (self._before or 0.0)) / max(time.monotonic() - self._started, 1e-9)
        if pace <= 0:
            return ""
        minutes = (self._total - done) / pace / 60
        return f", {max(minutes, 0):.0f} min left"


def _bar() -> Progress:
    texts = (TextColumn(text, markup=False) for text in ("{task.description}", "{task.fields[facts]}"))
    name, facts = texts
    columns = (name, BarColumn(), TaskProgressColumn(), TimeRemainingColumn(), facts)
    return Progress(*columns, console=Console(stderr=True))
