"""The description of the endpoints in OpenAPI's form, made from the bodies that they take."""

from __future__ import annotations

from collections.abc import Sequence
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
_TEXT, _ANY = {"type": "string"}, {"type": ["string", "null"]}
_OF_ERROR = {"message": _TEXT, "type": _TEXT, "param": _ANY, "code": _ANY}
_ERROR = {
    "type": "object",
    "properties": {"error": {"type": "object", "properties": _OF_ERROR, "required": [*_OF_ERROR]}},
    "required": ["error"],
}
_ERRORS = ("400", "401", "403", "404", "408", "413", "415", "429", "500", "503", "504")


def openapi(models: Sequence[str]) -> dict[str, Any]:
    """The description, version 3.1, for a server of models with these names."""
    posts = {path: {"post": _operation(path, kind)} for path, kind in _BODIES.items()}
    gets = {path: {"get": {"operationId": _name(path), "responses": _replies()}} for path in _PLAIN}
    name = {"name": "model", "in": "path", "required": True, "schema": {"type": "string", "enum": [*models]}}
    one = {"operationId": "v1_model", "parameters": [name], "responses": _replies()}
    info = {"title": "longwave", "version": __version__}
    paths = posts | gets | {"/v1/models/{model}": {"get": one}}
    return {"openapi": "3.1.0", "info": info, "paths": paths, "components": {"schemas": _schemas(models)}}


def _schemas(models: Sequence[str]) -> dict[str, Any]:
    """The schemas of all bodies, in which `model` is one of those that are served, and that of an error."""
    kinds: list[tuple[type[BaseModel], Literal["validation"]]] = [(kind, "validation") for kind in _BODIES.values()]
    _, made = models_json_schema(kinds, ref_template="#/components/schemas/{model}")
    for kind in _BODIES.values():
        made["$defs"][kind.__name__]["properties"]["model"] = {"type": "string", "enum": [*models]}
    return {**_closed(made["$defs"]), "Error": _ERROR}


def _closed(schema: Any) -> Any:
    """A schema in which objects that have patterns for their keys take no others, as those who validate it do."""
    if isinstance(schema, list):
        return [_closed(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    more = {"additionalProperties": False} if "patternProperties" in schema else {}
    return {key: _closed(value) for key, value in schema.items()} | more


def _operation(path: str, kind: type[Body]) -> dict[str, Any]:
    body = {"required": True, "content": _json(kind.__name__)}
    return {"operationId": _name(path), "requestBody": body, "responses": _replies()}


def _json(name: str) -> dict[str, Any]:
    return {"application/json": {"schema": {"$ref": f"#/components/schemas/{name}"}}}


def _name(path: str) -> str:
    return path.strip("/").replace("/", "_")


def _replies() -> dict[str, Any]:
    error = {"description": "an error object", "content": _json("Error")}
    return {"200": {"description": "the answer"}} | dict.fromkeys(_ERRORS, error)
