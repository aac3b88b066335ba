"""Memory: the most that one task takes, the most that this process took, and how much is still free."""

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

_CGROUP = Path("/sys/fs/cgroup")
_LIMITS = (  # of a container, by cgroup v2 and v1: the limit, the use, and the cached files in it, which can be dropped
    ("memory.max", "memory.current", "memory.stat", "file"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat", "total_cache"),
)


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


def free_memory(device: torch.device) -> int | None:
    """Bytes that can still be allocated, within a container's limit too; None where the system does not tell."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    found = [_field("/proc/meminfo", "MemAvailable:"), *(_within(*names) for names in _LIMITS)]
    return min((bytes for bytes in found if bytes is not None), default=None)


def _within(limit: str, used: str, statistics: str, files: str) -> int | None:
    """Bytes that a control group's limit leaves; None without a limit."""
    try:
        bound, taken = ((_CGROUP / name).read_text().strip() for name in (limit, used))
    except OSError:
        return None
    droppable = _field(_CGROUP / statistics, files, unit=1) or 0
    return int(bound) - int(taken) + droppable if bound.isdigit() else None


def _field(path: str | Path, name: str, unit: int = 1024) -> int | None:
    """The figure of one line of a kernel table such as /proc/meminfo, in bytes; None where there is none."""
    try:
        lines = Path(path).read_text().splitlines()
    except OSError:
        return None
    return next((int(words[1]) * unit for words in map(str.split, lines) if words[0] == name), None)


def _high_water() -> int:
    """The most resident bytes of this process so far."""
    if (found := _field("/proc/self/status", "VmHWM:")) is not None:
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
