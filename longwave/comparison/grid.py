"""A grid of values for one key of every recipe, and what its losses say."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from longwave.comparison.results import Result
from longwave.comparison.runs import Setting
from longwave.errors import UserError, require
from longwave.training.recipe import parsed_override


@dataclass(frozen=True)
class Grid:
    """The values that are tried for a key, in ascending order."""

    key: str
    values: tuple[Any, ...]

    @classmethod
    def parse(cls, text: str) -> Grid:
        """A grid such as `optimizer.lr=7.5e-4,1.5e-3,3e-3`. UserError for fewer than two values."""
        key, separator, values = text.partition("=")
        if not separator or not key:
            raise UserError(f"--grid {text}: reads key.path=value,value,value")
        found = tuple(dict.fromkeys(parsed_override(value) for value in values.split(",")))
        require(len(found) > 1, f"--grid {text}: give two values or more")
        return cls(key, tuple(sorted(found)) if all(map(_is_number, found)) else found)

    @property
    def settings(self) -> tuple[Setting, ...]:
        """A setting for each value."""
        return tuple(Setting(self.key, value) for value in self.values)

    def beyond(self, value: Any) -> Setting | None:
        """The setting beyond an edge: as far from it, by ratio, as its neighbour. None where there is no such thing."""
        if (
            not all(_is_number(one) and one > 0 for one in self.values)
            or value not in self.values[:: len(self.values) - 1]
        ):
            return None
        neighbour = self.values[1] if value == self.values[0] else self.values[-2]
        return Setting(self.key, _rounded(value * value / neighbour))


@dataclass(frozen=True)
class Choice:
    """What a grid says of one model.

    losses: the held-out loss of each value that was tried, None where a run diverged. best: the value of the lowest.
    at_edge: whether it lies at the edge of what was tried, so that a better one may lie beyond.
    """

    model: str
    key: str
    values: tuple[Any, ...]
    losses: tuple[float | None, ...]
    best: Any
    at_edge: bool

    def words(self) -> str:
        """A sentence for people."""
        if self.at_edge:
            lowest = f"{self.model}: the lowest loss lies at the edge of the grid, {self.key} = {self.best}"
            return f"{lowest}, so a better value may lie beyond"
        return f"{self.model}: best {self.key} = {self.best} of {', '.join(map(str, self.values))}"


def choose(model: str, key: str, results: Sequence[Result]) -> Choice:
    """The value of the lowest loss among the results of a model. UserError where every run diverged."""
    tried = sorted((one for one in results if one.model == model), key=lambda one: _order(one.setting[key]))
    losses = tuple(one.loss if one.loss is not None and math.isfinite(one.loss) else None for one in tried)
    known = [(loss, number) for number, loss in enumerate(losses) if loss is not None]
    require(bool(known), f"--grid {key}: {model} diverged at every value; give lower ones")
    number = min(known)[1]
    values = tuple(one.setting[key] for one in tried)
    ordered = all(map(_is_number, values))
    return Choice(model, key, values, losses, values[number], ordered and number in (0, len(values) - 1))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _order(value: Any) -> tuple[bool, Any]:
    return (False, value) if _is_number(value) else (True, str(value))


def _rounded(value: float) -> float:
    """A value with as many digits as a person would give."""
    return float(f"{value:.6g}")
