"""`longwave bench engine`: many requests at once, and prefixes that are there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from longwave import trial
from longwave.cli.options import OfModel, OnDevice, argument, option
from longwave.cli.parser import Verb
from longwave.cli.tables import print_table


@dataclass(frozen=True, kw_only=True)
class Engines(OnDevice, OfModel):
    """Options of `longwave bench engine`."""

    model: str = argument("a recipe (random weights) or a model folder")
    prompt: int = option("tokens of each request", default=128)
    answer: int = option("tokens of each answer", default=128)
    running: int = option("requests together", default=16)
    prefix: int = option("tokens of a beginning that prompts share", default=8192)
    suffix: int = option("tokens of a prompt behind it", default=128)
    repeats: int = option("interleaved rounds, of which medians are taken", default=3)
    dtype: Literal["fp32", "bf16"] = option("of the weights", default="bf16")
    seed: int = option("of random weights", default=0)


def run(options: Engines) -> dict[str, Any]:
    """Times the engine; returns the rows of the table."""
    from longwave.benchmarks.engine import EngineBench, run_engine
    from longwave.config import build

    names = ("prompt", "answer", "running", "suffix", "repeats", "dtype", "device", "seed")
    values = {name: getattr(options, name) for name in names} | {"prefix": trial.contexts([options.prefix])[0]}
    values |= {"repeats": trial.at_most(options.repeats, 2), "answer": trial.at_most(options.answer, 4)}
    rows = run_engine(options.model, build(EngineBench, values, "bench engine"))
    columns = ("", "tokens", "seconds", "tokens/s", "against", "times as fast")
    cells = [
        (row.name, f"{row.tokens:,}", f"{row.timing.median:.3f}", f"{row.speed:.1f}", row.against, f"{row.ratio:.2f}")
        for row in rows
    ]
    print_table(columns, cells, {"", "against"})
    return {"rows": rows}


VERB = Verb("engine", "time many requests at once, and prefixes that are there", Engines, run)
