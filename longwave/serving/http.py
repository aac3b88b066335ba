"""HTTP around the endpoints: bodies read within limits, answers that end when nobody reads them, events of a stream."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import suppress
from typing import Any, TypeVar

from pydantic import ValidationError
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from longwave.serving.bodies import Body
from longwave.serving.errors import ApiError, api_error, invalid
from longwave.serving.limits import Limits

T = TypeVar("T")
B = TypeVar("B", bound=Body)
_SMALL = 1 << 16  # bytes of a body that is parsed at once; a larger one would hold up the loop


async def read_body(request: Request, kind: type[B], limits: Limits) -> B:
    """The body of a request. Raises ApiError for one that is too large, too slow, or does not fit."""
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if content_type != "application/json":
        raise ApiError(415, "content-type: application/json is expected (curl -H 'content-type: application/json')")
    content = await _content(request, limits)
    try:
        if len(content) <= _SMALL:
            return kind.model_validate_json(content)
        return await asyncio.to_thread(kind.model_validate_json, content)
    except ValidationError as error:
        raise invalid(error, kind) from None


async def _content(request: Request, limits: Limits) -> bytes:
    try:
        async with asyncio.timeout(limits.body_seconds):
            return await _whole(request, limits.body)
    except TimeoutError:
        raise ApiError(408, f"the body took longer than {limits.body_seconds:g} s", code="slow_body") from None


async def _whole(request: Request, most: int) -> bytes:
    """The bytes of a body; one that is too large is refused before it is read, and uvicorn lets go of what follows."""
    refusal, content = ApiError(413, f"a body of more than {most:,} bytes", code="body_too_large"), bytearray()
    told = request.headers.get("content-length", "")
    if told.isdigit() and int(told[:20]) > most:
        raise refusal
    async for chunk in request.stream():
        content += chunk
        if len(content) > most:
            raise refusal
    return bytes(content)


async def while_connected(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The result of the work, which ends when the client goes. Raises ClientDisconnect then."""
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_disconnected(request.receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        await _ended(task, gone)


class EventStream(Response):
    """Server-sent events, which end when the client goes.

    events: the data of each; a dict is sent as JSON, and one with a `type` under that name where `named`. let_go: is
    called at the end, also of a client that goes before the first event.
    """

    media_type = "text/event-stream"

    def __init__(
        self, events: AsyncIterator[dict[str, Any] | str], let_go: Callable[[], None], named: bool = False
    ) -> None:
        self.status_code, self.background, self._let_go = 200, None, let_go
        self._events, self._named = events, named
        self.init_headers({"cache-control": "no-cache", "x-accel-buffering": "no"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        sending, gone = asyncio.ensure_future(self._send(send)), asyncio.ensure_future(_disconnected(receive))
        try:
            await asyncio.wait({sending, gone}, return_when=asyncio.FIRST_COMPLETED)
            if sending.done():
                sending.result()
        finally:
            self._let_go()
            await _ended(sending, gone)

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        try:
            async for event in self._events:
                await self._write(send, event)
        except Exception as error:
            await self._write(send, api_error(error).content)
            if not isinstance(error, ApiError):
                raise
        finally:
            await self._events.aclose()  # pyright: ignore[reportAttributeAccessIssue]
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _write(self, send: Send, event: dict[str, Any] | str) -> None:
        await send({"type": "http.response.body", "body": self._encoded(event), "more_body": True})

    def _encoded(self, event: dict[str, Any] | str) -> bytes:
        name = f"event: {event['type']}\n" if self._named and isinstance(event, dict) and "type" in event else ""
        data = event if isinstance(event, str) else json.dumps(event, ensure_ascii=False, separators=(",", ":"))
        return f"{name}data: {data}\n\n".encode("utf-8", "replace")


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        continue


async def _ended(*tasks: asyncio.Future[Any]) -> None:
    """Cancels tasks and waits for their end."""
    for task in tasks:
        if not task.done():
            task.cancel()
            with suppress(asyncio.CancelledError, Exception):
                await task
