"""Learning-rate schedules: pure functions of the step and the tokens, so that a checkpoint need not save them.

Each is a frozen config with a method `scale(step, tokens, total_steps)`: the factor of the optimizer's base learning
rate at update `step` (from 0), before which the run has trained on `tokens` tokens, in a run of `total_steps` updates.
A run that ends by its FLOPs gives the FLOPs spent as `step`, in units of an expected step's.

The warm-up of Cosine, WSD and Constant is `(step + 1) / (warmup_steps + 1)`: no update is wasted on a rate of 0, and
update `warmup_steps` is the first at the full rate.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Literal, Protocol

from pydantic import ConfigDict, Field

from longwave.errors import require
from longwave.units import counted


class Schedule(Protocol):
    """The interface of a schedule."""

    def scale(self, step: float, tokens: int, total_steps: int) -> float:
        """Give the factor of the base learning rate for update `step`."""
        ...


@dataclass(frozen=True)
class Eden:
    """Eden (Zipformer, arXiv 2310.11230): ((t/T)^2 + 1)^-1/4 ((e/E)^2 + 1)^-1/4, warmed up from `warmup_start`.

    t counts updates and T is `lr_steps`; e counts tokens and E is `lr_tokens`, in place of the paper's epochs (as in
    Povey's language model recipe). `lr_tokens` None turns the second factor off; a TOML file writes inf instead.
    """

    kind: Literal["eden"] = "eden"
    lr_steps: float = 7500.0
    lr_tokens: float | None = 1e9
    warmup_steps: int = 500
    warmup_start: float = 0.5

    __pydantic_config__ = ConfigDict(extra="forbid")

    def __post_init__(self) -> None:
        require(self.lr_steps > 0, f"lr_steps = {self.lr_steps}: a number of steps above 0")
        legal = self.lr_tokens is None or self.lr_tokens > 0
        require(legal, f"lr_tokens = {self.lr_tokens}: a number of tokens above 0, or none")
        _check_warmup(self.warmup_steps)
        require(0 <= self.warmup_start <= 1, f"warmup_start = {self.warmup_start}: a number in [0, 1]")

    def scale(self, step: float, tokens: int, total_steps: int) -> float:
        """Give the factor of the base learning rate; `total_steps` plays no part."""
        by_tokens = 1.0 if self.lr_tokens is None else _inverse_root(tokens / self.lr_tokens)
        warmed = min(1.0, step / self.warmup_steps) if self.warmup_steps else 1.0
        warmup = self.warmup_start + (1 - self.warmup_start) * warmed
        return _inverse_root(step / self.lr_steps) * by_tokens * warmup


@dataclass(frozen=True)
class Cosine:
    """Warm-up, then half a cosine from 1 to `final` over the rest of the run (arXiv 1608.03983; Llama ends at 0.1)."""

    kind: Literal["cosine"] = "cosine"
    warmup_steps: int = 100
    final: float = 0.1

    __pydantic_config__ = ConfigDict(extra="forbid")

    def __post_init__(self) -> None:
        _check_warmup(self.warmup_steps)
        require(0 <= self.final <= 1, f"final = {self.final}: a fraction in [0, 1]")

    def scale(self, step: float, tokens: int, total_steps: int) -> float:
        """Give the factor of the base learning rate; raises UserError if the warm-up does not fit the run."""
        _check_fit(self.warmup_steps, total_steps, total_steps)
        if step < self.warmup_steps:
            return _warmup(step, self.warmup_steps)
        done = min(1.0, (step - self.warmup_steps) / (total_steps - self.warmup_steps))
        return self.final + (1 - self.final) * 0.5 * (1 + math.cos(math.pi * done))


@dataclass(frozen=True)
class WSD:
    """Warm-up, a stable rate, and a decay to `final` over the last `decay_fraction` of the run.

    WSD comes from MiniCPM (arXiv 2404.06395). The `sqrt` shape, 1 - sqrt(x) after the share x of the decay, and its
    length are the best ones of arXiv 2405.18392. MiniCPM's is `exponential`, final ** x, which needs a `final` above 0.
    """

    kind: Literal["wsd"] = "wsd"
    warmup_steps: int = 100
    decay_fraction: float = 0.2
    shape: Literal["linear", "sqrt", "exponential"] = "sqrt"
    final: float = 0.0

    __pydantic_config__ = ConfigDict(extra="forbid")

    def __post_init__(self) -> None:
        _check_warmup(self.warmup_steps)
        require(0 < self.decay_fraction <= 1, f"decay_fraction = {self.decay_fraction}: a fraction in (0, 1]")
        require(0 <= self.final <= 1, f"final = {self.final}: a fraction in [0, 1]")
        grows = self.shape == "exponential" and self.final == 0
        require(not grows, "final = 0.0: an exponential decay never ends there; give a fraction above 0, such as 0.05")

    def scale(self, step: float, tokens: int, total_steps: int) -> float:
        """Give the factor of the base learning rate; raises UserError if warm-up and decay do not fit the run."""
        decay_steps = max(1, round(self.decay_fraction * total_steps))
        stable_until = total_steps - decay_steps
        _check_fit(self.warmup_steps, stable_until + 1, total_steps)
        if step < self.warmup_steps:
            return _warmup(step, self.warmup_steps)
        done = min(1.0, max(0, step - stable_until) / decay_steps)
        if self.shape == "exponential":
            return self.final**done
        return 1 - (1 - self.final) * (math.sqrt(done) if self.shape == "sqrt" else done)


@dataclass(frozen=True)
class Constant:
    """Warm-up, then the base learning rate."""

    kind: Literal["constant"] = "constant"
    warmup_steps: int = 0

    __pydantic_config__ = ConfigDict(extra="forbid")

    def __post_init__(self) -> None:
        _check_warmup(self.warmup_steps)

    def scale(self, step: float, tokens: int, total_steps: int) -> float:
        """Give the factor of the base learning rate; `tokens` and `total_steps` play no part."""
        return _warmup(step, self.warmup_steps)


ScheduleConfig = Annotated[Eden | Cosine | WSD | Constant, Field(discriminator="kind")]


def _inverse_root(ratio: float) -> float:
    return (ratio * ratio + 1) ** -0.25


def _warmup(step: float, warmup_steps: int) -> float:
    return min(1.0, (step + 1) / (warmup_steps + 1))


def _check_warmup(warmup_steps: int) -> None:
    require(warmup_steps >= 0, f"warmup_steps = {warmup_steps}: at least 0 steps")


def _check_fit(warmup_steps: int, limit: int, total_steps: int) -> None:
    would_do = f"give schedule.warmup_steps below {limit}, or more training.steps"
    require(
        warmup_steps < limit,
        f"schedule.warmup_steps = {warmup_steps}: a run of {counted(total_steps, 'step')}; {would_do}",
    )
