"""Settings of a recipe that do less than they seem to: lines for people, before a run starts."""

from __future__ import annotations

from collections.abc import Iterator

from longwave.training.recipe import Recipe
from longwave.units import counted


def notes(recipe: Recipe) -> Iterator[str]:
    """Notes on the recipe, whatever its data are."""
    run, steps = recipe.training, recipe.steps
    if 0 < steps <= recipe.schedule.warmup_steps:
        end = f"the run of {counted(steps, 'step')} ends"
        yield (
            f"schedule.warmup_steps = {recipe.schedule.warmup_steps}: {end} before the full "
            f"learning rate is reached; give schedule.warmup_steps below {steps}, or more training.steps"
        )
    for table, values in recipe.model.tables.items():
        if (bypass := getattr(values, "bypass_steps", 0)) > steps:
            yield (
                f"model.{table}.bypass_steps = {bypass}: the run ends after {steps / bypass:.0%} of them, with the "
                f"bypass still held back; give {steps} or fewer, or more training.steps"
            )
    for name in ("evaluate_every", "checkpoint_every"):
        if (every := getattr(run, name)) > steps:
            yield f"training.{name} = {every}: more than {counted(steps, 'step')}, so it happens once, at the end"
