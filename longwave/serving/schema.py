"""The description of the endpoints in OpenAPI's form, made from the bodies that they take."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from longwave.serving.bodies import Body, ChatBody, CompletionBody, KeptBody, ResponseBody, TokenizeBody
from longwave.version import __version__

_BODIES: dict[str, type[Body]] = {
    "/v1/chat/completions": ChatBody,
    "/v1/completions": CompletionBody,
    "/v1/responses": ResponseBody,
    "/tokenize": TokenizeBody,
    "/kept": KeptBody,
}
_PLAIN = ("/v1/models", "/health", "/metrics", "/status")
_ERRORS = ("400", "401", "403", "404", "408", "413", "415", "429", "500", "503", "504")


def openapi() -> dict[str, Any]:
    """The description, version 3.1."""
    kinds: list[tuple[type[BaseModel], Literal["validation"]]] = [(kind, "validation") for kind in _BODIES.values()]
    _, definitions = models_json_schema(kinds, ref_template="#/components/schemas/{model}")
    posts = {path: {"post": _operation(path, kind)} for path, kind in _BODIES.items()}
    gets = {path: {"get": {"operationId": _name(path), "responses": _replies()}} for path in _PLAIN}
    info = {"title": "longwave", "version": __version__}
    return {"openapi": "3.1.0", "info": info, "paths": posts | gets, "components": {"schemas": definitions["$defs"]}}


def _operation(path: str, kind: type[Body]) -> dict[str, Any]:
    schema = {"$ref": f"#/components/schemas/{kind.__name__}"}
    body = {"required": True, "content": {"application/json": {"schema": schema}}}
    return {"operationId": _name(path), "requestBody": body, "responses": _replies()}


def _name(path: str) -> str:
    return path.strip("/").replace("/", "_")


def _replies() -> dict[str, Any]:
    return {"200": {"description": "the answer"}} | {one: {"description": "an error object"} for one in _ERRORS}
