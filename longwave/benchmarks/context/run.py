"""Runs `longwave bench context`: both models in turn at every context, each in its own process, until it is stopped."""

from __future__ import annotations

import gzip
import json
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import chain
from math import inf
from pathlib import Path
from typing import Any

import torch

from longwave import checkpoints, files, planning
from longwave.benchmarks.context.growth import DECODE, PREFILL, Exponent, exponents
from longwave.benchmarks.context.options import ContextOptions, dense_twin
from longwave.benchmarks.context.sequence import Reading, Stopped
from longwave.benchmarks.context.text import read_text
from longwave.benchmarks.context.worker import Job, Worker
from longwave.benchmarks.measure.profile import Spent
from longwave.benchmarks.measure.roofline import measure_peaks
from longwave.benchmarks.measure.timing import Timing
from longwave.benchmarks.results.results import Model, Results, Row, against, hardware
from longwave.config import ModelConfig
from longwave.costs import Peaks, Work
from longwave.data.tokenizer import Tokenizer
from longwave.errors import MachineError, require
from longwave.machine import device_of, dtype_of
from longwave.progress import say

DENSE = "dense"
_EVERY = 10.0  # seconds between two lines about one context

Sources = Mapping[str, str | ModelConfig]
Trace = Callable[[Worker], object]


@dataclass(frozen=True)
class ContextResults(Results):
    """Results with notes on the text and the models. stopped: why a model was stopped, by its name."""

    notes: tuple[str, ...] = ()
    stopped: dict[str, str] = field(default_factory=dict)

    @property
    def growth(self) -> list[Exponent]:
        """The exponents of growth of every figure and model."""
        return exponents(self.rows)

    def plain(self) -> dict[str, Any]:
        growth = [asdict(one) for one in self.growth]
        return super().plain() | {"notes": list(self.notes), "stopped": dict(self.stopped), "growth": growth}


class Run:
    """A run of a model (a recipe with random weights, or a folder) beside another one, its dense twin, or none.

    other: `dense` for the twin. UserError for models with different vocabularies, and for a text that is empty or whose
    tokenizer has more entries than the models.
    """

    def __init__(self, model: str | Path, other: str | Path | None, options: ContextOptions) -> None:
        self.options, self._sources = options, _sources(model, other)
        configs = {name: _config(source) for name, source in self._sources.items()}
        sizes = {config.vocab_size for config in configs.values()}
        require(len(sizes) == 1, f"vocab_size: the models have {sorted(sizes)}; they must read the same tokens")
        self._text = read_text(options.text, _tokenizer(model), sizes.pop(), options.tokens)
        self._notes = (self._text.describe(), *_notes(self._sources, options.contexts[-1]))
        self._readings: dict[tuple[int, str], list[Reading]] = {}
        self._models: dict[str, Model] = {}
        self._stopped: dict[str, str] = {}

    def results(self, trace: Trace | None = None) -> Iterator[ContextResults]:
        """Yields the results so far, after every context of every model.

        trace: called with the worker of each model after its last context. MachineError where logits are wrong, or
        where no model reached the first context.
        """
        peaks = measure_peaks(dtype_of(self.options.dtype), device_of(self.options.device))
        for number in range(self.options.repeats):
            last = number + 1 == self.options.repeats
            for _ in self._pass(number, trace if last else None):
                yield self._found(peaks)
        if not self._readings:
            raise MachineError(f"nothing was measured: {'; '.join(map(': '.join, self._stopped.items()))}")
        yield self._found(peaks)

    def _pass(self, number: int, trace: Trace | None) -> Iterator[None]:
        """Runs all models over the contexts (later passes: those that the first reached), and yields after each."""
        with ExitStack() as stack:
            workers = [stack.enter_context(closing(self._worker(name, number))) for name in self._sources]
            going = [worker for worker in workers if self._went_on(worker, partial(self._load, worker))]
            for context in self.options.contexts:
                for worker in list(going):
                    if number and (context, worker.name) not in self._readings:
                        continue
                    if not self._went_on(worker, partial(self._grow, worker, context)):
                        going.remove(worker)
                        _end(worker, trace)
                    yield
            for worker in going:
                _end(worker, trace)

    def _went_on(self, worker: Worker, task: Callable[[], object]) -> bool:
        """Runs a task of a model; False if the model was stopped, whose reason is kept and printed."""
        try:
            task()
        except Stopped as reason:
            say(f"{worker.name} stopped: {reason}")
            self._stopped.setdefault(worker.name, str(reason))
            return False
        return True

    def _worker(self, name: str, number: int) -> Worker:
        limit = inf if number else self.options.limit  # later passes go as far as the first did
        facts = (self._text.ids, self.options, torch.get_num_threads(), limit)
        return Worker(Job(name, self._sources[name], *facts), _Progress(name))

    def _load(self, worker: Worker) -> None:
        say(f"{worker.name}: loading, and checking its logits")
        self._models[worker.name] = worker.load()

    def _grow(self, worker: Worker, context: int) -> None:
        say(f"{worker.name}: up to {context:,} tokens")
        reading = worker.grow(context)
        self._readings.setdefault((context, worker.name), []).append(reading)

    def _found(self, peaks: Peaks) -> ContextResults:
        rows = [row for context in self.options.contexts for row in self._rows(context, peaks)]
        facts = (hardware(self.options), peaks, rows, dict(self._models))
        return ContextResults("context", self.options, *facts, self._notes, dict(self._stopped))

    def _rows(self, context: int, peaks: Peaks) -> list[Row]:
        """The rows of one context, from as many passes as all models have made there."""
        found = {name: self._readings[context, name] for name in self._sources if (context, name) in self._readings}
        passes = min(map(len, found.values()), default=0)
        rows = []
        for make in (_prefill_row, _decode_row):
            made = [make(name, readings[:passes], peaks) for name, readings in found.items()]
            rows += against(made, made[-1]) if made else []
        return rows


