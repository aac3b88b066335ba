"""How much a machine does for others while something is timed, so that a busy one is noticed."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

_TOLERATED = 0.1  # of the cores that a timed model runs on


@dataclass
class OtherWork:
    """The work of other processes while something was timed.

    busy: cores that they kept busy on average; None where the system does not tell. cores: those that this process may
    use. threads: those that a timed model runs on.
    """

    cores: int
    threads: int
    busy: float | None = None

    @property
    def disturbs(self) -> bool:
        """Whether the others left fewer cores than the timed models run on."""
        return self.busy is not None and self.cores - self.busy < (1 - _TOLERATED) * min(self.threads, self.cores)

    def words(self) -> str:
        """The others' work for people."""
        if self.busy is None:
            return "this system does not tell what other processes did meanwhile"
        return f"other processes kept {self.busy:.1f} of {self.cores} cores busy meanwhile"


@contextmanager
def other_work() -> Iterator[OtherWork]:
    """Watches what other processes do during the block; the figure is there when it ends."""
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))
    found = OtherWork(len(cores), torch.get_num_threads())
    began, own, before = time.monotonic(), time.process_time(), _busy_seconds(cores)
    yield found
    after, own = _busy_seconds(cores), time.process_time() - own
    if before is not None and after is not None:
        found.busy = max(0.0, (after - before - own) / max(time.monotonic() - began, 1e-9))


def _busy_seconds(cores: list[int]) -> float | None:
    """Seconds that these cores have worked since the machine started, for all processes; None if the system is silent.

    Time that a virtual machine was denied counts as work: somebody else had it.
    """
    try:
        with open("/proc/stat", encoding="ascii") as file:
            rows = {row[0]: row[1:] for row in map(str.split, file) if row}
        # user, nice, system, idle, iowait, irq, softirq, steal (proc_stat(5)); user holds the time of guests
        ticks = [list(map(int, rows[f"cpu{core}"][:8])) for core in cores]
    except (OSError, KeyError, ValueError):
        return None
    return sum(sum(one) - one[3] - one[4] for one in ticks) / os.sysconf("SC_CLK_TCK")
