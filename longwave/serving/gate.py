"""What every request passes before an endpoint sees it: who may ask, how many at a time, and what is counted."""

from __future__ import annotations

import hmac
import ipaddress
import time
from dataclasses import dataclass

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from longwave.serving.context import Context
from longwave.serving.errors import ApiError

_OPEN = {"/", "/health"}  # what needs no key
_V1 = {f"/v1/{name}" for name in ("models", "completions", "chat/completions", "responses")}
_ENDPOINTS = {*_OPEN, "/metrics", "/status", "/kept", "/tokenize", "/openapi.json", *_V1}


@dataclass(frozen=True)
class Access:
    """Who may ask. key: to be given as a bearer token. local: whether the server listens to its own machine only.

    origins: of pages in browsers that may ask, `*` for all.
    """

    key: str | None = None
    local: bool = True
    origins: tuple[str, ...] = ()

    def check(self, scope: Scope) -> None:
        """Raises ApiError for a request that may not be asked."""
        headers = Headers(scope=scope)
        if self.key is not None and scope["path"] not in _OPEN and scope["method"] != "OPTIONS":
            self._check_key(headers)
        if self.local and self.key is None and not _is_local(headers.get("host", "")):
            host = headers.get("host", "")[:100]
            message = f"host {host!r}: this server is asked as localhost, or with an API key"
            raise ApiError(403, message, code="wrong_host")
        origin = headers.get("origin")
        if origin is not None and not self._allowed(origin, headers.get("host", "")):
            raise ApiError(403, f"origin {origin[:100]!r}: pages from there may not ask (--cors)", code="wrong_origin")

    def _check_key(self, headers: Headers) -> None:
        scheme, _, given = headers.get("authorization", "").partition(" ")
        right = hmac.compare_digest(given.strip().encode("latin-1"), (self.key or "").encode())
        if scheme.lower() != "bearer" or not right:
            raise ApiError(401, "a wrong API key, or none: send Authorization: Bearer KEY", code="invalid_api_key")

    def _allowed(self, origin: str, host: str) -> bool:
        return "*" in self.origins or origin in self.origins or origin.partition("://")[2] == host


def _is_local(host: str) -> bool:
    """Whether the name that a browser asked for can only be this machine: a name would let other sites pose as it."""
    name = host.rsplit(":", 1)[0] if not host.endswith("]") else host
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        ipaddress.ip_address(name.strip("[]"))
    except ValueError:
        return False
    return True


class Gate:
    """The application behind what every request passes."""

    def __init__(self, app: ASGIApp, context: Context, access: Access) -> None:
        self._app, self._context, self._access, self._open = app, context, access, 0

    def close(self) -> None:
        """Takes no more requests."""
        self._context.closing = True

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began, status = time.perf_counter(), 500

        async def sending(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        self._open += 1
        try:
            await self._let(scope, receive, sending)
        finally:
            self._open -= 1
            self._count(scope["path"], status, time.perf_counter() - began)

    async def _let(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            if scope["path"] not in _OPEN and self._context.closing:
                raise ApiError(503, "the server is ending", code="shutting_down")
            if self._open > self._context.limits.connections:
                raise ApiError(503, f"{self._open:,} requests are being answered; try again", code="overloaded")
            self._access.check(scope)
        except ApiError as error:
            await error.response()(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    def _count(self, path: str, status: int, seconds: float) -> None:
        endpoint = path if path in _ENDPOINTS else "other"
        self._context.metrics.requests.labels(endpoint, str(status)).inc()
        self._context.metrics.seconds.labels(endpoint).observe(seconds)
