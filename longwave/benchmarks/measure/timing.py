"""Times that can be compared: after a warm-up tasks run in turn; medians and spreads are taken over the rounds."""

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
    """The seconds of every round, in the order in which they were measured."""

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
        """The timing of one of `count` equal parts."""
        return Timing(tuple(taken / count for taken in self.seconds))

    def ratio(self, other: Timing) -> float:
        """The median over the rounds of this time divided by the other's in the same round."""
        return median(own / others for own, others in zip(self.seconds, other.seconds, strict=True))


def interleaved(tasks: Mapping[str, Task], repeats: int, warmup: int = 1) -> dict[str, Timing]:
    """Times every task in `repeats` rounds, A B A B ..., so that a machine that slows down slows all tasks alike."""
    seconds: dict[str, list[float]] = {name: [] for name in tasks}
    with swift_collections():
        for round_ in range(warmup + repeats):
            for name, task in tasks.items():
                taken = seconds_of(task)
                if round_ >= warmup:
                    seconds[name].append(taken)
    return {name: Timing(tuple(taken)) for name, taken in seconds.items()}


@contextmanager
def swift_collections() -> Iterator[None]:
    """Freezes all living objects, so that the garbage collection before each timed run skips them and is short."""
    if gc.get_freeze_count():  # an outer call has frozen them
        yield
        return
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def seconds_of(task: Task) -> float:
    """Seconds of one run of a task, until the device has finished it."""
    gc.collect()
    synchronise()
    start = time.perf_counter()
    task()
    synchronise()
    return time.perf_counter() - start


def synchronise() -> None:
    """Waits until the GPU, where there is one, has finished all its work."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
