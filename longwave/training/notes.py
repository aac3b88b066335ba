"""Settings of a recipe that do less than they seem to in a run over these data: lines for people, before it starts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product
from typing import NamedTuple

from longwave.training.recipe import Recipe
from longwave.units import counted

_SCHEDULES = {  # of levels, by what is the case before their last step
    "bypass_steps": "with the bypass still held back",
    "retention_steps": "with more tokens kept than in the end",
}


class FolderWindows(NamedTuple):
    """A folder of data by its number of windows. share: of all training windows, 1 where it is alone."""

    name: str
    share: float
    windows: int
    held_out: int


def notes(recipe: Recipe, folders: Sequence[FolderWindows]) -> Iterator[str]:
    """Notes on the recipe for data of so many windows."""
    run, steps = recipe.training, recipe.steps
    for one in folders:
        yield from _of_folder(recipe, one, alone=len(folders) == 1)
    if 0 < steps <= recipe.schedule.warmup_steps:
        end = f"the run of {counted(steps, 'step')} ends"
        yield (
            f"schedule.warmup_steps = {recipe.schedule.warmup_steps}: {end} before the full "
            f"learning rate is reached; give schedule.warmup_steps below {steps}, or more training.steps"
        )
    for (table, values), (key, state) in product(recipe.model.tables.items(), _SCHEDULES.items()):
        if (last := getattr(values, key, 0)) > steps:
            yield (
                f"model.{table}.{key} = {last}: the run ends after {steps / last:.0%} of them, {state}; "
                f"give {steps} or fewer, or more training.steps"
            )
    for name in ("evaluate_every", "checkpoint_every"):
        if (every := getattr(run, name)) > steps:
            yield f"training.{name} = {every}: more than {counted(steps, 'step')}, so it happens once, at the end"


def _of_folder(recipe: Recipe, folder: FolderWindows, alone: bool) -> Iterator[str]:
    """How often the run goes through a folder of a mix; of one alone, if it is more than once."""
    run, steps = recipe.training, recipe.steps
    rounds = steps * run.batch_windows * folder.share / folder.windows
    through = f"the run goes through its {folder.windows:,} training windows {rounds:.1f} times"
    if not alone:
        yield f"data.mix: {folder.name} gives {folder.share:.1%} of the windows: {through}"
    elif rounds > 1:
        yield f"training.steps = {steps}: {through}; prepare more text, or train fewer steps, to see each once"
    if run.evaluate_windows > folder.held_out:
        where = "" if alone else f" in {folder.name}"
        held_out = f"only {folder.held_out} are held out{where}, which all count"
        yield f"training.evaluate_windows = {run.evaluate_windows}: {held_out}"
