"""Engines over tiny models in fp64, in which no rounding can turn an argmax, and the requests that they are given."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import runs
import torch

from longwave.config import build
from longwave.engine import Engine, EngineOptions, Event, Request, Sampling
from longwave.model import Decoder
from longwave.training.recipe import Recipe

WARM = Sampling(temperature=1.0, seed=5)


@cache
def tiny(kind: str) -> Decoder:
    """A random model in fp64, in which no rounding can turn an argmax, with weights large enough to have opinions."""
    model = Decoder(build(Recipe, runs.values(kind), "tests").model, seed=3).double().eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.mul_(4)
    return model


def prompt_of(length: int, seed: int = 0) -> tuple[int, ...]:
    return tuple(torch.randint(2, runs.VOCABULARY, (length,), generator=torch.Generator().manual_seed(seed)).tolist())


def request_of(length: int = 9, seed: int = 0, **options) -> Request:
    return Request(**{"prompt": prompt_of(length, seed), "max_new_tokens": 12, **options})


def finish(engine: Engine) -> dict[int, list[Event]]:
    """All events by request, once nothing is left to do."""
    found: dict[int, list[Event]] = {}
    while not engine.idle:
        for event in engine.step():
            found.setdefault(event.request, []).append(event)
    return found


def tokens(events: Sequence[Event]) -> list[int]:
    return [event.token for event in events if event.token is not None]


def alone(kind: str, request: Request) -> list[Event]:
    """What a request gets with nobody beside it."""
    engine = Engine(tiny(kind), EngineOptions(running=1))
    number = engine.submit(request)
    return [event._replace(request=0) for event in finish(engine)[number]]
