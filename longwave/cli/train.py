"""`longwave train`: a recipe in, a run with its model out."""

from __future__ import annotations

from dataclasses import asdict, dataclass
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
    from longwave.progress import TrainingProgress, say, shown_loss
    from longwave.training.loop import Trainer
    from longwave.training.recipe import read_recipe

    output = Path(options.output or Path("runs") / Path(options.recipe).stem)
    trainer = Trainer(read_recipe(options.recipe, options.overrides), output)
    if trainer.step:
        say(f"{output}: resuming after step {trainer.step}")
    for line in [*trainer.model.describe(), *trainer.notes()]:
        say(line)
    trainer.watch(TrainingProgress(output.name, trainer.recipe.training.steps, trainer.step))
    trainer.run()
    found = trainer.result()
    print(f"{found.model}: held-out loss {shown_loss(found.held_out_loss, 4)} after {found.tokens:,} tokens")
    print(f"time: {found.seconds.words()}")
    if found.skipped:
        print(f"{found.skipped} of {found.step} updates were skipped, since their gradients were not finite")
    return {**asdict(found), "model": str(found.model)}


VERB = Verb("train", "train a model from a recipe; the same command resumes", Train, run)
