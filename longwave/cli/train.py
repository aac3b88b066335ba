"""`longwave train`: a recipe in, a run with its model out."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longwave.cli.options import Options, argument, option
from longwave.cli.parser import Verb


@dataclass(frozen=True, kw_only=True)
class Train(Options):
    """Options of `longwave train`."""

    recipe: str = argument("a TOML file")
    overrides: tuple[str, ...] = argument("such as model.hidden_size=512", default=(), metavar="key=value")
    output: str | None = option("folder of the run (runs/NAME OF THE RECIPE)")


def run(options: Train) -> dict[str, Any]:
    """Trains, or goes on with the run in the folder, and prints its last held-out loss."""
    from longwave.progress import TrainingProgress, say
    from longwave.training.loop import Trainer
    from longwave.training.metrics import read_metrics
    from longwave.training.recipe import read_recipe

    output = Path(options.output or Path("runs") / Path(options.recipe).stem)
    trainer = Trainer(read_recipe(options.recipe, options.overrides), output)
    if trainer.step:
        say(f"{output}: resuming after step {trainer.step}")
    for line in [*trainer.model.describe(), *trainer.data.notes()]:
        say(line)
    trainer.watch(TrainingProgress(output.name, trainer.recipe.training.steps, trainer.step))
    trainer.run()
    last = read_metrics(output / "metrics.jsonl")[-1]
    print(f"{output / 'model'}: held-out loss {last['held_out_loss']:.4f} after {last['tokens']:,} tokens")
    return {"model": str(output / "model"), **last}


VERB = Verb("train", "train a model from a recipe; the same command resumes", Train, run)
