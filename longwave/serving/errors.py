"""Errors as OpenAI's clients read them: a status, and an object with message, type, param and code."""

from __future__ import annotations

import re
from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails
from starlette.responses import JSONResponse

from longwave.engine import QueueFull
from longwave.errors import MachineError, UserError, cut, one_line, shown

_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
RETRY_AFTER = 1  # seconds
_MEMBER = re.compile(r"(str|int|float|bool|none)$|[A-Z]|.*[\[-]")  # how pydantic names the members of a union


class ApiError(Exception):
    """A request that is not answered, and why.

    status: of HTTP. param: the field at fault. code: a word for programs.
    """

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, one_line(message), param, code

    @property
    def content(self) -> dict[str, Any]:
        """The error as it is sent."""
        kind = _TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        """The whole reply; a client that may try again is told when."""
        headers = {"retry-after": str(RETRY_AFTER)} if self.status in (429, 503) else {}
        if self.status == 401:
            headers["www-authenticate"] = "Bearer"
        return JSONResponse(self.content, self.status, headers)


def api_error(error: Exception) -> ApiError:
    """What a client is told of an error of any kind."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, QueueFull):
        return ApiError(429, f"too many requests wait: {error}", code="queue_full")
    if isinstance(error, UserError):
        code = "context_length_exceeded" if "context_window" in str(error) else "invalid_value"
        return ApiError(400, str(error), code=code)
    if isinstance(error, MachineError):
        return ApiError(500, str(error), code="internal_error")
    return ApiError(500, "the server failed on this request; its log says why", code="internal_error")


def invalid(error: ValidationError, body: type[BaseModel]) -> ApiError:
    """What a client is told of a body that does not fit; of several faults, the first."""
    problems = error.errors(include_url=False)
    problem = min(problems, key=_rank)
    param = _place(problem["loc"])
    if problem["type"] == "json_invalid":
        return ApiError(400, f"the body is not JSON: {problem['msg'].removeprefix('Invalid JSON: ')}", code="bad_json")
    if problem["type"] == "extra_forbidden":
        return ApiError(400, _unknown(param, body.model_fields), param=param, code="unknown_parameter")
    if problem["type"] == "missing":
        return ApiError(400, f"{param} is missing", param=param, code="missing_required_parameter")
    return ApiError(400, f"{param or 'the body'} {_fault(problem)}", param=param or None, code="invalid_value")


def _rank(problem: ErrorDetails) -> tuple[bool, bool, int, int]:
    """Which of several faults is told: an unknown field first, then what fits a member of a union best.

    That is the member of which the type is right, or else the one that fails at the deepest and last place.
    """
    kind, place = problem["type"], problem["loc"]
    last = max((step for step in place if isinstance(step, int)), default=0)
    return kind != "extra_forbidden", kind.endswith("_type"), -len(place), -last


def _place(steps: tuple[int | str, ...]) -> str:
    """The place of a fault as in Python: `messages[0].content`, without the names of a union's members."""
    place = ""
    for step in steps:
        if isinstance(step, int):
            place += f"[{step}]"
        elif not _MEMBER.match(step):
            place += f".{cut(step, 60)}" if place else cut(step, 60)
    return place


def _fault(problem: ErrorDetails) -> str:
    cause = problem.get("ctx", {}).get("error")
    message = str(cause) if isinstance(cause, ValueError) else problem["msg"][:1].lower() + problem["msg"][1:]
    return f"= {shown(problem['input'])}: {message}"


def _unknown(param: str, known: Mapping[str, object]) -> str:
    close = get_close_matches(param, list(known), n=1)
    return f"{shown(param)} is no parameter of this endpoint" + (f"; did you mean {close[0]}?" if close else "")
