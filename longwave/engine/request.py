"""Requests to the engine, and what it answers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool

from longwave.engine.sampling import Sampling
from longwave.errors import UserError, require, shown

MOST_LIKELIEST = 20  # alternatives per token whose log-probabilities can be asked for

Ended = Literal["end_token", "stop", "max_new_tokens", "context_window", "cancelled", "timeout", "failed"]
"""Why a sequence ended: the model chose an end token; a stop string or a grammar's end came; a limit was reached; the
caller or the clock ended it; or its logits were not finite."""


class QueueFull(UserError):
    """As many requests wait as may; later ones are welcome again."""


@runtime_checkable
class Constraint(Protocol):
    """The tokens that a grammar allows next; an object serves one request."""

    @property
    def finished(self) -> bool:
        """Whether nothing may follow."""
        ...

    def allowed(self) -> Bool[np.ndarray, " V"] | None:
        """Whether each token may come next; None allows all."""
        ...

    def accept(self, token: int) -> None:
        """Told of every token that was chosen."""
        ...


@dataclass(frozen=True, kw_only=True)
class Request:
    """A prompt to continue.

    prompt: token ids. stop_tokens: they end the sequence, and are told. min_new_tokens: as long as there are fewer,
    no stop token is chosen. logprobs: how many of the likeliest tokens are told beside the chosen one with their
    log-probabilities; None tells none. timeout: seconds from `submit`. sequence: keys the draws, together with
    `sampling.seed` and a token's place.
    """

    prompt: tuple[int, ...]
    max_new_tokens: int
    sampling: Sampling = field(default_factory=Sampling)
    stop_tokens: frozenset[int] = frozenset()
    min_new_tokens: int = 0
    logprobs: int | None = None
    constraint: Constraint | None = None
    timeout: float | None = None
    sequence: int = 0

    def __post_init__(self) -> None:
        _require_count("max_new_tokens", self.max_new_tokens, 1)
        _require_count("min_new_tokens", self.min_new_tokens, 0)
        require(
            self.min_new_tokens <= self.max_new_tokens,
            f"min_new_tokens = {self.min_new_tokens}: at most max_new_tokens = {self.max_new_tokens}",
        )
        most = f"0 to {MOST_LIKELIEST}, or left out"
        require(
            self.logprobs is None or 0 <= self.logprobs <= MOST_LIKELIEST, f"logprobs = {shown(self.logprobs)}: {most}"
        )
        require(self.timeout is None or 0 < self.timeout < math.inf, f"timeout = {self.timeout}: seconds, more than 0")

    def check(self, vocabulary: int, window: int, name: str = "prompt") -> None:
        """UserError for a prompt that is longer than a window, and for tokens that a vocabulary does not have."""
        count = len(self.prompt)
        require(count > 0, f"{name} is empty; give at least one token")
        require(count <= window, f"{name} has {count} tokens; the model's context_window is {window}")
        known = min(self.prompt) >= 0 and max(self.prompt) < vocabulary
        require(known, f"{name} has a token outside the model's vocabulary of {vocabulary}")
        for token in self.sampling.logit_bias:
            require(0 <= token < vocabulary, f"logit_bias names token {token}; the vocabulary has {vocabulary}")

    def room(self, window: int) -> tuple[int, Ended]:
        """How many tokens may be added, and the limit that allows no more."""
        room = window + 1 - len(self.prompt)
        return (room, "context_window") if room < self.max_new_tokens else (self.max_new_tokens, "max_new_tokens")


class Event(NamedTuple):
    """A new token of a request, its end, or both.

    request: the number that `submit` returned. token: None where only an end is told. logprob: natural, of the token
    among all that the penalties, the bias and the grammar leave, at temperature 1. likeliest: tokens and their
    log-probabilities. error: of `failed`. cached: tokens of the prompt that did not run, as their state was there.
    """

    request: int
    token: int | None
    ended: Ended | None = None
    logprob: float | None = None
    likeliest: tuple[tuple[int, float], ...] = ()
    error: str | None = None
    cached: int = 0


def ids_of(prompt: Any, name: str) -> tuple[int, ...]:
    """The ids of a prompt, which may be any row of integers; UserError for what is none."""
    ids = prompt.tolist() if hasattr(prompt, "tolist") else prompt
    row = isinstance(ids, Sequence) and all(type(token) is int for token in ids)
    require(row, f"{name} = {shown(ids)}: give the token ids of each prompt, such as [[1, 2], [3]]")
    return tuple(ids)


def _require_count(name: str, value: Any, least: int) -> None:
    whole = isinstance(value, int) and not isinstance(value, bool) and value >= least
    require(whole, f"{name} = {shown(value)}: a whole number, {least} or more")
