"""`longwave bench inference` and `longwave bench training`: a model beside another."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

from longwave.cli.bench.measuring import Measuring, chosen, measured
from longwave.cli.options import argument, option
from longwave.cli.parser import Verb


@dataclass(frozen=True, kw_only=True)
class Training(Measuring):
    """Options of `longwave bench training`."""

    model: str = argument("a recipe (random weights) or a model folder")
    against: str = option("transformers, dense (its shape without levels), a recipe, a folder or none", default="auto")


@dataclass(frozen=True, kw_only=True)
class Inference(Training):
    """Options of `longwave bench inference`."""

    retention: Literal["forced", "real"] = option("forced: thresholds at nominal", default="real")
    decode_steps: int = option("tokens of one round of decoding", default=32)


def run(options: Training) -> dict[str, Any]:
    """Times prefill and decoding, or training steps; `--against none` times one model alone."""
    from longwave.benchmarks import models
    from longwave.config import build

    kind = "inference" if isinstance(options, Inference) else "training"
    other = None if options.against == "none" else options.against
    if options.contexts is None:
        fitting = models.default_contexts(options.model, getattr(options, "decode_steps", 0))
        options = replace(options, contexts=",".join(map(str, fitting)))
    config = build(models.BenchOptions, chosen(options, models.BenchOptions), "bench")
    return measured(options, config, lambda: models.run(kind, options.model, other, config, bool(options.profile)))


INFERENCE = Verb("inference", "time prefill and decoding of a model against another", Inference, run)
TRAINING = Verb("training", "time training steps of a model against another", Training, run)
