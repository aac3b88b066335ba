"""Timing that can be compared: warm-up, then the forms in turn, medians and spread."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median

import torch

Task = Callable[[], object]


@dataclass(frozen=True)
class Timing:
    """Seconds of every repeat, in the order in which they were taken."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return median(self.seconds)

    @property
    def low(self) -> float:
        return min(self.seconds)

    @property
    def high(self) -> float:
        return max(self.seconds)

    def per(self, count: int) -> Timing:
        """The same for one of `count` equal parts."""
        return Timing(tuple(taken / count for taken in self.seconds))

    def ratio(self, other: Timing) -> float:
        """The median, over the rounds of an interleaved run, of this time relative to the other's."""
        return median(own / others for own, others in zip(self.seconds, other.seconds, strict=True))


def interleaved(forms: Mapping[str, Task], repeats: int, warmup: int = 1) -> dict[str, Timing]:
    """Times each form `repeats` times, A B A B ..., so that a drift of the machine meets all alike."""
    seconds: dict[str, list[float]] = {name: [] for name in forms}
    with swift_collections():
        for round_ in range(warmup + repeats):
            for name, form in forms.items():
                taken = seconds_of(form)
                if round_ >= warmup:
                    seconds[name].append(taken)
    return {name: Timing(tuple(taken)) for name, taken in seconds.items()}


@contextmanager
def swift_collections() -> Iterator[None]:
    """The collection of garbage before each timed run passes over what lives now, which it need not look at again."""
    if gc.get_freeze_count():  # so it is already
        yield
        return
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def seconds_of(task: Task) -> float:
    """Seconds of one run, until the device has finished it."""
    gc.collect()
    synchronise()
    start = time.perf_counter()
    task()
    synchronise()
    return time.perf_counter() - start


def synchronise() -> None:
    """Waits until the device has done all it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
