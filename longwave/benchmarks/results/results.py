"""Results of a benchmark: rows of figures with their bounds, and the options, machine and models they belong to."""

from __future__ import annotations

import dataclasses
import os
import platform
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import Any, Literal

import torch

from longwave.benchmarks.measure.timing import Timing
from longwave.config import Strict
from longwave.costs import Peaks, Work
from longwave.errors import require
from longwave.machine import cpu_name, device_of
from longwave.units import counted
from longwave.version import __version__

FORMAT, VERSION = "longwave-bench", 1
_DERIVED = ("mfu", "mbu", "of_bound", "gain_of_bound")


@dataclass(frozen=True)
class Options(Strict):
    """Options of every benchmark.

    contexts: tokens of a prompt, or of a training window. batches: sequences at a time. repeats: interleaved rounds,
    of which medians are taken. threads: of the CPU; as many as PyTorch takes by default.
    """

    contexts: tuple[int, ...] = (2048, 8192)
    batches: tuple[int, ...] = (1,)
    dtype: Literal["fp32", "bf16"] = "fp32"
    repeats: int = 5
    threads: int | None = None
    seed: int = 0
    device: str = "auto"

    def __post_init__(self) -> None:
        for name in ("contexts", "batches"):
            values = getattr(self, name)
            require(bool(values) and min(values) > 0, f"{name} = {list(values)}: one or more, each 1 or more")
        require(self.repeats > 0, f"repeats = {self.repeats}: 1 or more")
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        require(self.threads is None or 0 < self.threads <= cores, f"threads = {self.threads}: 1 to {cores} here")

    @contextmanager
    def running(self) -> Iterator[None]:
        """A context in which PyTorch runs with `threads` threads."""
        before = torch.get_num_threads()
        torch.set_num_threads(self.threads or before)
        try:
            yield
        finally:
            torch.set_num_threads(before)


@dataclass(frozen=True)
class Row:
    """One quantity, such as `prefill`, of one subject: the name of a model, or of a form of an op.

    timing: seconds of one prefill, one decode step of the whole batch, one training step, or one call of an op, which
    handles so many `tokens`. work: its FLOPs and bytes; bound: the least seconds for them at the machine's peaks.
    ratio: the time relative to the reference's, as the median over rounds; bound_ratio: the bound relative to the
    reference's. retention: the share of the tokens entering each level that it kept; in decoding, the share of all
    tokens that reached it. state_used, state_reserved: bytes remembered of the context, and bytes allocated for them,
    of the whole batch; state_formula: bytes by the formulas of `longwave plan`. peak_memory: the most bytes that torch
    held at a time during one run beyond those it held before (in `bench context`: that the process held). error: the
    largest error of an op's output and gradients against its reference; checked: which of them were compared.
    """

    quantity: str
    context: int
    batch: int
    subject: str
    timing: Timing
    tokens: int
    work: Work
    bound: float
    peaks: Peaks
    retention: tuple[float, ...] = ()
    state_used: int | None = None
    state_reserved: int | None = None
    peak_memory: int | None = None
    error: float | None = None
    checked: str | None = None
    state_formula: int | None = None
    ratio: float | None = None
    bound_ratio: float | None = None

    @property
    def place(self) -> str:
        """The quantity and size in words, which rows that are compared have in common."""
        return f"{self.quantity}, {counted(self.context, 'token')}, batch {self.batch}"

    @property
    def mfu(self) -> float:
        """FLOPs per second relative to the machine's measured peak."""
        return self.work.flops / self.timing.median / self.peaks.flops

    @property
    def mbu(self) -> float:
        """Bytes per second relative to the machine's measured peak."""
        return self.work.bytes / self.timing.median / self.peaks.bandwidth

    @property
    def of_bound(self) -> float:
        """The bound as a share of the time: 1 where nothing faster is possible at the machine's peaks."""
        return self.bound / self.timing.median

    @property
    def gain_of_bound(self) -> float | None:
        """The speed-up over the reference as a share of the one that the bounds promise."""
        return self.bound_ratio / self.ratio if self.ratio and self.bound_ratio else None

    def plain(self) -> dict[str, Any]:
        """The fields and derived figures as plain values."""
        own = {name: value for name, value in dataclasses.asdict(self).items() if name not in ("timing", "peaks")}
        timing = self.timing
        seconds = {"median": timing.median, "low": timing.low, "high": timing.high, "all": list(timing.seconds)}
        derived = {name: getattr(self, name) for name in _DERIVED}
        return own | {"seconds": seconds, "tokens_per_second": self.tokens / timing.median} | derived


def against(rows: Sequence[Row], reference: Row) -> list[Row]:
    """The rows with their ratios to the reference; a single row has no ratio."""
    if len(rows) < 2:
        return list(rows)
    return [
        replace(row, ratio=row.timing.ratio(reference.timing), bound_ratio=row.bound / reference.bound) for row in rows
    ]


@dataclass(frozen=True)
class Model:
    """The layout and size of a model that was timed."""

    layout: str
    parameters: int


@dataclass(frozen=True)
class Results:
    """All rows of a run, with its options, the hardware it ran on and the hardware's peaks.

    kind: inference, training, ops or context. models: by their names in the rows; of ops there are none.
    """

    kind: str
    options: Options
    hardware: dict[str, Any]
    peaks: Peaks
    rows: list[Row]
    models: dict[str, Model] = dataclasses.field(default_factory=dict)

    def plain(self) -> dict[str, Any]:
        """The results as plain values, which `--save` and `--json` write."""
        return {
            "format": FORMAT,
            "version": VERSION,
            "kind": self.kind,
            "hardware": self.hardware,
            "models": {name: dataclasses.asdict(model) for name, model in self.models.items()},
            "options": dataclasses.asdict(self.options),
            "peaks": dataclasses.asdict(self.peaks),
            "rows": [row.plain() for row in self.rows],
        }


def hardware(options: Options) -> dict[str, Any]:
    """The device, its threads, the versions and the dtype that figures belong to."""
    device = device_of(options.device)
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "longwave": __version__,
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "dtype": options.dtype,
    }
