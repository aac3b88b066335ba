"""What the server tells of itself and of texts: models, tokens, health, measurements, and what levels keep."""

from __future__ import annotations

import asyncio
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from longwave.inspection.trace import by_token, trace_levels
from longwave.serving.bodies import KeptBody, TokenizeBody
from longwave.serving.chat import messages_of
from longwave.serving.context import Context
from longwave.serving.errors import ApiError
from longwave.serving.logprobs import token_text
from longwave.serving.served import Served


async def models(request: Request) -> Response:
    """`/v1/models`."""
    return JSONResponse({"object": "list", "data": [_model(one) for one in Context.of(request).models.values()]})


async def model(request: Request) -> Response:
    """`/v1/models/NAME`."""
    return JSONResponse(_model(Context.of(request).model(request.path_params["name"])))


def _model(served: Served) -> dict[str, Any]:
    return {
        "id": served.name,
        "object": "model",
        "created": served.created,
        "owned_by": "longwave",
        "max_model_len": served.window,
        "layout": served.model.config.layout,
        "chat": served.chat is not None,
        "levels": len(list(served.model.resamplers)),
    }


async def tokenize(request: Request) -> Response:
    """`/tokenize`: the ids of a text or a conversation."""
    context = Context.of(request)
    body = await context.read(request, TokenizeBody)
    served = context.model(body.model)
    if (body.prompt is None) == (body.messages is None):
        raise ApiError(400, "give prompt or messages, one of them", param="prompt")
    ids = await asyncio.to_thread(_ids, served, body)
    found = {"tokens": ids, "count": len(ids), "max_model_len": served.window}
    named = {"token_strs": [token_text(served.tokenizer, one) for one in ids]} if body.return_token_strs else {}
    return JSONResponse({**found, **named})


def _ids(served: Served, body: TokenizeBody) -> list[int]:
    if body.messages is not None:
        return served.chat_prompt(messages_of(body.messages), {})
    ids = served.text_prompt(body.prompt or "")
    return ids if body.add_special_tokens else ids[len(served.tokenizer.opening) :]


async def health(request: Request) -> Response:
    """`/health`: 200 while every engine runs, 503 once one has failed or the server is ending."""
    context = Context.of(request)
    failed = {name: one.runner.failure for name, one in context.models.items() if one.runner.failure is not None}
    if failed:
        return JSONResponse({"status": "failed", "failures": failed}, 503)
    return JSONResponse({"status": "ending" if context.closing else "ok"}, 503 if context.closing else 200)


async def metrics(request: Request) -> Response:
    """`/metrics`: for Prometheus."""
    return Response(Context.of(request).metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


async def status(request: Request) -> Response:
    """`/status`: the last seconds of every model, for the page."""
    found = {
        name: {**one.metrics.figures, "tokens_per_second": round(one.metrics.tokens_per_second, 2)}
        for name, one in Context.of(request).models.items()
    }
    return JSONResponse({"models": found})


async def kept(request: Request) -> Response:
    """`/kept`: for each token of a text, its own text and the levels that keep it."""
    context = Context.of(request)
    body = await context.read(request, KeptBody)
    served = context.model(body.model)
    if len(body.tokens) > served.window or not all(0 <= one < served.vocabulary for one in body.tokens):
        raise ApiError(400, f"tokens: ids below {served.vocabulary:,}, {served.window:,} at most", param="tokens")
    levels = len(list(served.model.resamplers))
    if not levels:
        raise ApiError(400, f"{served.name} has no levels: every layer sees every token", param="model")
    traced = await served.runner.call(lambda: by_token(trace_levels(served.model, body.tokens), len(body.tokens)))
    texts = [token_text(served.tokenizer, one) for one in body.tokens]
    tokens = [{"text": text, "kept": one.kept} for text, one in zip(texts, traced, strict=True)]
    return JSONResponse({"tokens": tokens, "levels": levels})
