"""What all endpoints share: the models, the limits and the measurements of one server."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import TypeVar

from starlette.requests import Request

from longwave.serving.bodies import Body
from longwave.serving.errors import ApiError
from longwave.serving.http import read_body
from longwave.serving.job import Job, Wish
from longwave.serving.limits import Limits
from longwave.serving.metrics import Metrics
from longwave.serving.served import Served

B = TypeVar("B", bound=Body)


@dataclass
class Context:
    """A server's models by name, its limits and measurements. closing: whether it takes no more requests."""

    models: Mapping[str, Served]
    limits: Limits
    metrics: Metrics
    closing: bool = False

    @classmethod
    def of(cls, request: Request) -> Context:
        """The context of the server that a request came to."""
        return request.app.state.context

    def model(self, name: str) -> Served:
        """A model by its name. Raises ApiError for a name that is none."""
        if (found := self.models.get(name)) is not None:
            return found
        close = get_close_matches(name, list(self.models), n=1, cutoff=0.5) or sorted(self.models)[:3]
        message = f"no model {name[:100]!r} is served here; there is {', '.join(close)}"
        raise ApiError(404, message, param="model", code="model_not_found")

    async def read(self, request: Request, kind: type[B]) -> B:
        """The body of a request."""
        return await read_body(request, kind, self.limits)


async def begun(served: Served, prompts: list[list[int]], wish: Wish, arrived: float) -> Job:
    """A job whose requests the engine has taken."""
    job = Job(served, prompts, wish, arrived)
    await job.begin()
    return job


def now() -> float:
    """The time by which a request's waits are measured."""
    return time.perf_counter()
