"""Trial runs: with `LONGWAVE_TRIAL=1` in the environment, every command of a page is a matter of seconds.

It cuts what is long, and nothing else: the text that `prepare` reads, the steps and windows of a training run, the
samples of a recall task, and the contexts and rounds of a measurement. Models keep their shapes, and what is refused
without it is refused with it; only a conversion whose trial models recall nothing takes its layers in their order. The
figures mean nothing then, and the command line says so.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

CHARACTERS = 1 << 19  # of text
_SHORTER = 64  # times, the contexts of a measurement
_MOST: dict[str, dict[str, int]] = {  # of the values of a recipe
    "training": {"steps": 2, "window": 128, "batch_windows": 2, "micro_windows": 2, "evaluate_windows": 2},
    "schedule": {"warmup_steps": 1},
}
NOTE = "LONGWAVE_TRIAL: texts, training and measurements are cut short; the figures mean nothing"


def is_on() -> bool:
    """Whether this is a trial run."""
    return os.environ.get("LONGWAVE_TRIAL", "0") not in ("", "0")


def recipe(values: dict[str, Any]) -> dict[str, Any]:
    """The plain values of a recipe; in a trial run with few steps of small windows."""
    return {name: _cut(table, _MOST.get(name, {})) for name, table in values.items()} if is_on() else values


def _cut(table: Any, most: dict[str, int]) -> Any:
    if not isinstance(table, dict):
        return table
    cut = {name: min(table[name], limit) for name, limit in most.items() if isinstance(table.get(name), int)}
    return table | cut


def contexts(given: Sequence[int]) -> tuple[int, ...]:
    """The contexts of a measurement; in a trial run a small part of them."""
    return tuple(dict.fromkeys(max(64, one // _SHORTER) for one in given)) if is_on() else tuple(given)


def at_most(value: int, limit: int) -> int:
    """A number of rounds, steps or characters; in a trial run at most the limit."""
    return min(value, limit) if is_on() else value
