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
from itertools import islice
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from longwave.config import Strict
from longwave.engine.choosing import Choice, Chooser
from longwave.engine.drafts import Drafts
from longwave.engine.memory import Memory
from longwave.engine.request import Ended, Event, QueueFull, Request
from longwave.engine.scheduler import Piece, Scheduler
from longwave.engine.scheduler import Sequence as Running
from longwave.engine.speculation import Begun, Proposer
from longwave.errors import MachineError, require
from longwave.model import Decoder
from longwave.ops.forms import INVARIANT
from longwave.states import OutOfPages

_COUNTED = (
    *("steps", "prompt_tokens", "cached_tokens", "run_tokens", "new_tokens", "preemptions"),
    *("drafted_tokens", "accepted_tokens"),
)


@dataclass(frozen=True)
class EngineOptions(Strict):
    """The limits of an engine.

    running: requests that advance together at most. step_tokens: tokens of one forward at most, more than `running`.
    waiting: requests that may wait; more are refused. window: tokens of a request and its answer at most; the model's
    own by default. memory: bytes for what sequences remember token by token, kept
    prefixes among them; by default half of what is free, or what they could fill. prefixes: whether the
    beginning that a request shares with an earlier one is not run again. prefix_copies: bytes for copies of what
    recurs, which this needs. page_size: tokens of a page of memory. drafts: tokens drafted for a text at a time, on all
    paths together, where somebody drafts. invariant: the model runs in the forms whose
    results company and chunks do not change in any bit, and keeps them afterwards.
    """

    running: int = 16
    step_tokens: int = 512
    waiting: int = 1024
    window: int | None = None
    memory: int | None = None
    prefixes: bool = True
    prefix_copies: int = 256 << 20
    page_size: int = 64
    drafts: int = 4
    invariant: bool = False

    def __post_init__(self) -> None:
        require(self.running > 0, f"running = {self.running}: 1 or more")
        more = f"step_tokens = {self.step_tokens}: more than running = {self.running}"
        require(self.step_tokens > self.running, f"{more}, so that prompts advance beside the texts")
        require(self.waiting > 0, f"waiting = {self.waiting}: 1 or more")
        require(self.window is None or self.window > 0, f"window = {self.window}: tokens, 1 or more")
        require(self.memory is None or self.memory > 0, f"memory = {self.memory}: bytes, 1 or more")
        require(self.prefix_copies >= 0, f"prefix_copies = {self.prefix_copies}: bytes, 0 or more")
        require(self.drafts > 0, f"drafts = {self.drafts}: tokens, 1 or more")
        require(self.page_size > 0, f"page_size = {self.page_size}: tokens, 1 or more")


@dataclass(frozen=True)
class EngineMetrics:
    """What an engine has done, and does.

    waiting, running: requests. steps: forwards. prompt_tokens: of all requests that were admitted; cached_tokens: those
    of them that were not run, because their state was there. run_tokens: tokens that the model ran. new_tokens: chosen.
    preemptions: how often a request was put back. drafted_tokens, accepted_tokens: by speculation. state_bytes: of what
    the running sequences remember. prefixes: kept token boundaries; prefix_bytes: of the copies that they hold, and of
    the tree that they are found by. pages, free_pages: of the outermost level.
    """

    waiting: int
    running: int
    steps: int
    prompt_tokens: int
    cached_tokens: int
    run_tokens: int
    new_tokens: int
    preemptions: int
    drafted_tokens: int
    accepted_tokens: int
    state_bytes: int
    prefixes: int
    prefix_bytes: int
    pages: int
    free_pages: int


