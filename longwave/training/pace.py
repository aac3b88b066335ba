"""The speed of training here, measured on the first steps of a run that is thrown away."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from tempfile import TemporaryDirectory
from typing import Any

from longwave.errors import require
from longwave.training.loop import Run
from longwave.training.objective import AnyObjective, Maker
from longwave.training.recipe import Recipe

_STEPS, _WARM_UP = 4, 2


class _Enough(Exception):
    """Enough steps were timed."""


class _Stopwatch:
    """An observer that ends a run once some of its steps are timed, and so many seconds have passed."""

    def __init__(self, least: float) -> None:
        self._least = least
        self.seconds: list[float] = []
        self._since = self._started = time.monotonic()

    def record(self, entry: dict[str, Any]) -> None:
        now = time.monotonic()
        self.seconds.append(now - self._since)
        self._since = now
        enough = len(self.seconds) >= _WARM_UP + _STEPS
        if enough and now - self._started > self._least:
            raise _Enough

    def close(self) -> None:
        return


def step_seconds(recipe: Recipe, make: Maker[AnyObjective], seconds: float) -> float:
    """Seconds of an optimizer step of a recipe's run, measured for at least `seconds`."""
    watch = _Stopwatch(seconds)
    with TemporaryDirectory(prefix="longwave-pace-") as folder, suppress(_Enough):
        run = Run(
            replace(recipe, training=replace(recipe.training, evaluate_every=0, checkpoint_every=0)), folder, make
        )
        run.watch(watch)
        run.complete()
    timed: Sequence[float] = watch.seconds[_WARM_UP:] or watch.seconds
    require(bool(timed), "training.steps: too few to time; give a larger budget")
    return sum(timed) / len(timed)
