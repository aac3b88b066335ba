"""`/v1/completions`: texts continued, from text or token ids."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from longwave.engine import Event
from longwave.serving.bodies import CompletionBody, StreamOptions
from longwave.serving.context import Context, begun, now
from longwave.serving.errors import ApiError
from longwave.serving.http import EventStream, while_connected
from longwave.serving.job import Job, Reason, Wish, texts_of
from longwave.serving.limits import MOST_CHOICES
from longwave.serving.logprobs import completion_logprobs
from longwave.serving.sampling import grammar_of, sampling_of
from longwave.serving.served import Served

_MOST = 16  # new tokens where none are said, as OpenAI has it
DONE = "[DONE]"


async def completions(request: Request) -> Response:
    """Answers a request."""
    context, arrived = Context.of(request), now()
    body = await context.read(request, CompletionBody)
    served = context.model(body.model)
    _check(body)
    prompts, wish = await asyncio.to_thread(_asked, served, body)
    job = await begun(served, prompts, wish, arrived)
    answer = _Answer(job, body)
    if body.stream:
        return EventStream(answer.events(), job.let_go)
    return JSONResponse(await while_connected(request, answer.whole()))


def _check(body: CompletionBody) -> None:
    if body.best_of not in (None, body.n or 1):
        raise ApiError(400, f"best_of = {body.best_of}: not supported here beyond n; leave it out", param="best_of")
    if body.echo and body.logprobs is not None:
        message = "echo together with logprobs: log-probabilities of a prompt are not told here; leave one of them out"
        raise ApiError(400, message, param="echo")
    usage_told(body.stream_options, body.stream)


def _asked(served: Served, body: CompletionBody) -> tuple[list[list[int]], Wish]:
    """The ids of every prompt, and how they are to be continued."""
    prompt: Any = body.prompt
    several = prompt if isinstance(prompt, list) and not isinstance(prompt[0], int) else [prompt]
    choices = len(several) * (body.n or 1)
    if choices > MOST_CHOICES:
        raise ApiError(400, f"n times the prompts = {choices}: {MOST_CHOICES} at most", param="n")
    prompts = [served.text_prompt(one) if isinstance(one, str) else list(one) for one in several]
    return prompts, _wish(served, body)


def _wish(served: Served, body: CompletionBody) -> Wish:
    return Wish(
        sampling=sampling_of(body, served.vocabulary),
        most=body.max_tokens or _MOST,
        least=body.min_tokens or 0,
        stops=stops_of(body.stop),
        ends=frozenset() if body.ignore_eos else served.ends,
        copies=body.n or 1,
        logprobs=body.logprobs,
        grammar=grammar_of(body, None, served.grammars),
    )


def stops_of(stop: str | list[str] | None) -> tuple[str, ...]:
    """The strings that end a text."""
    return () if stop is None else (stop,) if isinstance(stop, str) else tuple(stop)


def ids_of(events: Sequence[Event], told: bool | None) -> dict[str, Any]:
    """The ids of a piece's tokens, where they are asked for."""
    return {"token_ids": [event.token for event in events if event.token is not None]} if told else {}


def usage_told(options: StreamOptions | None, stream: bool | None) -> bool:
    """Whether a stream ends with its usage. Raises ApiError for options of a stream that is none."""
    if options is not None and not stream:
        raise ApiError(400, "stream_options has no effect without stream; leave it out", param="stream_options")
    return options is not None and bool(options.include_usage)


class _Answer:
    """The answer to one request."""

    def __init__(self, job: Job, body: CompletionBody) -> None:
        self._job, self._body = job, body
        self._head = {"id": f"cmpl-{uuid.uuid4().hex}", "object": "text_completion", "created": int(time.time())}
        self._head["model"] = job.served.name

    async def whole(self) -> dict[str, Any]:
        """All choices."""
        choices = [
            self._choice(place, self._echo(place) + text, events, reason)
            for place, (text, events, reason) in enumerate(await texts_of(self._job))
        ]
        return {**self._head, "choices": choices, "usage": self._job.usage, **self._job.prompt_ids(self._body)}

    async def events(self) -> AsyncIterator[dict[str, Any] | str]:
        """The choices in pieces."""
        counted = usage_told(self._body.stream_options, self._body.stream)
        usage = {"usage": None} if counted else {}
        prompt_ids = self._job.prompt_ids(self._body)
        lengths = dict[int, int]()  # of each choice's text so far
        async for choice, text, events, ended in self._job.pieces():
            text = text if choice in lengths else self._echo(choice) + text
            offset = lengths.get(choice, 0)
            lengths[choice] = offset + len(text)
            yield {**self._head, "choices": [self._choice(choice, text, events, ended, offset)], **usage, **prompt_ids}
            prompt_ids = {}
        if counted:
            yield {**self._head, "choices": [], "usage": self._job.usage}
        yield DONE

    def _choice(
        self, index: int, text: str, events: Sequence[Event], reason: Reason | None, offset: int = 0
    ) -> dict[str, Any]:
        told = self._body.logprobs is not None
        logprobs = completion_logprobs(self._job.served.tokenizer, events, offset) if told else None
        ids = ids_of(events, self._body.return_token_ids)
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason, **ids}

    def _echo(self, choice: int) -> str:
        """The prompt of a choice, where it is to be repeated."""
        if not self._body.echo:
            return ""
        return self._job.served.tokenizer.decode(list(self._job.prompts[choice // (self._body.n or 1)]))