class Engine:
    """Runs requests on a model, at most `options.running` at a time, in the order in which they came.

    proposer: drafts tokens that the model only has to check (speculative decoding); nobody by default. clock: seconds,
    for time-outs. window: tokens of a request and its answer at most.
    """

    def __init__(
        self,
        model: Decoder,
        options: EngineOptions | None = None,
        *,
        proposer: Proposer | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.model, self.options, self._clock = model, options or EngineOptions(), clock
        limits, self._proposer = self.options, proposer
        self._branches = model.reads_trees and not limits.invariant
        most = limits.running * (2 * limits.drafts + 1)
        drafted = f"step_tokens = {limits.step_tokens}: more than {most}, for {limits.drafts} drafts of each text"
        require(proposer is None or limits.step_tokens > most, drafted)
        if limits.invariant:
            model.use_form(INVARIANT)
        copies = limits.prefix_copies if limits.prefixes else None
        window = min(limits.window or model.config.context_window, model.config.context_window)
        self._memory = Memory(model, limits.running, window, limits.memory, limits.page_size, copies)
        self.window = self._memory.window
        self._scheduler = Scheduler(list(range(limits.running))[::-1], limits.step_tokens)
        self._live: dict[int, Running] = {}
        self._choosers: dict[int, Chooser] = {}
        self._number, self._counts, self._is_full = 0, Counter[str](), False

    # --- requests -----------------------------------------------------------------------------------------------------

    def check(self, request: Request) -> None:
        """UserError for a request that can never run."""
        request.check(self.model.config.vocab_size, self.window)

    def submit(self, request: Request) -> int:
        """Takes a request, and returns its number.

        Raises UserError for one that can never run, and QueueFull where too many wait.
        """
        self.check(request)
        if len(self._scheduler.waiting) >= self.options.waiting:
            raise QueueFull(f"{self.options.waiting} requests are waiting already; try again later")
        number, self._number = self._number, self._number + 1
        left, limit = request.room(self.window)
        deadline = None if request.timeout is None else self._clock() + request.timeout
        self._live[number] = one = Running(number, request, left, limit, deadline)
        self._scheduler.waiting.append(one)
        return number

    def cancel(self, number: int) -> None:
        """Ends a request without another word; nothing happens to one that has ended."""
        if number in self._live:
            self._end(self._live[number])

    def forget(self) -> None:
        """Lets go of all kept prefixes."""
        if self._memory.prefixes is not None:
            self._memory.prefixes.clear()

    @property
    def idle(self) -> bool:
        """Whether nothing runs and nothing waits."""
        return not self._live

    @property
    def metrics(self) -> EngineMetrics:
        """What was done so far, and what is there now."""
        state, prefixes = self._memory.state, self._memory.prefixes
        outermost = [one for one in state.usage() if one.level < 0 and one.page_bytes]
        return EngineMetrics(
            waiting=len(self._scheduler.waiting),
            running=len(self._scheduler.running),
            state_bytes=state.used_bytes(),
            prefixes=0 if prefixes is None else len(prefixes),
            prefix_bytes=0 if prefixes is None else prefixes.nbytes,
            pages=sum(one.pages for one in outermost),
            free_pages=sum(one.free for one in outermost),
            **{name: self._counts[name] for name in _COUNTED},
        )

    # --- one step -----------------------------------------------------------------------------------------------------

    def step(self) -> list[Event]:
        """Runs one forward, if there is anything to run, and returns what came of it."""
        events = self._expired()
        self._admit()
        pieces = self._with_drafts(self._scheduler.plan())
        if not pieces:
            return events
        try:
            with self._memory.state.postponed():
                hidden = self._run(pieces)
        except OutOfPages as error:
            return events + self._make_room(error)
        chosen = self._choose(pieces, hidden)
        self._settle(pieces, chosen)
        for piece, one in zip(pieces, chosen, strict=True):
            events += [self._told(piece.sequence, choice) for choice in one.choices]
        return events

    def _with_drafts(self, pieces: list[Piece]) -> list[Piece]:
        """The pieces behind which a token is to be chosen, with drafts of the ones after it."""
        if self._proposer is None:
            return pieces
        texts = [_begun(piece, self.options.drafts, self._branches) for piece in pieces]
        asked = [text for text in texts if text.most > 0]
        drafts = dict(zip((text.number for text in asked), self._proposer.propose(asked), strict=True))
        return [Piece(one, length, drafts.get(one.number, Drafts())) for one, length, _ in pieces]

    def _expired(self) -> list[Event]:
        now = self._clock()
        late = [one for one in self._live.values() if one.deadline is not None and one.deadline <= now]
        for one in late:
            self._end(one)
        return [Event(one.number, None, "timeout") for one in late]

    def _admit(self) -> None:
        """Gives free slots to those that wait, while there is memory: after a lack of it, one that runs has to end."""
        scheduler = self._scheduler
        while scheduler.waiting and scheduler.slots:
            room = not self._is_full and self._memory.holds(scheduler.waiting[0].tokens)
            if scheduler.running and not room:
                return
            self._memory.enter(one := scheduler.admit())
            if one.number not in self._choosers:
                self._counts["prompt_tokens"] += len(one.request.prompt)
                self._counts["cached_tokens"] += one.cached
                vocabulary, device = self.model.config.vocab_size, self._memory.state.device
                self._choosers[one.number] = Chooser(one.request, vocabulary, device)

    @torch.no_grad()
    def _run(self, pieces: Sequence[Piece]) -> Float[Tensor, "n D"]:
        """Runs the pieces; hidden states behind each draft, and behind pieces that are the last of their sequences."""
        state = self._memory.state
        slots = [piece.sequence.slot for piece in pieces if piece.sequence.slot is not None]
        stream = state.stream([piece.length + len(piece.drafts.tokens) for piece in pieces], slots)
        if any(piece.drafts.branch for piece in pieces):
            stream = stream.branching([piece.drafts.parents for piece in pieces])
        tokens = [
            token for one, n, drafts in pieces for token in (*one.tokens[one.seen : one.seen + n], *drafts.tokens)
        ]
        with self.model.mode(training=False):
            ids = torch.tensor(tokens, device=state.device)
            hidden = self.model.hidden(ids, stream.last_rows([piece.rows for piece in pieces]), state)
        self._counts["steps"] += 1
        self._counts["run_tokens"] += len(tokens)
        return hidden

    @torch.no_grad()
    def _choose(self, pieces: Sequence[Piece], hidden: Float[Tensor, "n D"]) -> list[_Chosen]:
        """The tokens behind every piece: one, and another behind each draft that is what was chosen."""
        logits = self.model.logits(hidden)
        values, tokens = logits.max(-1) if len(logits) else (logits[:, 0], logits[:, 0])
        rows = map(_Row, hidden, logits, values.tolist(), tokens.tolist())
        return [self._choices(piece, list(islice(rows, piece.rows))) for piece in pieces]

    def _choices(self, piece: Piece, rows: Sequence[_Row]) -> _Chosen:
        """What is chosen behind the text, and along the path of drafts that were chosen; rows: of text and drafts."""
        one, found, accepted, at = piece.sequence, _Chosen([]), 0, -1 if rows else None
        while at is not None:
            row = rows[at + 1]
            try:
                place = len(one.tokens) + len(found.choices)
                choice = self._choosers[one.number].choose(row.logits, place, row.peak, row.likeliest)
            except MachineError as error:
                return _Chosen([*found.choices, error], accepted)
            found = _Chosen([*found.choices, choice], accepted, row.hidden)
            ends = self._end_of(one, choice.token, len(found.choices))
            at = None if ends else piece.drafts.after(at, choice.token)
            accepted += at is not None
        return found

    def _settle(self, pieces: Sequence[Piece], chosen: Sequence[_Chosen]) -> None:
        """Adds what was chosen to the sequences, and takes drafts out of the state that were not."""
        self._counts["drafted_tokens"] += sum(len(piece.drafts.tokens) for piece in pieces)
        self._counts["accepted_tokens"] += sum(one.accepted for one in chosen)
        self._memory.settle([(piece, its.accepted) for piece, its in zip(pieces, chosen, strict=True)])
        for (one, _, _), its in zip(pieces, chosen, strict=True):
            one.tokens += [choice.token for choice in its.choices if isinstance(choice, Choice)]
            if its.choices:
                one.newest = max(1, one.pending)
                one.hidden = None if self._proposer is None else its.hidden
            self._memory.passed(one)

    def _make_room(self, error: OutOfPages) -> list[Event]:
        """After a step that found too little memory: a kept prefix goes, or the youngest request is put back.

        A request that runs alone, and for which there is too little, fails.
        """
        if self._memory.make_room():
            return []
        youngest = self._scheduler.running[-1]
        if len(self._scheduler.running) == 1:
            self._end(youngest)
            return [Event(youngest.number, None, "failed", error=str(error))]
        self._memory.leave(youngest, keep=False)
        self._scheduler.put_back(youngest)
        self._is_full = True
        self._counts["preemptions"] += 1
        return []

    def _told(self, one: Running, choice: Choice | MachineError) -> Event:
        """Tells of a token that was chosen, with which its sequence may end."""
        if isinstance(choice, MachineError):
            self._end(one)
            return Event(one.number, None, "failed", error=str(choice))
        ended = self._end_of(one, choice.token, 1)
        one.left -= 1
        self._counts["new_tokens"] += 1
        if ended is not None:
            self._end(one)
        return Event(one.number, choice.token, ended, choice.logprob, choice.likeliest, cached=one.cached)

    def _end_of(self, one: Running, token: int, chosen: int) -> Ended | None:
        """Why a sequence ends with a token, the last of so many that were just chosen; None if it does not."""
        if token in one.request.stop_tokens:
            return "end_token"
        constraint = one.request.constraint
        if constraint is not None and constraint.finished:
            return "stop"
        return one.limit if one.left == chosen else None

    def _end(self, one: Running) -> None:
        """Takes a sequence out, and keeps what it remembers for others that begin like it."""
        if one.slot is not None:
            self._memory.leave(one, keep=True)
        self._scheduler.leave(one)
        self._choosers.pop(one.number, None)
        if self._proposer is not None:
            self._proposer.forget(one.number)
        self._is_full = False
        del self._live[one.number]


class _Row(NamedTuple):
    """A row behind which a token may be chosen. peak, likeliest: its largest logit, and that logit's token."""

    hidden: Float[Tensor, " D"]
    logits: Float[Tensor, " V"]
    peak: float
    likeliest: int


class _Chosen(NamedTuple):
    """What was chosen behind a piece. accepted: so many of its drafts. hidden: that the last token was chosen from."""

    choices: list[Choice | MachineError]
    accepted: int = 0
    hidden: Float[Tensor, " D"] | None = None


def _begun(piece: Piece, most: int, branches: bool) -> Begun:
    """The text behind which drafts may be put: none where no token is chosen, and never beyond its last."""
    one = piece.sequence
    request = one.request
    count = min(most, one.left - 1) if piece.is_last else 0
    return Begun(one.number, one.tokens, count, request.sampling, request.sequence, one.hidden, branches)
