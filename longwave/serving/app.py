"""The application: which endpoint answers which request, and errors in OpenAI's form."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from longwave.errors import MachineError, UserError
from longwave.serving import about
from longwave.serving.chat import chat_completions
from longwave.serving.completions import completions
from longwave.serving.context import Context
from longwave.serving.errors import ApiError, api_error
from longwave.serving.gate import Access, Gate
from longwave.serving.limits import Limits
from longwave.serving.metrics import Metrics
from longwave.serving.page import headers, page
from longwave.serving.responses import responses
from longwave.serving.schema import openapi
from longwave.serving.served import Served

ROUTES = (
    ("/v1/chat/completions", chat_completions, "POST"),
    ("/v1/completions", completions, "POST"),
    ("/v1/responses", responses, "POST"),
    ("/v1/models", about.models, "GET"),
    ("/v1/models/{name:path}", about.model, "GET"),
    ("/tokenize", about.tokenize, "POST"),
    ("/kept", about.kept, "POST"),
    ("/health", about.health, "GET"),
    ("/metrics", about.metrics, "GET"),
    ("/status", about.status, "GET"),
)


def application(models: Mapping[str, Served], metrics: Metrics, limits: Limits, access: Access) -> Gate:
    """The ASGI application that serves models by their names; their engines run as long as it does."""
    context = Context(models, limits, metrics)
    pages = {"/": HTMLResponse(page(), headers=headers()), "/openapi.json": JSONResponse(openapi([*models]))}
    routes = [Route(path, endpoint, methods=[method]) for path, endpoint, method in ROUTES]
    routes += [Route(path, _always(response), methods=["GET"]) for path, response in pages.items()]
    kinds = (ApiError, UserError, MachineError)
    others = {HTTPException: _no_endpoint, ClientDisconnect: _gone, Exception: _failed}
    handlers = {**dict.fromkeys(kinds, _failed), **others}
    app = Starlette(routes=routes, exception_handlers=handlers, lifespan=_running, middleware=_cors(access))
    app.state.context = context
    app.router.redirect_slashes = False
    return Gate(app, context, access)


@asynccontextmanager
async def _running(app: Starlette) -> AsyncIterator[None]:
    models: Mapping[str, Served] = app.state.context.models
    for served in models.values():
        served.runner.start()
    try:
        yield
    finally:
        for served in models.values():
            served.runner.close()


def _cors(access: Access) -> list[Middleware]:
    """Leave for pages of other origins, where that was asked for."""
    if not access.origins:
        return []
    headers = ["authorization", "content-type"]
    return [Middleware(CORSMiddleware, access.origins, allow_methods=["GET", "POST"], allow_headers=headers)]


def _always(response: Response):
    async def answer(request: Request) -> Response:
        return response

    return answer


async def _failed(request: Request, error: Exception) -> Response:
    return api_error(error).response()


async def _no_endpoint(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    path = request.url.path[:100]
    if error.status_code == 405:
        made = ApiError(405, f"{path} is not asked by {request.method[:20]}", code="method_not_allowed").response()
        made.headers.update(dict(error.headers or {}))
        return made
    if error.status_code == 404:
        known = ", ".join(path for path, _, _ in ROUTES)
        return ApiError(404, f"no endpoint {path}; there are {known}", code="unknown_url").response()
    return ApiError(error.status_code, error.detail).response()


async def _gone(request: Request, error: Exception) -> Response:
    """Nobody reads this; 499 is what is counted."""
    return Response(status_code=499)
