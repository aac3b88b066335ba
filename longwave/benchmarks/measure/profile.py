"""Traces: timed tasks run once more under torch's profiler, the parts of a model named in the trace.

Hooks that name the parts are in a model only while a trace is taken.
"""

from __future__ import annotations

import tempfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils.hooks import RemovableHandle

from longwave import files
from longwave.benchmarks.measure.timing import Task, synchronise

_BACKWARD = "autograd::engine::evaluate_function: "
_ACCUMULATION = f"{_BACKWARD}torch::autograd::AccumulateGrad"
_REST, _GRADIENTS, _OPTIMIZER = "the rest", "summing gradients", "optimizer"


class Part(NamedTuple):
    """A module to name in a trace, such as `blocks.3.mixer`. kind: its time is summed with others of this kind."""

    name: str
    kind: str
    module: nn.Module


@dataclass
class Spent:
    """The time spent in the parts of one kind: calls, and seconds of the forward and of the backward pass."""

    calls: int = 0
    forward: float = 0.0
    backward: float = 0.0

    @property
    def seconds(self) -> float:
        return self.forward + self.backward


class Traced(NamedTuple):
    """A task that has been timed and is to be traced.

    label: names it in a trace that holds others too. parts: modules to name in the trace; without any, the time is told
    apart by operator.
    """

    label: str
    task: Task
    parts: Sequence[Part] = ()


@dataclass
class Profiler:
    """Keeps timed tasks, and runs each of them once more under torch's profiler.

    trace: whether a trace is wanted; without it nothing is kept. kept: the last task of each quantity and name.
    """

    device: torch.device
    trace: bool = False
    kept: dict[tuple[str, str], Traced] = field(default_factory=dict)

    def keep(self, quantity: str, name: str, traced: Traced) -> None:
        """Keeps a task for the trace, in place of an earlier one of the same quantity and name."""
        if self.trace:
            self.kept[quantity, name] = traced

    def write(self, path: Path) -> dict[str, dict[str, Spent]]:
        """Runs each kept task, writes one Chrome trace of them all, and returns the time of each by kind of part.

        A file whose name ends in `.gz` is compressed, which Perfetto reads as well.
        """
        with profile(activities=_activities(self.device)) as profiler:
            for traced in self.kept.values():
                with named(traced.parts), record_function(traced.label):
                    traced.task()
                    synchronise()
        with tempfile.TemporaryDirectory() as folder:
            staging = Path(folder) / f"trace.json{'.gz' if path.suffix == '.gz' else ''}"
            profiler.export_chrome_trace(str(staging))
            files.write_file(path, staging.read_bytes())
        return _spent(list(profiler.events() or []), list(self.kept.values()), self.device)


@contextmanager
def named(parts: Sequence[Part]) -> Iterator[None]:
    """While this context lasts, every call of a part is a range with the part's name in the profiler's trace."""
    handles = [handle for part in parts for handle in _hooks(part)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _hooks(part: Part) -> list[RemovableHandle]:
    open_ranges: list[record_function] = []

    def enter(module: nn.Module, inputs: object) -> None:
        open_ranges.append(record_function(part.name))
        open_ranges[-1].__enter__()

    def leave(module: nn.Module, inputs: object, output: object) -> None:
        open_ranges.pop().__exit__(None, None, None)

    hooked = part.module
    return [hooked.register_forward_pre_hook(enter), hooked.register_forward_hook(leave, always_call=True)]


def _activities(device: torch.device) -> list[ProfilerActivity]:
    return [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]


def _spent(
    events: Sequence[FunctionEvent], kept: Sequence[Traced], device: torch.device
) -> dict[str, dict[str, Spent]]:
    """The time of every task by kind of part, the longest first."""
    roots = [event for event in events if event.cpu_parent is None]
    found = {}
    for traced in kept:
        whole = next(event for event in roots if event.name == traced.label)
        within = [one for one in roots if whole.time_range.start <= one.time_range.start <= whole.time_range.end]
        sums = _Sums({part.name: part.kind for part in traced.parts}, device)
        for event in within:
            sums.add(event, _REST)
        found[traced.label] = dict(sorted(sums.spent.items(), key=lambda item: -item[1].seconds))
    return found


class _Sums:
    """Sums of a trace's events by kind: an operator counts for the range it runs in, and so does its backward pass."""

    def __init__(self, kinds: dict[str, str], device: torch.device) -> None:
        self.spent: dict[str, Spent] = defaultdict(Spent)
        self._kinds, self._on_gpu = kinds, device.type == "cuda"
        self._kind_of_node: dict[int, str] = {}  # by the sequence number of the node that the operator leaves

    def add(self, event: FunctionEvent, kind: str) -> None:
        """Adds an event and all that it called; kind: of the range around it."""
        if event.name.startswith(_BACKWARD):
            node = _GRADIENTS if event.name == _ACCUMULATION else self._kind_of_node.get(event.sequence_nr, _REST)
            self.spent[node].backward += self._seconds(event, whole=True)
            return
        inner = self._kind(event, kind)
        self.spent[inner].calls += inner != kind or event.name in self._kinds
        self.spent[inner].forward += self._seconds(event, whole=False)
        if event.sequence_nr >= 0:
            self._kind_of_node[event.sequence_nr] = inner
        for child in event.cpu_children:
            self.add(child, inner)

    def _kind(self, event: FunctionEvent, around: str) -> str:
        if event.name.startswith("Optimizer."):
            return _OPTIMIZER
        if self._kinds or event.is_user_annotation:
            return self._kinds.get(event.name, around)
        return event.name

    def _seconds(self, event: FunctionEvent, whole: bool) -> float:
        if self._on_gpu:
            taken = event.device_time_total if whole else event.self_device_time_total
        else:
            taken = event.cpu_time_total if whole else event.self_cpu_time_total
        return taken / 1e6
