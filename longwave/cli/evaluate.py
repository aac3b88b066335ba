"""`longwave eval`: the loss of a model on held-out text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from longwave.cli.options import OnDevice, argument, option
from longwave.cli.parser import Verb


@dataclass(frozen=True, kw_only=True)
class Evaluate(OnDevice):
    """Options of `longwave eval`."""

    model: str = argument("a model folder")
    data: str = argument("prepared data, written with the model's own tokenizer")
    window: int | None = option("tokens of a window (the model's context window)")


def run(options: Evaluate) -> dict[str, Any]:
    """Evaluates, and prints one figure a line."""
    from longwave.evaluation.held_out import evaluate_folder

    result = evaluate_folder(options.model, options.data, options.window, options.device)
    for name, value in result.items():
        print(f"{name:<16} {_words(value)}")
    return result


def _words(value: Any) -> str:
    """A figure as people read it: as many digits as say something."""
    if isinstance(value, list):
        return ", ".join(f"{share:.1%}" for share in value) or "all"
    return f"{value:.5g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else value


VERB = Verb("eval", "loss of a model on held-out text, in the mode in which it runs", Evaluate, run)
