"""One sequence that grows chunk by chunk through one model and one state, timed and counted at each context.

Legend: `N` tokens of text, `V` vocabulary, `S` steps of decoding.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from math import ceil, inf
from pathlib import Path
from statistics import fmean

import torch
from jaxtyping import Float, Int32
from torch import Tensor

from longwave.benchmarks.context.options import ContextOptions
from longwave.benchmarks.measure.checks import check_forms, check_logits, one_pass
from longwave.benchmarks.measure.memory import Meter
from longwave.benchmarks.measure.profile import Profiler, Spent, Traced
from longwave.benchmarks.measure.roofline import decode_work, prefill_work
from longwave.benchmarks.measure.timing import seconds_of, swift_collections
from longwave.benchmarks.models import Longwave, decode_load, force_retention
from longwave.costs import Work, total
from longwave.machine import free_memory
from longwave.model import Decoder
from longwave.units import short_bytes

_CHECKED, _PIECES = 1 << 14, 5  # the most tokens of the check in one pass, and the chunks they make
_GROUPS = 4  # of decoded tokens, the mean of each of which is a figure
_SPARE, _OF_FREE = 17 / 16, 0.9  # room beyond the expected on inner levels; share of the free memory that is taken


class Stopped(Exception):
    """A model was stopped; the message says why."""


@dataclass(frozen=True)
class Reading:
    """The figures of one model at one context, in one pass.

    first_token: seconds of all chunks so far and the head. decode: seconds of each step. used, reserved: bytes
    remembered, and allocated for them. formula: bytes that `longwave plan` gives, at the nominal retention. peak: the
    most bytes beyond the weights by the end of the prefill.
    """

    context: int
    first_token: float
    prefill_work: Work
    retention: tuple[float, ...]
    decode: tuple[float, ...]
    decode_work: tuple[Work, ...]
    decode_retention: tuple[float, ...]
    used: int
    reserved: int
    formula: int
    peak: int

    @property
    def per_token(self) -> float:
        """The mean of the steps: tokens that a level drops are quicker, so that no single step speaks for all."""
        return fmean(self.decode)

    @property
    def per_token_rounds(self) -> list[float]:
        """The same of up to four groups of steps one after the other, whose spread tells how sure it is."""
        ends = [len(self.decode) * place // _GROUPS for place in range(_GROUPS + 1)]
        return [fmean(self.decode[start:end]) for start, end in pairwise(ends) if start < end]


class Growing:
    """A model that reads one sequence. hidden (1, D): the last token's hidden state, from which the next is predicted.

    ids (N): the text. limit: seconds after which the model is stopped. report: called with the number of tokens read,
    after every chunk.
    """

    def __init__(
        self,
        model: Decoder,
        ids: Int32[Tensor, " N"],
        options: ContextOptions,
        limit: float = inf,
        report: Callable[[int], object] = lambda seen: None,
    ) -> None:
        self.model, self.ids, self.options, self.limit, self._report = model.eval(), ids, options, limit, report
        self.device = model.embed.weight.device
        self.start()

    def start(self) -> None:
        """Begins anew with no token read; time and memory are counted from here."""
        self.seconds = self._prefill = 0.0
        self.state = self.model.state(1)
        self._meter = Meter(self.device)

    @torch.no_grad()
    def check(self) -> None:
        """Forces the retention if the options say so, and compares logits with those of one pass; MachineError.

        The first 16,384 tokens (or the longest context) are read in five chunks or more, then some token by token.
        The sequence begins anew afterwards.
        """
        context = min(self.options.contexts[-1], _CHECKED)
        steps = self.options.decode_steps
        tokens = self._tokens(0, context + steps)
        if self.options.retention == "forced":
            force_retention(self.model, tokens)
        check_forms(self.model, tokens)
        right = one_pass(self.model, tokens, steps + 1)
        for stop in self._stops(context, min(self.options.chunk, ceil(context / _PIECES))):
            self._chunk(stop)
        check_logits("prefill in chunks", self.model.logits(self.hidden), right[:1])
        check_logits("decoding", torch.cat([self._step() for _ in range(steps)]), right[1:])
        self.start()

    @torch.no_grad()
    def grow(self, context: int) -> Reading:
        """Reads on up to the context, decodes some tokens and forgets them; Stopped at a limit of time or memory."""
        with swift_collections():
            return self._found(context)

    def _found(self, context: int) -> Reading:
        steps = self.options.decode_steps
        self._make_room(context + 1 + steps)
        self._read(context)
        peak, head = self._meter.peak(), self._timed(lambda: self.model.logits(self.hidden))
        used, reserved, retention = self.state.used_bytes(), self.state.reserved_bytes(), self._retention()
        snapshot = self.state.snapshot(0)
        seconds = tuple(self._timed(self._step) for _ in range(1 + steps))
        load = decode_load(self.model, self.state, context, 1 + steps)
        self.state.restore(snapshot)
        return Reading(
            context,
            self._prefill + head,
            prefill_work(self.model, context, retention),
            retention,
            seconds[1:],  # the first has warmed up
            tuple(decode_work(self.model, load)),
            load.retention,
            used,
            reserved,
            total(self.model.costs(context)).state_bytes,
            peak,
        )

    def profile(self, path: Path, name: str) -> dict[str, dict[str, Spent]]:
        """Traces the next chunk, and decoding steps in its place; returns the time of each by kind of part."""
        seen, steps = self.state.seen[0], self.options.decode_steps
        self._reserve(seen + max(self.options.chunk, steps))
        profiler, parts = Profiler(self.device, trace=True), Longwave(name, self.model).parts()
        snapshot = self.state.snapshot(0)

        def forgetting(run: Callable[[], object]) -> Callable[[], None]:
            def task() -> None:
                run()
                self.state.restore(snapshot)

            return task

        tasks = {
            f"the {self.options.chunk:,} tokens after {seen:,}": partial(self._chunk, seen + self.options.chunk),
            f"{steps} steps after {seen:,} tokens": lambda: [self._step() for _ in range(steps)],
        }
        for label, run in tasks.items():
            profiler.keep(label, name, Traced(f"{label}: {name}", forgetting(run), parts))
        return profiler.write(path)

    def _read(self, context: int) -> None:
        """Reads the tokens up to the context, timed; limits are checked before and after each chunk."""
        for stop in self._stops(context, self.options.chunk):
            if self.seconds > self.limit:
                passed = f"{self.seconds:,.1f} s had passed at {self.state.seen[0]:,} tokens"
                raise Stopped(f"{passed}; --limit is {self.limit:g}")
            self._prefill += self._timed(partial(self._chunk, stop))
            self._report(stop)
            self._check_memory(self._meter.peak(), f"{stop:,} tokens took")

    def _stops(self, context: int, chunk: int) -> list[int]:
        """The ends of the chunks from the tokens read so far up to the context."""
        return [*range(self.state.seen[0] + chunk, context, chunk), context]

    @torch.no_grad()
    def _chunk(self, stop: int) -> None:
        tokens = self._tokens(self.state.seen[0], stop)
        self.hidden = self.model.hidden(tokens, self.state.stream([len(tokens)]).last_rows(), self.state)

    @torch.no_grad()
    def _step(self) -> Float[Tensor, "1 V"]:
        """Reads one token and returns the logits after it."""
        seen = self.state.seen[0]
        return self.model(self._tokens(seen, seen + 1), self.state.stream([1]).last_rows(), self.state)

    def _timed(self, task: Callable[[], object]) -> float:
        taken = seconds_of(task)
        self.seconds += taken
        return taken

    def _tokens(self, start: int, stop: int) -> Tensor:
        return self.ids[start:stop].to(self.device, torch.int64)

    def _retention(self) -> tuple[float, ...]:
        """The share of the tokens entering each level that it has kept so far."""
        kept = {one.index: self.state.lengths(one.index)[0] for one in self.model.resamplers}
        entering = {-1: self.state.seen[0], **kept}
        return tuple(kept[one.index] / max(entering[one.site.level], 1) for one in self.model.resamplers)

    def _make_room(self, tokens: int) -> None:
        """Reserves memory for so many tokens, so that growing copies nothing; Stopped if there is not enough."""
        lengths, dtype = self._lengths(tokens), self.state.dtype
        needed = sum(spec.bytes(lengths[spec.level], dtype) for spec in self.state.specs.values())
        more = max(0, needed - self.state.reserved_bytes())
        self._check_memory(self._meter.peak() + more, f"{tokens:,} tokens would take")
        free = free_memory(self.device)
        if free is not None and more > _OF_FREE * free:
            here = f"{short_bytes(more)} more, and {short_bytes(free)} are free"
            raise Stopped(f"does not fit: {tokens:,} tokens would take {here}")
        self._reserve(tokens)

    def _reserve(self, tokens: int) -> None:
        self.state.reserve(self._lengths(tokens))

    def _lengths(self, tokens: int) -> Mapping[int, int]:
        """The tokens that each level is expected to hold: inner ones by the share that reached them so far."""
        seen, found = self.state.seen[0], {-1: tokens}
        for level in (one.index for one in self.model.resamplers):
            held = self.state.lengths(level)[0]
            found[level] = min(tokens, ceil(_SPARE * held * tokens / seen)) if seen else tokens
        return found

    def _check_memory(self, bytes: int, what: str) -> None:
        allowed = self.options.memory
        if allowed is not None and bytes > allowed:
            raise Stopped(f"{what} {short_bytes(bytes)} beyond the weights; --memory is {short_bytes(allowed)}")
