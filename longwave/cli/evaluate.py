"""`longwave eval`: the loss of a model on held-out text."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

from longwave.cli.options import OfModel, OnDevice, argument, option
from longwave.cli.parser import Verb

if TYPE_CHECKING:
    from longwave.evaluation.held_out import Evaluation


@dataclass(frozen=True, kw_only=True)
class Evaluate(OnDevice, OfModel):
    """Options of `longwave eval`."""

    model: str = argument("a model folder, or a hub id")
    data: str = argument("prepared data, written with the model's own tokenizer")
    window: int | None = option("tokens of a window (the model's context window)")


def run(options: Evaluate) -> Evaluation:
    """Evaluates, and prints one figure a line."""
    from longwave.verbs import evaluate

    result = evaluate(**options.keywords())
    for field in fields(result):
        print(f"{field.name:<16} {_words(getattr(result, field.name))}")
    return result


def _words(value: str | float | tuple[float, ...]) -> str:
    """A figure as people read it: as many digits as say something."""
    if isinstance(value, tuple):
        return ", ".join(f"{share:.1%}" for share in value) or "all"
    return f"{value:.5g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else value


VERB = Verb("eval", "loss of a model on held-out text, in the mode in which it runs", Evaluate, run)
