"""Memory of this process: the most it took, and how much is still to be had."""

from __future__ import annotations

import ctypes
import gc
import os
from pathlib import Path

import torch

from longwave.errors import MachineError

_CGROUP = Path("/sys/fs/cgroup")
_LIMITS = (  # of a container: the limit, what is used, and the files among that, which can be dropped
    ("memory.max", "memory.current", "memory.stat", "file"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat", "total_cache"),
)


class Meter:
    """The most bytes that were held at a time beyond those held when it was made.

    On a GPU torch's own counters; elsewhere the resident memory of the process, whose high-water mark the kernel keeps,
    so that no peak between two looks is missed. Where the kernel cannot start that mark anew (it does on Linux), what
    was held for a moment before may hide a smaller peak.
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
        """Bytes beyond those at the start."""
        return self._highest() - self._before

    def _highest(self) -> int:
        return torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else _high_water()


def free_memory(device: torch.device) -> int | None:
    """Bytes that can still be taken, within the limit of a container too; None where the system does not tell."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    found = [_field("/proc/meminfo", "MemAvailable:"), *(_within(*names) for names in _LIMITS)]
    return min((bytes for bytes in found if bytes is not None), default=None)


def _within(limit: str, used: str, statistics: str, files: str) -> int | None:
    """What a control group leaves; None without a limit."""
    try:
        bound, taken = ((_CGROUP / name).read_text().strip() for name in (limit, used))
    except OSError:
        return None
    droppable = _field(_CGROUP / statistics, files, unit=1) or 0
    return int(bound) - int(taken) + droppable if bound.isdigit() else None


def _field(path: str | Path, name: str, unit: int = 1024) -> int | None:
    """A figure of one of the kernel's tables, in bytes."""
    try:
        lines = Path(path).read_text().splitlines()
    except OSError:
        return None
    return next((int(words[1]) * unit for words in map(str.split, lines) if words[0] == name), None)


def _high_water() -> int:
    """The most resident bytes so far."""
    if (found := _field("/proc/self/status", "VmHWM:")) is not None:
        return found
    try:
        import resource
    except ImportError:
        raise MachineError("peak memory: this system does not tell a process its own; use Linux or macOS") from None
    unit = 1 if os.uname().sysname == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _restart_high_water() -> None:
    """The mark falls to what is resident now (Linux, proc_pid_clear_refs(5))."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def _give_back() -> None:
    """Hands freed memory back to the system (glibc), so that it does not count as held before."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
    if trim is not None:
        trim(0)
