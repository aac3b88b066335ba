"""Streams of events: whoever goes, at whatever moment, is let go of."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from longwave.serving.http import EventStream


@pytest.mark.parametrize("before", [0, 1, 2, 5])
def test_a_client_that_goes_at_any_write_is_let_go(before: int):
    """The client takes so many writes and no more, and then goes: the first is the head, the others are events."""
    let_go, taken = list[bool](), list[Any]()

    async def events() -> AsyncIterator[dict[str, Any] | str]:
        for number in range(3):
            yield str(number)

    async def send(message: Any) -> None:
        if len(taken) == before:
            await asyncio.Event().wait()
        taken.append(message["type"])

    async def receive() -> dict[str, str]:
        await asyncio.sleep(0.05)
        return {"type": "http.disconnect"}

    stream = EventStream(events(), lambda: let_go.append(True))
    asyncio.run(asyncio.wait_for(stream({"type": "http"}, receive, send), 5))
    assert let_go == [True]
    assert len(taken) == before
