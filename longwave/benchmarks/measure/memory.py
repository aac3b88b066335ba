"""Memory: the most that one task takes, and the most that this process took."""

from __future__ import annotations

import ctypes
import gc
import os
from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from longwave.benchmarks.measure.timing import Task
from longwave.errors import MachineError
from longwave.machine import kernel_figure


class Meter:
    """Peak memory of this process beyond what it held when the meter was made.

    On a GPU by torch's own counters, elsewhere by the kernel's high-water mark of resident memory, which misses no
    short peak. Only Linux can reset that mark; on other systems an earlier, higher peak hides a later one.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        gc.collect()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        else:
            _give_back()
            _restart_high_water()
        self._before = self._highest()

    def peak(self) -> int:
        """The most bytes held at a time so far, beyond those at the start."""
        return self._highest() - self._before

    def _highest(self) -> int:
        return torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else _high_water()


def peak_memory(task: Task, device: torch.device) -> int:
    """The most bytes that torch held at a time during one run of a task, beyond those it held before.

    On a CPU the allocations of the run and their releases are counted. A release of older memory is not, so a task that
    replaces older tensors seems to take more than it does.
    """
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        task()
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        task()
    assert profiler.profiler is not None
    assert profiler.profiler.kineto_results is not None
    roots: list[Any] = profiler.profiler.kineto_results.experimental_event_tree()
    events = [event for event in _with_children(roots) if event.name == "[memory]"]
    events.sort(key=lambda event: event.start_time_ns)
    held: dict[int, int] = {}
    return max(accumulate(_change(held, event.extra_fields) for event in events), default=0)


def _with_children(events: Sequence[Any]) -> Iterator[Any]:
    """The events of a profiler's trees, from the roots down."""
    for event in events:
        yield event
        yield from _with_children(event.children)


def _change(held: dict[int, int], event: Any) -> int:
    """The change in the bytes held by an allocation, or by its release; held: bytes by address, of this run alone."""
    if event.alloc_size > 0:
        held[event.ptr] = event.alloc_size
        return event.alloc_size
    return -held.pop(event.ptr, 0)


def _high_water() -> int:
    """The most resident bytes of this process so far."""
    if (found := kernel_figure("/proc/self/status", "VmHWM:")) is not None:
        return found
    try:
        import resource
    except ImportError:
        raise MachineError("peak memory: this system does not tell a process its own; use Linux or macOS") from None
    unit = 1 if os.uname().sysname == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _restart_high_water() -> None:
    """Resets the high-water mark to what is resident now (Linux, proc_pid_clear_refs(5))."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def _give_back() -> None:
    """Returns freed memory to the system (glibc), so that it does not count as held before."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
    if trim is not None:
        trim(0)
