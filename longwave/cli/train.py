"""`longwave train`: a recipe in, a run with its model out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from longwave.cli.options import Options, argument, option
from longwave.cli.parser import Verb
from longwave.units import counted

if TYPE_CHECKING:
    from longwave.training.loop import TrainingResult


@dataclass(frozen=True, kw_only=True)
class Train(Options):
    """Options of `longwave train`."""

    recipe: str = argument("a TOML file, or the name of a recipe (`longwave recipes` lists them)")
    overrides: tuple[str, ...] = argument("values to change: training.steps=9", default=(), metavar="key=value")
    output: str | None = option("folder of the run (runs/NAME OF THE RECIPE)")


def run(options: Train) -> TrainingResult:
    """Trains, or goes on with the run in the folder, and prints its last held-out loss."""
    from longwave.progress import shown_loss
    from longwave.verbs import train

    found = train(**options.keywords(), progress=True)
    print(f"{found.model}: held-out loss {shown_loss(found.held_out_loss, 4)} after {counted(found.tokens, 'token')}")
    for folder, loss in found.held_out_by_folder.items():
        print(f"{folder}: held-out loss {shown_loss(loss, 4)}")
    print(f"time: {found.seconds.words()}")
    if found.skipped:
        print(f"skipped: {found.skipped} of {counted(found.step, 'update')}, since gradients were not finite")
    return found


VERB = Verb("train", "train a model from a recipe; the same command resumes", Train, run)
