"""The thread that owns an engine. Whoever serves requests asks it from an event loop, and reads events from a queue.

An engine is not thread-safe, and a step of it takes milliseconds to seconds. So one thread steps it and nothing else
touches it: orders (submit, stop, cancel, call) go in through a queue, and the events of a step come out in one wake-up
of the loop.
"""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from longwave.engine import Engine, Event, Request
from longwave.errors import MachineError, one_line

T = TypeVar("T")


Observer = Callable[[Engine, Sequence[Event]], None]
"""Is told of every step and what came of it, in the runner's thread: measurements."""


@dataclass(eq=False)
class Batch:
    """Requests of one client, submitted together.

    events: what comes of them, each with the index of its request. running: the engine's number of each request that
    has not ended, by its index.
    """

    events: asyncio.Queue[tuple[int, Event]] = field(default_factory=asyncio.Queue[tuple[int, Event]])
    running: dict[int, int] = field(default_factory=dict[int, int])


class Runner:
    """Runs one engine in a thread of its own.

    Every method but `close` is called in the event loop that `start` was called in.
    failure: why the engine cannot go on, once it cannot; all requests fail with it.
    """

    def __init__(self, engine: Engine, name: str, observer: Observer | None = None) -> None:
        self._engine, self._observer = engine, observer
        self._orders = queue.SimpleQueue[Callable[[], None] | None]()
        self._owners = dict[int, tuple[Batch, int]]()  # of every running request, by the engine's number; the loop's
        self._thread = threading.Thread(target=self._run, name=f"engine of {name}", daemon=True)
        self._loop: asyncio.AbstractEventLoop | None = None
        self.failure: str | None = None

    def start(self) -> None:
        """Begins to run requests; events are delivered to the loop that is running."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    def close(self) -> None:
        """Ends the thread after its present step."""
        self._orders.put(None)
        if self._thread.is_alive():
            self._thread.join()

    async def submit(self, requests: Sequence[Request]) -> Batch:
        """Hands requests to the engine, all or none.

        Raises UserError for one that it refuses, QueueFull where too many wait, and MachineError once it has failed.
        """
        batch = Batch()
        try:
            await self.call(lambda: self._submit(requests, batch))
        except asyncio.CancelledError:  # whoever asked has gone, perhaps after the engine took the requests
            self._orders.put(lambda: self._tell(self.cancel, batch))
            raise
        return batch

    async def call(self, function: Callable[[], T]) -> T:
        """The result of a function that runs in the engine's thread, between two steps."""
        assert self._loop is not None
        done: asyncio.Future[T] = self._loop.create_future()

        def order() -> None:
            try:
                if self.failure is not None:
                    raise MachineError(self.failure)
                result = function()
            except Exception as error:
                self._tell(_settle, done, None, error)
            else:
                self._tell(_settle, done, result, None)

        self._orders.put(order)
        return await done

    def stop(self, batch: Batch, index: int) -> None:
        """Ends a request whose text is complete, as by a stop string; nothing more is told of it."""
        if (number := batch.running.pop(index, None)) is not None:
            self._owners.pop(number, None)
            self._cancel(number)

    def cancel(self, batch: Batch) -> None:
        """Ends requests that nobody waits for; nothing more is told of them."""
        for number in batch.running.values():
            self._owners.pop(number, None)
            self._cancel(number)
        batch.running.clear()

    def cancel_all(self) -> None:
        """Ends all requests; each is told so by its last event."""
        for number in self._owners:
            self._cancel(number)
        self._deliver([Event(number, None, "cancelled") for number in self._owners])

    def _cancel(self, number: int) -> None:
        self._orders.put(lambda: None if self.failure else self._engine.cancel(number))

    def _submit(self, requests: Sequence[Request], batch: Batch) -> None:
        numbers = list[int]()
        try:
            for request in requests:
                numbers.append(self._engine.submit(request))
        except Exception:
            for number in numbers:
                self._engine.cancel(number)
            raise
        self._tell(self._own, batch, numbers)

    def _own(self, batch: Batch, numbers: Sequence[int]) -> None:
        batch.running = dict(enumerate(numbers))
        self._owners.update({number: (batch, index) for index, number in enumerate(numbers)})

    def _run(self) -> None:
        try:
            while self._obey():
                events = self._engine.step()
                self._observe(events)
                if events:
                    self._tell(self._deliver, events)
        except Exception as error:  # the engine is in an unknown state: nothing can go on
            self.failure = one_line(f"{type(error).__name__}: {error}")
            self._tell(self._fail_all)
            while (order := self._orders.get()) is not None:
                order()

    def _obey(self) -> bool:
        """Carries out all orders, waiting for one while the engine is idle; False once it is to end."""
        while True:
            try:
                order = self._orders.get_nowait()
            except queue.Empty:
                if not self._engine.idle:
                    return True
                self._observe([])  # requests may have ended without a step
                order = self._orders.get()
            if order is None:
                return False
            order()

    def _observe(self, events: Sequence[Event]) -> None:
        if self._observer is not None:
            self._observer(self._engine, events)

    def _tell(self, function: Callable[..., Any], *arguments: Any) -> None:
        """Has the event loop call a function, unless the loop has ended."""
        assert self._loop is not None
        try:
            self._loop.call_soon_threadsafe(function, *arguments)
        except RuntimeError:
            return

    def _deliver(self, events: Sequence[Event]) -> None:
        for event in events:
            if (owner := self._owners.get(event.request)) is None:
                continue  # of a request that was ended
            batch, index = owner
            if event.ended is not None:
                del self._owners[event.request], batch.running[index]
            batch.events.put_nowait((index, event))

    def _fail_all(self) -> None:
        self._deliver([Event(number, None, "failed", error=self.failure) for number in self._owners])


def _settle(done: asyncio.Future[Any], result: Any, error: BaseException | None) -> None:
    if done.done():  # whoever asked has gone
        return
    if error is None:
        done.set_result(result)
    else:
        done.set_exception(error)
