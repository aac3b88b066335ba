"""Progress of long work on stderr: a bar in a terminal, a line every few seconds elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class TrainingProgress:
    """Shows loss, tokens per second and time left of a training run: an `Observer` for `Trainer.watch`.

    steps: of the whole run. done: steps run before this session. every_seconds: between lines outside a terminal.
    """

    def __init__(self, name: str, steps: int, done: int = 0, every_seconds: float = 10.0) -> None:
        self._name, self._steps, self._every = name, steps, every_seconds
        self._first, self._started, self._spoken = done, time.monotonic(), 0.0
        self._bar = _bar() if sys.stderr.isatty() else None
        if self._bar is not None:
            self._bar.start()
            self._task = self._bar.add_task(name, total=steps, completed=done, facts="")

    def record(self, entry: dict[str, Any]) -> None:
        """Shows the entry of one step."""
        facts = f"loss {shown_loss(entry['loss'])}  {entry['tokens_per_second']:,.0f} tokens/s"
        if "held_out_loss" in entry:
            facts += f"  held-out {shown_loss(entry['held_out_loss'])}"
        self._warn(entry)
        if self._bar is not None:
            self._bar.update(self._task, completed=entry["step"], facts=facts)
        elif time.monotonic() - self._spoken >= self._every or entry["step"] == self._steps:
            self._spoken = time.monotonic()
            say(f"{self._name}: step {entry['step']}/{self._steps}  {facts}  {self._left(entry['step'])}")

    def _warn(self, entry: dict[str, Any]) -> None:
        for warning in warnings_of(entry):
            line = f"{self._name}: step {entry['step']}: {warning}"
            self._bar.console.print(line, markup=False) if self._bar is not None else say(line)

    def close(self) -> None:
        """Stops the bar, which stays on the screen."""
        if self._bar is not None:
            self._bar.stop()

    def _left(self, step: int) -> str:
        pace = (time.monotonic() - self._started) / max(1, step - self._first)
        return f"{pace * (self._steps - step):.0f} s left"


def shown_loss(loss: float | None, digits: int = 3) -> str:
    """A loss for people; None is one that is not finite."""
    return "not finite" if loss is None else f"{loss:.{digits}f}"


def warnings_of(entry: Mapping[str, Any]) -> list[str]:
    """Sentences about a step of training that went wrong, which people want to see wherever it falls."""
    found = []
    if entry.get("skipped"):
        found.append("its gradient is not finite (NaN or infinity), so its update was skipped")
    if entry.get("held_out_loss", 0.0) is None:
        found.append("the held-out loss is not finite")
    return found


def _bar() -> Progress:
    name, facts = (TextColumn(text, markup=False) for text in ("{task.description}", "{task.fields[facts]}"))
    columns = (name, BarColumn(), MofNCompleteColumn(), facts)
    return Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True))


def say(message: str) -> None:
    """Prints a line about the present stage of the work to stderr; where nobody listens any more, the work goes on."""
    with suppress(OSError):
        print(message, file=sys.stderr, flush=True)
