"""The engine timed: requests together and one at a time, with prefixes that are there, and bit by bit the same."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path

import torch

from longwave.benchmarks.measure.timing import Timing, interleaved
from longwave.benchmarks.models import decoder_of, force_retention
from longwave.config import Strict
from longwave.engine import Engine, EngineOptions, Request
from longwave.errors import MachineError, UserError, require
from longwave.machine import device_of, dtype_of
from longwave.model import Decoder
from longwave.ops.forms import INVARIANT

_CHUNK = 512  # tokens of one step


@dataclass(frozen=True)
class EngineBench(Strict):
    """Sizes, in tokens. running: requests together. prefix, suffix: of a prompt whose beginning is kept."""

    prompt: int = 128
    answer: int = 128
    running: int = 16
    prefix: int = 8192
    suffix: int = 128
    repeats: int = 3
    dtype: str = "bf16"
    device: str = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("prompt", "answer", "running", "prefix", "suffix", "repeats"):
            require(getattr(self, name) > 0, f"{name} = {getattr(self, name)}: 1 or more")


@dataclass(frozen=True)
class EngineRow:
    """A figure. tokens: answered, or run, in `timing`. ratio: of the tokens a second to those of `against`."""

    name: str
    tokens: int
    timing: Timing
    against: str
    ratio: float

    @property
    def speed(self) -> float:
        """Tokens a second."""
        return self.tokens / self.timing.median


def run_engine(model: str | Path, options: EngineBench) -> list[EngineRow]:
    """Times the engine on a model: a folder, or a recipe with random weights, whose levels keep their nominal share.

    MachineError if a request gets other tokens in company, bit by bit, than alone.
    """
    decoder = decoder_of(model, dtype_of(options.dtype), device_of(options.device), options.seed).eval()
    window = decoder.config.context_window
    longest = max(options.prompt + options.answer, options.prefix + options.suffix)
    require(longest <= window, f"{longest} tokens: the model's context_window is {window}")
    if decoder.resamplers and not Path(model).is_dir():
        force_retention(decoder, torch.tensor(_ids(decoder, _CHUNK, 0), device=decoder.embed.weight.device))
    return [*_together(decoder, options), *_prefixes(decoder, options)]


def _together(decoder: Decoder, options: EngineBench) -> list[EngineRow]:
    """One request at a time, all together, and together in the batch-invariant mode, if the model has it."""
    requests = [
        Request(prompt=_ids(decoder, options.prompt, seed), max_new_tokens=options.answer)
        for seed in range(options.running)
    ]
    few = requests[: max(1, options.running // 8)]
    one = EngineOptions(running=1, step_tokens=_CHUNK, prefixes=False)
    many = EngineOptions(running=options.running, step_tokens=max(_CHUNK, options.running + 1), prefixes=False)
    tasks = {
        "one at a time": partial(answers, decoder, few, one),
        "together": partial(answers, decoder, requests, many),
    }
    counts = {"one at a time": len(few) * options.answer, "together": len(requests) * options.answer}
    timings = interleaved(tasks, options.repeats)
    rows = [_row(name, counts[name], timings[name], "one at a time", counts, timings) for name in tasks]
    return rows + _invariant(decoder, tasks, counts, options.repeats)


def _invariant(
    decoder: Decoder, tasks: dict[str, partial[list[list[int]]]], counts: dict[str, int], repeats: int
) -> list[EngineRow]:
    try:
        decoder.use_form(INVARIANT)
    except UserError:  # a form that this device or type does not have
        return []
    try:
        alone, all_of_them = tasks["one at a time"](), tasks["together"]()
        if all_of_them[: len(alone)] != alone:
            raise MachineError("invariant: a request got other tokens in company than alone")
        timings = interleaved(tasks, repeats)
    finally:
        decoder.use_form(None)
    timings = {f"{name}, invariant": timing for name, timing in timings.items()}
    counts = {f"{name}, invariant": count for name, count in counts.items()}
    first = next(iter(timings))
    return [_row(name, counts[name], timing, first, counts, timings) for name, timing in timings.items()]


def _prefixes(decoder: Decoder, options: EngineBench) -> list[EngineRow]:
    """A suffix behind a prefix that is kept, beside running it at that depth alone; and whole prompts, nothing kept."""
    prefix = _ids(decoder, options.prefix, 100)
    numbers = count(200)
    others = {kept: count(100_000) for kept in (False, True)}  # both meet the same prompts: levels keep more of some
    keeping = EngineOptions(running=1, step_tokens=_CHUNK)
    engine = Engine(decoder, keeping)

    def fresh() -> Request:
        return Request(prompt=prefix + _ids(decoder, options.suffix, next(numbers)), max_new_tokens=1)

    def other(kept: bool) -> Request:
        return Request(prompt=_ids(decoder, options.prefix + options.suffix, next(others[kept])), max_new_tokens=1)

    finished(engine, [fresh(), fresh()])
    before = engine.metrics.cached_tokens
    finished(engine, [fresh()])
    hit = engine.metrics.cached_tokens - before
    require(hit == options.prefix, f"prefix = {options.prefix}: only {hit} tokens were found again")
    depth = _Depth(decoder, prefix, options.suffix)
    bare = EngineOptions(running=1, step_tokens=_CHUNK, prefixes=False)
    tasks = {
        "suffix at that depth": depth.run,
        "prefix found": lambda: finished(engine, [fresh()]),
        "nothing kept": lambda: answers(decoder, [other(False)], bare),
        "prefix not found": lambda: answers(decoder, [other(True)], keeping),
    }
    whole = options.prefix + options.suffix
    counts = dict(zip(tasks, (options.suffix, options.suffix, whole, whole), strict=True))
    timings = interleaved(tasks, options.repeats)
    pairs = {"prefix found": "suffix at that depth", "prefix not found": "nothing kept"}
    return [_row(name, counts[name], timings[name], pairs.get(name, name), counts, timings) for name in tasks]


class _Depth:
    """The tokens of a suffix, run behind a prefix that a state holds, and forgotten again."""

    def __init__(self, decoder: Decoder, prefix: Sequence[int], suffix: int) -> None:
        self.decoder, self.state, self.suffix = decoder, decoder.state(1), torch.tensor(_ids(decoder, suffix, 1))
        self.state.reserve(len(prefix) + suffix)
        for start in range(0, len(prefix), _CHUNK):
            self._run(torch.tensor(prefix[start : start + _CHUNK]))
        self.snapshot = self.state.snapshot(0)

    @torch.no_grad()
    def _run(self, ids: torch.Tensor) -> torch.Tensor:
        stream = self.state.stream([len(ids)]).last_rows()
        return self.decoder(ids.to(self.state.device), stream, self.state)

    def run(self) -> None:
        self._run(self.suffix)
        self.state.restore(self.snapshot)


def answers(decoder: Decoder, requests: Sequence[Request], options: EngineOptions) -> list[list[int]]:
    """The tokens that an engine of its own chooses for each request."""
    return finished(Engine(decoder, options), requests)


def finished(engine: Engine, requests: Sequence[Request]) -> list[list[int]]:
    """The tokens that an engine chooses for each request."""
    numbers, found = [engine.submit(one) for one in requests], dict[int, list[int]]()
    while not engine.idle:
        for event in engine.step():
            found.setdefault(event.request, []).extend([] if event.token is None else [event.token])
    return [found[number] for number in numbers]


def _ids(decoder: Decoder, count: int, seed: int) -> tuple[int, ...]:
    draw = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(decoder.config.vocab_size, (count,), generator=draw).tolist())


def _row(
    name: str, tokens: int, timing: Timing, against: str, counts: dict[str, int], timings: dict[str, Timing]
) -> EngineRow:
    ratio = timings[against].per(counts[against]).ratio(timing.per(tokens))
    return EngineRow(name, tokens, timing, against, ratio)
