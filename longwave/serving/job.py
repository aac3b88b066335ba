"""What one HTTP request asks of an engine, and the text that comes of it, piece by piece."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from longwave.data.tokenizer import StreamDecoder
from longwave.engine import Event, Request, Sampling
from longwave.inference.grammar import Grammar
from longwave.inference.text import Writer
from longwave.serving.bodies import Choices
from longwave.serving.errors import ApiError
from longwave.serving.runner import Batch
from longwave.serving.served import Served

Reason = Literal["stop", "length"]
_REASONS: dict[str, Reason] = {
    "end_token": "stop",
    "stop": "stop",
    "max_new_tokens": "length",
    "context_window": "length",
}


@dataclass(frozen=True, kw_only=True)
class Wish:
    """How prompts are to be continued.

    most, least: new tokens. stops: strings that end a text. ends: tokens that do. copies: texts for each prompt.
    logprobs: how many of the likeliest tokens are told at each place; None for no log-probabilities.
    grammar: what each text is held to.
    """

    sampling: Sampling
    most: int | None = None
    least: int = 0
    stops: Sequence[str] = ()
    ends: frozenset[int] = frozenset()
    copies: int = 1
    logprobs: int | None = None
    grammar: Grammar | None = None


class Piece(NamedTuple):
    """Some text of one choice. events: the tokens that have come with it. ended: why the text ends here."""

    choice: int
    text: str
    events: tuple[Event, ...]
    ended: Reason | None


@dataclass
class Job:
    """The continuation of prompts by a model.

    arrived: when the request came, by `time.perf_counter`. new_tokens: of all choices so far. cached: tokens of the
    prompts that did not run for the first text of each.
    """

    served: Served
    prompts: Sequence[Sequence[int]]
    wish: Wish
    arrived: float
    new_tokens: int = 0
    cached: int = 0
    _seen: dict[int, float] = field(default_factory=dict[int, float])  # when each choice's last token came

    async def begin(self) -> None:
        """Hands the requests to the engine. Raises UserError or ApiError for what it does not take."""
        served, limit = self.served, self.served.limits.request_seconds
        requests = [
            Request(
                prompt=tuple(prompt),
                max_new_tokens=self.wish.most or max(served.window + 1 - len(prompt), 1),
                sampling=self.wish.sampling,
                stop_tokens=self.wish.ends,
                min_new_tokens=self.wish.least,
                logprobs=self.wish.logprobs,
                constraint=None if self.wish.grammar is None else self.wish.grammar.copy(),
                timeout=limit,
                sequence=copy,
            )
            for prompt in self.prompts
            for copy in range(self.wish.copies)
        ]
        for one in requests:
            served.engine.check(one)
        writers = [Writer(self._decoder(one), self.wish.stops, served.tokenizer.special_tokens) for one in requests]
        self._writers, self._requests = writers, requests
        self._batch: Batch = await served.runner.submit(requests)

    def _decoder(self, request: Request) -> StreamDecoder:
        return StreamDecoder(self.served.tokenizer, after=request.prompt[-64:])

    @property
    def usage(self) -> dict[str, Any]:
        """Tokens in and out."""
        read = sum(map(len, self.prompts))
        counted = {"prompt_tokens": read, "completion_tokens": self.new_tokens}
        details = {"prompt_tokens_details": {"cached_tokens": self.cached}}
        return {**counted, "total_tokens": read + self.new_tokens, **details}

    def prompt_ids(self, body: Choices) -> dict[str, Any]:
        """The ids of the prompts, where they are asked for; of one prompt, its own."""
        if not body.return_token_ids:
            return {}
        ids = [list(one) for one in self.prompts]
        return {"prompt_token_ids": ids[0] if len(ids) == 1 else ids}

    async def pieces(self) -> AsyncIterator[Piece]:
        """What is written, until every text has ended; whoever stops reading ends the requests.

        Raises ApiError where the engine failed on one of them, or took too long.
        """
        try:
            left = len(self._writers)
            while left:
                for index, events in (await self._waiting()).items():
                    if (piece := self._piece(index, events)) is not None:
                        left -= piece.ended is not None
                        yield piece
        finally:
            self.let_go()

    def let_go(self) -> None:
        """Ends the requests that still run."""
        self.served.runner.cancel(self._batch)

    async def _waiting(self) -> dict[int, list[Event]]:
        """The events that are there, at least one, by their choice."""
        found = dict[int, list[Event]]()
        index, event = await self._batch.events.get()
        while True:
            found.setdefault(index, []).append(event)
            try:
                index, event = self._batch.events.get_nowait()
            except asyncio.QueueEmpty:
                return found

    def _piece(self, index: int, events: Sequence[Event]) -> Piece | None:
        writer, text, taken, ended = self._writers[index], "", list[Event](), None
        if writer.stopped:
            return None  # of steps that ran before the engine knew
        for event in events:
            if event.token is not None:
                text += writer.push(event.token)
                taken.append(event)
                self._count(index, event)
            if writer.stopped:
                self.served.runner.stop(self._batch, index)
                return Piece(index, text, tuple(taken), "stop")
            if event.ended is not None:
                ended = self._reason(index, event)
                text += writer.finish()
        return Piece(index, text, tuple(taken), ended)

    def _count(self, index: int, event: Event) -> None:
        """Takes the time of a token, and with the first one how much of its prompt was there."""
        self.new_tokens += 1
        now, metrics = time.perf_counter(), self.served.metrics
        last = self._seen.get(index)
        if last is None and index % self.wish.copies == 0:
            self.cached += event.cached
        (metrics.first_token if last is None else metrics.next_token).observe(now - (last or self.arrived))
        self._seen[index] = now

    def _reason(self, index: int, event: Event) -> Reason:
        if event.ended in _REASONS:
            return _REASONS[event.ended]
        if event.ended == "timeout":
            raise ApiError(504, "the request took longer than this server allows", code="timeout")
        if event.ended == "cancelled":
            raise ApiError(503, "the server is ending", code="shutting_down")
        grammar = self._requests[index].constraint
        if isinstance(grammar, Grammar) and grammar.fault is not None:
            raise ApiError(400, f"the output cannot be held to this: {grammar.fault}", code="invalid_value")
        raise ApiError(500, event.error or "the engine failed on this request", code="internal_error")


class Text(NamedTuple):
    """A whole text, with its tokens."""

    text: str
    events: tuple[Event, ...]
    reason: Reason


async def texts_of(job: Job) -> list[Text]:
    """All texts of a job, once they are whole."""
    texts = dict[int, str]()
    events = dict[int, list[Event]]()
    reasons = dict[int, Reason]()
    async for piece in job.pieces():
        texts[piece.choice] = texts.get(piece.choice, "") + piece.text
        events.setdefault(piece.choice, []).extend(piece.events)
        if piece.ended is not None:
            reasons[piece.choice] = piece.ended
    return [Text(texts[one], tuple(events[one]), reasons[one]) for one in sorted(texts)]
