"""Progress of a whole comparison on stderr: a bar in a terminal, a line every few seconds elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from longwave.comparison.runs import Line, Run
from longwave.progress import say, shown_loss, warnings_of

_EVERY = 10.0  # seconds between lines outside a terminal


class Watch:
    """Shows how far the runs of some lines are, by their FLOPs. on: whether anything is shown."""

    def __init__(self, lines: Sequence[Line], on: bool) -> None:
        self._total, self._on = float(sum(line.flops for line in lines)), on
        self._done: dict[str, float] = {}
        self._spoken = time.monotonic()
        self._began: tuple[float, float] | None = None  # the time of this session's first step, and what was done then
        self._bar = _bar() if on and sys.stderr.isatty() else None
        if self._bar is not None:
            self._bar.start()
            self._task = self._bar.add_task("comparing", total=self._total, facts="")

    def __call__(self, number: int, run: Run, entry: dict[str, Any]) -> None:
        """Shows the entry of a step; the number of its line tells nothing that the run does not."""
        self._done[str(run.folder)] = float(entry["flops"])
        done, now = sum(self._done.values()), time.monotonic()
        self._began = self._began or (now, done)
        facts = f"{run.words()}: step {entry['step']}/{run.recipe.steps}  loss {shown_loss(entry['loss'])}"
        self._warn(run, entry)
        if self._bar is not None:
            self._bar.update(self._task, completed=min(done, self._total), facts=facts)
        elif self._on and now - self._spoken >= _EVERY:
            self._spoken = now
            say(f"{done / self._total:.0%}{self._left(done, now)}  {facts}")

    def _warn(self, run: Run, entry: dict[str, Any]) -> None:
        for warning in warnings_of(entry) if self._on else ():
            line = f"{run.words()}: step {entry['step']}: {warning}"
            self._bar.console.print(line, markup=False) if self._bar is not None else say(line)

    def finished(self, run: Run) -> None:
        """Counts a run as done, which a session found finished."""
        self._done[str(run.folder)] = float(run.recipe.steps * run.recipe.step_flops)

    def close(self) -> None:
        """Stops the bar, which stays on the screen."""
        if self._bar is not None:
            self._bar.stop()

    def _left(self, done: float, now: float) -> str:
        """The time that the rest will take at the pace of this session."""
        since, before = self._began or (now, done)
        if done <= before or now - since < _EVERY / 2:
            return ""
        return f", {(self._total - done) * (now - since) / (done - before) / 60:.0f} min left"


def _bar() -> Progress:
    texts = (TextColumn(text, markup=False) for text in ("{task.description}", "{task.fields[facts]}"))
    name, facts = texts
    columns = (name, BarColumn(), TaskProgressColumn(), TimeRemainingColumn(), facts)
    return Progress(*columns, console=Console(stderr=True))
