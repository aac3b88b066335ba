"""The engine: many requests at once, each answered as if it were alone.

One step is one forward over one stream: the next token of every sequence that is being continued, and pieces of the
prompts of others (continuous batching with chunked prefill: Orca, Yu et al. 2022; Sarathi, Agrawal et al. 2023). The
decoder promises that neither company nor chunks change a result beyond rounding, and draws are keyed by request, so a
request gets the same tokens whoever else is there, and however it was cut, put back and run again.

The engine speaks token ids. It belongs to one thread.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from longwave.config import Strict
from longwave.engine.choosing import Choice, Chooser, choose
from longwave.engine.request import Ended, Event, QueueFull, Request
from longwave.engine.scheduler import Piece, Scheduler
from longwave.engine.scheduler import Sequence as Running
from longwave.errors import MachineError, require
from longwave.model import Decoder

_COUNTED = ("steps", "prompt_tokens", "cached_tokens", "run_tokens", "new_tokens", "preemptions")


@dataclass(frozen=True)
class EngineOptions(Strict):
    """The limits of an engine.

    running: requests that advance together at most. step_tokens: tokens of one forward at most, more than `running`.
    waiting: requests that may wait; more are refused.
    """

    running: int = 16
    step_tokens: int = 512
    waiting: int = 1024

    def __post_init__(self) -> None:
        require(self.running > 0, f"running = {self.running}: 1 or more")
        more = f"step_tokens = {self.step_tokens}: more than running = {self.running}"
        require(self.step_tokens > self.running, f"{more}, so that prompts advance beside the texts")
        require(self.waiting > 0, f"waiting = {self.waiting}: 1 or more")


@dataclass(frozen=True)
class EngineMetrics:
    """What an engine has done, and does.

    waiting, running: requests. steps: forwards. prompt_tokens: of all requests that were admitted; cached_tokens: those
    of them that were not run, because their state was there. run_tokens: tokens that the model ran. new_tokens: chosen.
    preemptions: requests that were put back. state_bytes: of what the running sequences remember.
    """

    waiting: int
    running: int
    steps: int
    prompt_tokens: int
    cached_tokens: int
    run_tokens: int
    new_tokens: int
    preemptions: int
    state_bytes: int


class Engine:
    """Runs requests on a model, at most `options.running` at a time, in the order in which they came.

    clock: seconds, for time-outs.
    """

    def __init__(
        self, model: Decoder, options: EngineOptions | None = None, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.model, self.options, self._clock = model, options or EngineOptions(), clock
        self._state = model.state(self.options.running)
        self._scheduler = Scheduler(list(range(self.options.running))[::-1], self.options.step_tokens)
        self._live: dict[int, Running] = {}
        self._choosers: dict[int, Chooser] = {}
        self._number, self._counts = 0, Counter[str]()

    # --- requests -----------------------------------------------------------------------------------------------------

    def check(self, request: Request) -> None:
        """UserError for a request that the model can never run."""
        request.check(self.model.config)

    def submit(self, request: Request) -> int:
        """Takes a request, and returns its number.

        Raises UserError for one that the model can never run, and QueueFull where too many wait.
        """
        self.check(request)
        if len(self._scheduler.waiting) >= self.options.waiting:
            raise QueueFull(f"{self.options.waiting} requests are waiting already; try again later")
        number, self._number = self._number, self._number + 1
        left, limit = request.room(self.model.config)
        deadline = None if request.timeout is None else self._clock() + request.timeout
        self._live[number] = one = Running(number, request, left, limit, deadline)
        self._scheduler.waiting.append(one)
        return number

    def cancel(self, number: int) -> None:
        """Ends a request without another word; nothing happens to one that has ended."""
        if (one := self._live.pop(number, None)) is not None:
            self._let_go(one)
            self._scheduler.leave(one)
            self._choosers.pop(number, None)

    @property
    def idle(self) -> bool:
        """Whether nothing runs and nothing waits."""
        return not self._live

    @property
    def metrics(self) -> EngineMetrics:
        """What was done so far, and what is there now."""
        waiting, running = len(self._scheduler.waiting), len(self._scheduler.running)
        counts = {name: self._counts[name] for name in _COUNTED}
        return EngineMetrics(waiting=waiting, running=running, state_bytes=self._state.used_bytes(), **counts)

    # --- one step -----------------------------------------------------------------------------------------------------

    def step(self) -> list[Event]:
        """Runs one forward, if there is anything to run, and returns what came of it."""
        events = self._expired()
        while self._scheduler.waiting and self._scheduler.slots:
            self._admit()
        pieces = self._scheduler.plan()
        if pieces:
            last = [piece for piece in pieces if piece.is_last]
            logits = self._run(pieces)
            for row, piece in zip(self._choose(logits, last), last, strict=True):
                events.append(self._chosen(piece.sequence, row))
        return events

    def _expired(self) -> list[Event]:
        now = self._clock()
        late = [one for one in self._live.values() if one.deadline is not None and one.deadline <= now]
        for one in late:
            self.cancel(one.number)
        return [Event(one.number, None, "timeout") for one in late]

    def _admit(self) -> None:
        one = self._scheduler.admit()
        if one.number not in self._choosers:
            self._counts["prompt_tokens"] += len(one.request.prompt)
            self._choosers[one.number] = Chooser(one.request, self.model.config.vocab_size, self._state.device)

    @torch.no_grad()
    def _run(self, pieces: Sequence[Piece]) -> Tensor:
        """Runs the pieces; logits (n, V) after those that are the last of what their sequences have to run."""
        tokens = [one.tokens[one.seen : one.seen + count] for one, count in pieces]
        slots = [one.slot for one, _ in pieces if one.slot is not None]
        stream = self._state.stream([count for _, count in pieces], slots)
        stream = stream.last_rows([piece.is_last for piece in pieces])
        ids = torch.tensor([token for piece in tokens for token in piece], device=self._state.device)
        with self.model.mode(training=False):
            logits = self.model(ids, stream, self._state)
        for one, count in pieces:
            one.seen += count
        self._counts["steps"] += 1
        self._counts["run_tokens"] += stream.tokens
        return logits

    def _choose(self, logits: Tensor, pieces: Sequence[Piece]) -> list[Choice | MachineError]:
        choosers = [self._choosers[piece.sequence.number] for piece in pieces]
        places = [len(piece.sequence.tokens) for piece in pieces]
        return choose(logits, choosers, places)

    def _chosen(self, one: Running, choice: Choice | MachineError) -> Event:
        """Adds a chosen token to its sequence, which may end with it."""
        if isinstance(choice, MachineError):
            self.cancel(one.number)
            return Event(one.number, None, "failed", error=str(choice))
        one.tokens.append(choice.token)
        one.left -= 1
        self._counts["new_tokens"] += 1
        if (ended := self._end_of(one, choice.token)) is not None:
            self.cancel(one.number)
        return Event(one.number, choice.token, ended, choice.logprob, choice.likeliest)

    def _end_of(self, one: Running, token: int) -> Ended | None:
        if token in one.request.stop_tokens:
            return "end_token"
        constraint = one.request.constraint
        if constraint is not None and constraint.finished:
            return "stop"
        return one.limit if one.left == 0 else None

    def _let_go(self, one: Running) -> None:
        if one.slot is not None:
            self._state.release(one.slot)
