"""What is asked of a server, and when: an open loop of Poisson arrivals, the same for every server of a comparison.

Open loop: a request comes at its time, whether or not earlier ones were answered. A closed loop, in which each client
waits for its answer, would ask a slow server less.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from longwave.config import Strict
from longwave.errors import require

_WORDS = (
    *("time", "year", "people", "way", "day", "man", "thing", "woman", "life", "child", "world", "school", "state"),
    *("family", "student", "group", "country", "problem", "hand", "part", "place", "case", "week", "company"),
    *("system", "program", "question", "work", "government", "number", "night", "point", "home", "water", "room"),
)


@dataclass(frozen=True)
class Load(Strict):
    """A load. rate: requests a second, on average. requests: of them in all. prompts, answers: their lengths in tokens,
    of which each request draws one of each. seed: of lengths, words and times.
    """

    rate: float = 2.0
    requests: int = 64
    prompts: tuple[int, ...] = (64, 256)
    answers: tuple[int, ...] = (32, 128)
    seed: int = 0

    def __post_init__(self) -> None:
        require(0 < self.rate <= 10_000, f"rate = {self.rate}: requests a second, more than 0")
        require(0 < self.requests <= 100_000, f"requests = {self.requests}: 1 to 100,000")
        for name in ("prompts", "answers"):
            lengths = getattr(self, name)
            require(bool(lengths) and min(lengths) > 0, f"{name} = {lengths}: lengths in tokens, 1 or more")


@dataclass(frozen=True)
class Arrival:
    """A request. at: seconds from the beginning. prompt_tokens: about how many its prompt is to have."""

    at: float
    prompt_tokens: int
    answer_tokens: int
    key: int


def schedule(load: Load) -> list[Arrival]:
    """The requests of a load, in order: times between them are drawn from an exponential distribution."""
    draw, at, found = random.Random(load.seed), 0.0, list[Arrival]()
    for _ in range(load.requests):
        found.append(Arrival(at, draw.choice(load.prompts), draw.choice(load.answers), draw.getrandbits(32)))
        at += draw.expovariate(load.rate)
    return found


def words(count: int, key: int) -> str:
    """A text of so many words, in an order of its own, so that no server can reuse what it knows of another."""
    draw = random.Random(key)
    return " ".join(draw.choice(_WORDS) for _ in range(count))
