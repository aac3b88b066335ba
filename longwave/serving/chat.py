"""`/v1/chat/completions`: conversations answered, with tools where the model's chat template takes them."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from longwave.engine import Event
from longwave.errors import require
from longwave.inference.grammar import Grammar
from longwave.serving.bodies import ChatBody, Message, NamedTool, TextPart, Tool
from longwave.serving.completions import DONE, ids_of, stops_of, usage_told
from longwave.serving.context import Context, begun, now
from longwave.serving.errors import ApiError
from longwave.serving.http import EventStream, while_connected
from longwave.serving.job import Job, Reason, Wish, texts_of
from longwave.serving.logprobs import chat_logprobs
from longwave.serving.sampling import grammar_of, sampling_of
from longwave.serving.served import Served
from longwave.serving.tools import CallReader, Form, tools_of


async def chat_completions(request: Request) -> Response:
    """Answers a request."""
    context, arrived = Context.of(request), now()
    body = await context.read(request, ChatBody)
    served = context.model(body.model)
    usage_told(body.stream_options, body.stream)
    prompt, wish = await asyncio.to_thread(_asked, served, body)
    job = await begun(served, [prompt], wish, arrived)
    answer = _Answer(job, body)
    if body.stream:
        return EventStream(answer.events(), job.let_go)
    return JSONResponse(await while_connected(request, answer.whole()))


def _asked(served: Served, body: ChatBody) -> tuple[list[int], Wish]:
    """The ids of the conversation, and how it is to be continued."""
    tools = tools_of(body)
    variables = dict[str, Any](body.chat_template_kwargs or {})
    if tools:
        if served.chat is not None and "tools" not in served.chat.variables:
            raise ApiError(400, f"tools: the chat template of {served.name} takes none", param="tools")
        variables["tools"] = [one.model_dump(exclude_none=True) for one in tools]
    return served.chat_prompt(messages_of(body.messages), variables), _wish(served, body, tools)


def _wish(served: Served, body: ChatBody, tools: Sequence[Tool]) -> Wish:
    if body.top_logprobs is not None and not body.logprobs:
        raise ApiError(400, "top_logprobs has no effect without logprobs; set it to true", param="top_logprobs")
    if None not in (body.max_tokens, body.max_completion_tokens) and body.max_tokens != body.max_completion_tokens:
        raise ApiError(400, "max_tokens and max_completion_tokens are one; leave one out", param="max_tokens")
    return Wish(
        sampling=sampling_of(body, served.vocabulary),
        most=body.max_completion_tokens or body.max_tokens,
        least=body.min_tokens or 0,
        stops=stops_of(body.stop),
        ends=frozenset() if body.ignore_eos else served.chat_ends,
        copies=body.n or 1,
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        grammar=_forced_call(served, body, tools) or grammar_of(body, body.response_format, served.grammars),
    )


def _forced_call(served: Served, body: ChatBody, tools: Sequence[Tool]) -> Grammar | None:
    """What holds the output to a call, where one must be made."""
    if isinstance(body.tool_choice, NamedTool):
        tools = [one for one in tools if one.function.name == body.tool_choice.function.name]
    elif body.tool_choice != "required":
        return None
    return served.grammars.lark(Form.of(served.tokenizer).grammar(tools))


def messages_of(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Messages as chat templates read them. Raises UserError for one without content that calls nothing."""
    return [_message(one, place) for place, one in enumerate(messages)]


def _message(message: Message, place: int) -> dict[str, Any]:
    given = message.model_dump(exclude_none=True, exclude={"annotations"})
    said = message.content is not None or bool(message.tool_calls)
    require(said, f"messages[{place}].content is missing")
    calling = message.tool_calls is None or message.role == "assistant"
    require(calling, f"messages[{place}].tool_calls: only the assistant calls tools")
    given["role"] = "system" if message.role == "developer" else message.role
    given["content"] = text_of(message.content)
    for call in given.get("tool_calls", ()):
        with suppress(ValueError, RecursionError):  # templates write an object; what is no JSON is written as it is
            call["function"]["arguments"] = json.loads(call["function"]["arguments"])
    return given


def text_of(content: str | Sequence[TextPart] | None) -> str:
    """The text of a message."""
    return "" if content is None else content if isinstance(content, str) else "".join(part.text for part in content)


class _Answer:
    """The answer to one request."""

    def __init__(self, job: Job, body: ChatBody) -> None:
        self._job, self._body, self._tokenizer = job, body, job.served.tokenizer
        self._id, self._created = f"chatcmpl-{uuid.uuid4().hex}", int(time.time())
        one_call = body.parallel_tool_calls is False or isinstance(body.tool_choice, NamedTool)
        form, self._calling = Form.of(self._tokenizer), bool(tools_of(body))
        self._readers = [CallReader(form, 1 if one_call else None) for _ in range(body.n or 1)]

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self._id, "object": kind, "created": self._created, "model": self._job.served.name}

    async def whole(self) -> dict[str, Any]:
        """All choices."""
        choices = [
            self._choice(place, text, events, reason)
            for place, (text, events, reason) in enumerate(await texts_of(self._job))
        ]
        ids = self._job.prompt_ids(self._body)
        return {**self._head("chat.completion"), "choices": choices, "usage": self._job.usage, **ids}

    def _choice(self, index: int, text: str, events: Sequence[Event], reason: Reason) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
        if self._calling:
            reader = self._readers[index]
            message["content"] = (reader.push(text) + reader.finish()) or None
            if reader.calls:
                message["tool_calls"] = [call.content() for call in reader.calls]
            else:
                message["content"] = text
        finish = "tool_calls" if "tool_calls" in message else reason
        made = {"index": index, "message": message, "logprobs": self._logprobs(events), "finish_reason": finish}
        return made | ids_of(events, self._body.return_token_ids)

    def _logprobs(self, events: Sequence[Event]) -> dict[str, Any] | None:
        return chat_logprobs(self._tokenizer, events) if self._body.logprobs else None

    async def events(self) -> AsyncIterator[dict[str, Any] | str]:
        """The choices in pieces."""
        counted = usage_told(self._body.stream_options, self._body.stream)
        head = self._head("chat.completion.chunk") | ({"usage": None} if counted else {})
        first = head | self._job.prompt_ids(self._body)
        for index in range(self._body.n or 1):
            yield {**first, "choices": [self._delta(index, {"role": "assistant", "content": ""})]}
        async for index, text, events, ended in self._job.pieces():
            for choice in self._pieces(index, text, events, ended):
                yield {**head, "choices": [choice]}
        if counted:
            yield {**head, "choices": [], "usage": self._job.usage}
        yield DONE

    def _pieces(self, index: int, text: str, events: Sequence[Event], ended: Reason | None) -> list[dict[str, Any]]:
        """A piece as it is sent: its text, the calls that are whole with it, and the reason why it ends."""
        reader = self._readers[index]
        told = len(reader.calls)
        if self._calling:
            text = reader.push(text) + (reader.finish() if ended else "")
        logprobs = self._logprobs(events)
        ids = ids_of(events, self._body.return_token_ids)
        pieces = [self._delta(index, {"content": text}, logprobs) | ids] if text or logprobs or ids else []
        calls = [call.content(told + place) for place, call in enumerate(reader.calls[told:])]
        pieces += [self._delta(index, {"tool_calls": calls})] if calls else []
        if ended:
            pieces.append(self._delta(index, {}, None, "tool_calls" if reader.calls else ended))
        return pieces

    def _delta(
        self, index: int, delta: dict[str, Any], logprobs: dict[str, Any] | None = None, reason: str | None = None
    ) -> dict[str, Any]:
        return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
