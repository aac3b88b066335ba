"""A server from its beginning to its end: a socket, the models, and uvicorn between them."""

from __future__ import annotations

import asyncio
import errno
import signal
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import Any, NamedTuple

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from longwave.api import load
from longwave.engine import Engine, EngineOptions
from longwave.errors import MachineError, UserError, require
from longwave.inference.drafter import drafter
from longwave.serving.app import application
from longwave.serving.gate import Access, Gate
from longwave.serving.limits import Limits
from longwave.serving.metrics import Metrics
from longwave.serving.served import Served, names_of

_HEAD = 64 << 10  # bytes of a request's head
_KEEP_ALIVE = 15  # seconds that a connection may wait for its next request


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What is served, and where. folders: of the models. names: of the first of them, in place of their folders'.

    draft: who drafts tokens for the models to check (`longwave.inference.drafter`); None for nobody.
    """

    folders: Sequence[str]
    names: Sequence[str] = ()
    host: str = "127.0.0.1"
    port: int = 8000
    key: str | None = None
    origins: tuple[str, ...] = ()
    draft: str | None = None
    dtype: str | None = None
    device: str = "auto"
    engine: EngineOptions = field(default_factory=EngineOptions)
    limits: Limits = field(default_factory=Limits)


class Running(NamedTuple):
    """A server that takes requests. stop: ends it in order, from any thread."""

    url: str
    models: Sequence[Served]
    stop: Callable[[], None]


def serve(setup: Setup, told: Callable[[Running], None] = lambda running: None) -> None:
    """Serves until the process is told to end (SIGTERM, SIGINT), or the server is.

    told: called once requests are taken.
    Raises UserError for an address that cannot be used and a folder that is no model.
    """
    require(bool(setup.folders), "give a model folder, or several")
    names = names_of(setup.folders, setup.names)
    with listening(setup.host, setup.port) as bound:
        metrics = Metrics()
        models = [_loaded(name, folder, setup, metrics) for name, folder in zip(names, setup.folders, strict=True)]
        access = Access(setup.key, _is_loopback(bound), setup.origins)
        app = application({one.name: one for one in models}, metrics, setup.limits, access)
        server = _Server(_config(app, setup.limits), app, models, setup.limits)
        server.told = lambda: told(Running(_url(bound), models, server.end))
        asyncio.run(server.serve(sockets=[bound]))


def _loaded(name: str, folder: str, setup: Setup, metrics: Metrics) -> Served:
    model = load(folder, dtype=setup.dtype, device=setup.device)
    engine = Engine(model, setup.engine, proposer=drafter(setup.draft, model, setup.engine.running))
    return Served(name, model, engine, metrics, setup.limits)


@contextmanager
def listening(host: str, port: int) -> Iterator[socket.socket]:
    """A socket that is bound before the models are loaded, so that a busy port is told at once."""
    require(0 <= port < 1 << 16, f"port = {port}: 0 (any that is free) to 65535")
    try:
        [(family, kind, protocol, _, address), *_] = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (socket.gaierror, UnicodeError) as error:
        raise UserError(f"host = {host!r}: {error}") from None
    with socket.socket(family, kind, protocol) as bound:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            bound.bind(address)
            bound.listen(1024)
        except OSError as error:
            raise _unusable(host, port, error) from None
        yield bound


def _unusable(host: str, port: int, error: OSError) -> UserError | MachineError:
    if error.errno == errno.EADDRINUSE:
        return UserError(f"port = {port}: another program listens there; give another with --port, or 0 for any")
    if error.errno in (errno.EACCES, errno.EPERM):
        return UserError(f"port = {port}: not for this user; give one of 1024 or more with --port")
    if error.errno == errno.EADDRNOTAVAIL:
        return UserError(f"host = {host!r}: no address of this machine")
    return MachineError(f"{host}:{port}: {error.strerror or error}")


def _is_loopback(bound: socket.socket) -> bool:
    return str(bound.getsockname()[0]).startswith("127.") or bound.getsockname()[0] == "::1"


def _url(bound: socket.socket) -> str:
    host, port = bound.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _config(app: Any, limits: Limits) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        http=_guarded(limits),
        ws="none",
        lifespan="on",
        log_level="error",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        h11_max_incomplete_event_size=_HEAD,
        timeout_keep_alive=_KEEP_ALIVE,
        timeout_graceful_shutdown=int(limits.grace_seconds) + 5,
    )


def _guarded(limits: Limits) -> type[H11Protocol]:
    """The protocol of a connection that ends when the client sends no whole head in time, or does not read."""

    class Guarded(H11Protocol):
        _deadline: asyncio.TimerHandle | None = None  # for the head of a request
        _unread: asyncio.TimerHandle | None = None  # for the client to read what was written

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            if len(self.connections) > 2 * limits.connections:
                transport.abort()
                return
            self._watch()

        def connection_lost(self, exc: Exception | None) -> None:
            self._unwatch()
            if self._unread is not None:
                self._unread.cancel()
            super().connection_lost(exc)

        def data_received(self, data: bytes) -> None:
            if self._deadline is None and (self.cycle is None or self.cycle.response_complete):
                self._watch()  # a further request begins
            super().data_received(data)
            if self.cycle is not None and not self.cycle.response_complete:
                self._unwatch()

        def on_response_complete(self) -> None:
            super().on_response_complete()
            if self.conn.their_state is h11.SEND_BODY and self._deadline is None:
                self._watch()  # answered before the body was there: the client may send it, but not for ever

        def pause_writing(self) -> None:
            super().pause_writing()
            self._unread = self.loop.call_later(limits.write_seconds, self.transport.abort)

        def resume_writing(self) -> None:
            super().resume_writing()
            if self._unread is not None:
                self._unread.cancel()

        def _watch(self) -> None:
            self._deadline = self.loop.call_later(limits.header_seconds, self._late)

        def _unwatch(self) -> None:
            if self._deadline is not None:
                self._deadline.cancel()
                self._deadline = None

        def _late(self) -> None:
            self._deadline = None
            if not self.transport.is_closing():
                self.transport.abort()

    return Guarded


class _Server(uvicorn.Server):
    """A server that ends in order: told to, it takes no more requests, and ends those that take too long.

    Told a second time, it ends at once. told: called once requests are taken.
    """

    def __init__(self, config: uvicorn.Config, app: Gate, models: Sequence[Served], limits: Limits) -> None:
        super().__init__(config)
        self.told: Callable[[], None] = lambda: None
        self._gate, self._models, self._limits = app, models, limits

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begins to take requests, and tells so."""
        await super().startup(sockets)
        if self.started:
            self.told()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Called by a signal."""
        self.force_exit = self.force_exit or self.should_exit
        self.end()

    def end(self) -> None:
        """Begins to end."""
        self.should_exit = True
        self._gate.close()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """While the block runs, signals end the server; they are not raised again, as ending was in order."""
        if threading.current_thread() is not threading.main_thread():  # as in tests; no signals come there
            yield
            return
        before = {one: signal.signal(one, self.handle_exit) for one in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for one, handler in before.items():
                signal.signal(one, handler)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Waits for running requests, ends those that take longer than they may, and then the engines."""
        late = asyncio.get_running_loop().call_later(self._limits.grace_seconds, self._end_requests)
        try:
            await super().shutdown(sockets)
        finally:
            late.cancel()

    def _end_requests(self) -> None:
        for served in self._models:
            served.runner.cancel_all()
