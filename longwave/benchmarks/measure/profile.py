"""One more run of what was timed, looked at more closely: its peak memory, and a trace with the parts' own names.

Nothing is hooked into a model but while a trace is taken.
"""

from __future__ import annotations

import tempfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils.hooks import RemovableHandle

from longwave import durable
from longwave.benchmarks.results import Row
from longwave.benchmarks.timing import Task, synchronise

_BACKWARD = "autograd::engine::evaluate_function: "
_ACCUMULATION = f"{_BACKWARD}torch::autograd::AccumulateGrad"
_REST, _GRADIENTS, _OPTIMIZER = "the rest", "summing gradients", "optimizer"


class Part(NamedTuple):
    """A module to name in a trace, such as `blocks.3.mixer`, and the kind under which its time is added up."""

    name: str
    kind: str
    module: nn.Module


@dataclass
class Spent:
    """Where the time of a kind of part went: seconds of the forward and of the backward pass, and calls."""

    calls: int = 0
    forward: float = 0.0
    backward: float = 0.0

    @property
    def seconds(self) -> float:
        return self.forward + self.backward


class Traced(NamedTuple):
    """A task that has been timed, for a trace.

    label: what it is, in a trace with others. parts: empty where the kernels themselves are to be told apart.
    """

    label: str
    task: Task
    parts: Sequence[Part] = ()


@dataclass
class Watch:
    """Looks at tasks after they were timed. Of each quantity and subject the last one is kept for the trace."""

    device: torch.device
    trace: bool = False
    kept: dict[tuple[str, str], Traced] = field(default_factory=dict)

    def look(self, row: Row, task: Task, parts: Sequence[Part] = (), memory: bool = True) -> Row:
        """Keeps the task of a row for the trace, if there will be one; gives the row with its peak memory."""
        if self.trace:
            self.kept[row.quantity, row.subject] = Traced(f"{row.place}: {row.subject}", task, parts)
        return replace(row, peak_memory=peak_memory(task, self.device)) if memory else row

    def write(self, path: Path) -> dict[str, dict[str, Spent]]:
        """Runs each kept task once more, writes a Chrome trace of them all, and tells where the time of each went.

        A name that ends in `.gz` is compressed, which Perfetto reads as well.
        """
        with profile(activities=_activities(self.device)) as profiler:
            for traced in self.kept.values():
                with named(traced.parts), record_function(traced.label):
                    traced.task()
                    synchronise()
        with tempfile.TemporaryDirectory() as folder:
            staging = Path(folder) / f"trace.json{'.gz' if path.suffix == '.gz' else ''}"
            profiler.export_chrome_trace(str(staging))
            durable.write_file(path, staging.read_bytes())
        return _spent(list(profiler.events() or []), list(self.kept.values()), self.device)


def peak_memory(task: Task, device: torch.device) -> int:
    """The most bytes that torch held at a time during one run, beyond what it held before.

    On a CPU every allocation of the run is counted, and every release of one of these. The release of older memory is
    not, so the task should leave things as they were.
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
    changes = sorted((event for event in _within(roots) if event.name == "[memory]"), key=lambda one: one.start_time_ns)
    held: dict[int, int] = {}
    return max(accumulate(_change(held, event.extra_fields) for event in changes), default=0)


def _within(events: Sequence[Any]) -> Iterator[Any]:
    for event in events:
        yield event
        yield from _within(event.children)


def _change(held: dict[int, int], event: Any) -> int:
    """By how much an allocation or release changes what is held of this run, by address."""
    if event.alloc_size > 0:
        held[event.ptr] = event.alloc_size
        return event.alloc_size
    return -held.pop(event.ptr, 0)


@contextmanager
def named(parts: Sequence[Part]) -> Iterator[None]:
    """Every call of a part is a range with its name, as long as this lasts."""
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
    """For every task, its time by kind of part, the longest first."""
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
    """Adds up events: an operator belongs to the range that it is in, and its backward pass to the same kind."""

    def __init__(self, kinds: dict[str, str], device: torch.device) -> None:
        self.spent: dict[str, Spent] = defaultdict(Spent)
        self._kinds, self._on_gpu = kinds, device.type == "cuda"
        self._kind_of_node: dict[int, str] = {}  # by the sequence number of the node that the operator leaves

    def add(self, event: FunctionEvent, kind: str) -> None:
        """An event and all that it called, `kind` being that of its surroundings."""
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
