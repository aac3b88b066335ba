"""Timing that can be compared: warm-up, then the forms in turn, medians and spread."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median

import torch


@dataclass(frozen=True)
class Timing:
    """Seconds: the median of the repeats, the least and the most."""

    median: float
    low: float
    high: float

    def per(self, count: int) -> Timing:
        """The same for one of `count` equal parts."""
        return Timing(self.median / count, self.low / count, self.high / count)


def interleaved(forms: Mapping[str, Callable[[], object]], repeats: int, warmup: int = 1) -> dict[str, Timing]:
    """Times each form `repeats` times, A B A B ..., so that a drift of the machine meets all alike."""
    seconds: dict[str, list[float]] = {name: [] for name in forms}
    for round_ in range(warmup + repeats):
        for name, form in forms.items():
            taken = _once(form)
            if round_ >= warmup:
                seconds[name].append(taken)
    return {name: Timing(median(taken), min(taken), max(taken)) for name, taken in seconds.items()}


def _once(form: Callable[[], object]) -> float:
    gc.collect()
    _synchronise()
    start = time.perf_counter()
    form()
    _synchronise()
    return time.perf_counter() - start


def _synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