class Traces:
    """Collects a trace of each model, and writes them to one file."""

    def __init__(self) -> None:
        self.spent: dict[str, dict[str, Spent]] = {}
        self._events: list[Any] = []
        self._about: dict[str, Any] = {}

    def add(self, worker: Worker) -> None:
        """Traces what a model does next after the tokens it has read."""
        with tempfile.TemporaryDirectory() as folder:
            self.spent |= worker.profile(path := Path(folder) / "trace.json")
            self._about = json.loads(path.read_bytes())
        self._events += self._about["traceEvents"]

    def write(self, path: Path) -> None:
        """Writes Chrome's format, compressed if the name ends in `.gz`."""
        content = json.dumps(self._about | {"traceEvents": self._events}).encode()
        files.write_file(path, gzip.compress(content, mtime=0) if path.suffix == ".gz" else content)


class _Progress:
    """Prints how many tokens a model has read, at most every ten seconds."""

    def __init__(self, name: str) -> None:
        self._name, self._spoken = name, time.monotonic()

    def __call__(self, seen: int) -> None:
        if time.monotonic() - self._spoken >= _EVERY:
            self._spoken = time.monotonic()
            say(f"{self._name}: {seen:,} tokens read")


def _end(worker: Worker, trace: Trace | None) -> None:
    """Traces a model, unless its process is gone, and ends its process."""
    if trace is not None:
        with suppress(Stopped):
            trace(worker)
    worker.close()


def _prefill_row(name: str, readings: Sequence[Reading], peaks: Peaks) -> Row:
    one, timing = readings[0], Timing(tuple(reading.first_token for reading in readings))
    work, peak = one.prefill_work, max(reading.peak for reading in readings)
    figures = (timing, one.context, work, work.seconds(peaks), peaks, one.retention)
    return Row(PREFILL, one.context, 1, name, *figures, peak_memory=peak)


def _decode_row(name: str, readings: Sequence[Reading], peaks: Peaks) -> Row:
    one, timing = readings[0], Timing(tuple(chain.from_iterable(reading.per_token_rounds for reading in readings)))
    work, bound = sum(one.decode_work, Work(0, 0)), sum(part.seconds(peaks) for part in one.decode_work)
    figures = (timing, 1, work, bound, peaks, one.decode_retention, one.used, one.reserved)
    return Row(DECODE, one.context, 1, name, *figures, state_formula=one.formula)


def _sources(model: str | Path, other: str | Path | None) -> Sources:
    """The models by their names: a config where weights are random, else where to load them from."""
    name, source = Path(model).stem, _source(model)
    if other is None:
        return {name: source}
    if str(other) != DENSE:
        theirs = Path(other).stem
        return {name: source, theirs if theirs != name else str(other): _source(other)}
    config = _config(source)
    twin = dense_twin(config)
    require(twin != config, f"against = dense: {model} has full attention alone; give --against none, or another model")
    return {name: source, DENSE if name != DENSE else "dense twin": twin}


def _source(model: str | Path) -> str | ModelConfig:
    of_weights = Path(model).is_dir() or checkpoints.is_hub_id(model)
    return str(model) if of_weights else planning.model_config(model)


def _config(source: str | ModelConfig) -> ModelConfig:
    return source if isinstance(source, ModelConfig) else planning.model_config(source)


def _tokenizer(model: str | Path) -> Tokenizer | None:
    """The model's own, if it is a folder that has one."""
    if not isinstance(_source(model), str):
        return None
    folder = checkpoints.find(model)
    return Tokenizer.find(folder)


def _notes(sources: Sources, longest: int) -> Iterator[str]:
    """Notes on the models: random weights, and contexts beyond a context window."""
    for name, source in sources.items():
        facts = ["random weights"] if isinstance(source, ModelConfig) else []
        if longest > (window := _config(source).context_window):
            facts.append(f"meant for {window:,} tokens: beyond, what it costs is as shown, what it would say is not")
        if facts:
            yield f"{name}: {'; '.join(facts)}"
