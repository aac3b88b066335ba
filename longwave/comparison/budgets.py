"""Budgets: how much every model of a comparison is trained, in tokens, in FLOPs or in minutes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from longwave import trial
from longwave.errors import require
from longwave.units import counted, parse_amount, short

Unit = Literal["tokens", "flops", "minutes"]
_NAMES: dict[Unit, str] = {"tokens": "tokens", "flops": "FLOPs", "minutes": "minutes of training"}


@dataclass(frozen=True, order=True)
class Budget:
    """An amount of one unit. FLOPs are those of training, counted at the tokens that every level really keeps."""

    unit: Unit
    amount: float

    @property
    def name(self) -> str:
        """The budget as the name of a folder, such as `2.5M-tokens`."""
        return f"{short(self.amount)} {self.unit}".replace(" ", "-")

    def words(self) -> str:
        """The budget for people, such as `2.5 M tokens`."""
        return counted(1, "minute") if self == Budget("minutes", 1) else f"{short(self.amount)} {_NAMES[self.unit]}"

    def training(self, step_tokens: int, step_seconds: float | None) -> dict[str, Any]:
        """The values of `[training]` that end a run at the budget.

        step_tokens: of one optimizer step. step_seconds: how long it takes here, which only minutes ask for.
        """
        if trial.is_on():
            return {"steps": 2}
        if self.unit == "flops":
            return {"flops": self.amount}
        if self.unit == "tokens":
            return {"steps": max(1, round(self.amount / step_tokens))}
        assert step_seconds is not None
        return {"steps": max(1, round(60 * self.amount / step_seconds))}


def budgets(tokens: str | None, flops: str | None, minutes: str | None) -> tuple[Budget, ...]:
    """The budgets of the one unit that is given, smallest first: `1M`, or several, `1M,2.5M,5M`."""
    given: dict[Unit, str | None] = {"tokens": tokens, "flops": flops, "minutes": minutes}
    named: list[tuple[Unit, str]] = [(unit, text) for unit, text in given.items() if text is not None]
    require(len(named) == 1, "budget: give one of --tokens, --flops and --minutes")
    [(unit, text)] = named
    return tuple(sorted({Budget(unit, parse_amount(part)) for part in text.split(",")}))


def equal_words(unit: Unit) -> str:
    """In which respect models of one budget are equal."""
    return {"tokens": "at equal tokens", "flops": "at equal FLOPs", "minutes": "in equal time"}[unit]
