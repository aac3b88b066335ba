"""`/v1/responses`: text in, text out, whole or as named events. Nothing is stored."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from longwave.serving.bodies import ResponseBody
from longwave.serving.chat import text_of
from longwave.serving.context import Context, begun, now
from longwave.serving.errors import ApiError
from longwave.serving.http import EventStream, while_connected
from longwave.serving.job import Job, Reason, Wish, texts_of
from longwave.serving.sampling import grammar_of, sampling_of
from longwave.serving.served import Served


async def responses(request: Request) -> Response:
    """Answers a request."""
    context, arrived = Context.of(request), now()
    body = await context.read(request, ResponseBody)
    served = context.model(body.model)
    if body.stream_options is not None and body.stream_options.include_usage is not None:
        message = "stream_options.include_usage: the last event always tells the usage; leave it out"
        raise ApiError(400, message, param="stream_options")
    prompt, wish = await asyncio.to_thread(_asked, served, body)
    job = await begun(served, [prompt], wish, arrived)
    answer = _Answer(job, body)
    if body.stream:
        return EventStream(answer.events(), job.let_go, named=True)
    return JSONResponse(await while_connected(request, answer.whole()))


def _asked(served: Served, body: ResponseBody) -> tuple[list[int], Wish]:
    """The ids of the conversation, and how it is to be continued."""
    wish = Wish(
        sampling=sampling_of(body, served.vocabulary),
        most=body.max_output_tokens,
        least=body.min_tokens or 0,
        ends=frozenset() if body.ignore_eos else served.chat_ends,
        grammar=grammar_of(body, body.text.format if body.text else None, served.grammars),
    )
    return served.chat_prompt(_messages(body), {}), wish


def _messages(body: ResponseBody) -> list[dict[str, str]]:
    said = [] if body.instructions is None else [("system", body.instructions)]
    if isinstance(body.input, str):
        said.append(("user", body.input))
    else:
        said += [(one.role, text_of(one.content)) for one in body.input]
    return [{"role": "system" if role == "developer" else role, "content": text} for role, text in said]


class _Answer:
    """The answer to one request: a response with one message."""

    def __init__(self, job: Job, body: ResponseBody) -> None:
        self._job, self._body, self._created = job, body, int(time.time())
        self._id, self._message_id = f"resp_{uuid.uuid4().hex}", f"msg_{uuid.uuid4().hex}"
        self._number = -1

    async def whole(self) -> dict[str, Any]:
        """The response, once it is whole."""
        [(text, _, reason)] = await texts_of(self._job)
        return self._response(_status(reason), [self._message(text, _status(reason))])

    async def events(self) -> AsyncIterator[dict[str, Any]]:
        """The response as it grows."""
        yield self._event("created", response=self._response("in_progress", []))
        yield self._event("in_progress", response=self._response("in_progress", []))
        place = {"output_index": 0}
        yield self._event("output_item.added", **place, item=self._message(None, "in_progress"))
        inside = {**place, "item_id": self._message_id, "content_index": 0}
        yield self._event("content_part.added", **inside, part=_part(""))
        text, reason = "", "stop"
        async for piece in self._job.pieces():
            text, reason = text + piece.text, piece.ended or reason
            if piece.text:
                yield self._event("output_text.delta", **inside, delta=piece.text, logprobs=[])
        yield self._event("output_text.done", **inside, text=text, logprobs=[])
        yield self._event("content_part.done", **inside, part=_part(text))
        status = _status(reason)
        message = self._message(text, status)
        yield self._event("output_item.done", **place, item=message)
        yield self._event(status, response=self._response(status, [message]))

    def _event(self, kind: str, **content: Any) -> dict[str, Any]:
        self._number += 1
        return {"type": f"response.{kind}", "sequence_number": self._number, **content}

    def _message(self, text: str | None, status: str) -> dict[str, Any]:
        content = [] if text is None else [_part(text)]
        return {"id": self._message_id, "type": "message", "role": "assistant", "status": status, "content": content}

    def _response(self, status: str, output: list[dict[str, Any]]) -> dict[str, Any]:
        body = self._body
        form = body.text.format.model_dump(by_alias=True, exclude_none=True) if body.text and body.text.format else None
        return {
            "id": self._id,
            "object": "response",
            "created_at": self._created,
            "status": status,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "metadata": body.metadata or {},
            "model": self._job.served.name,
            "output": output,
            "parallel_tool_calls": True if body.parallel_tool_calls is None else body.parallel_tool_calls,
            "previous_response_id": None,
            "store": False,
            "temperature": 1.0 if body.temperature is None else body.temperature,
            "text": {"format": form or {"type": "text"}},
            "tool_choice": body.tool_choice or "auto",
            "tools": [],
            "top_p": 1.0 if body.top_p is None else body.top_p,
            "truncation": "disabled",
            "usage": self._usage() if status != "in_progress" else None,
        }

    def _usage(self) -> dict[str, Any]:
        counted = self._job.usage
        return {
            "input_tokens": counted["prompt_tokens"],
            "input_tokens_details": {"cached_tokens": self._job.cached, "cache_write_tokens": 0},
            "output_tokens": counted["completion_tokens"],
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": counted["total_tokens"],
        }


def _status(reason: str | Reason) -> str:
    return "completed" if reason == "stop" else "incomplete"


def _part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
