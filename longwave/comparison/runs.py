"""The runs of a comparison: every model with every seed and budget, each in a folder of its own.

Several budgets of one model and seed are one line of runs. Where their schedules give the same rates up to a step, as
WSD does in its stable phase, a run begins with the checkpoint of the run before it; the result is the same to the bit.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from longwave.comparison.budgets import Budget
from longwave.errors import UserError, require, within
from longwave.training.recipe import Recipe, read_values, recipe_of
from longwave.units import counted

RUNS = "runs"
_PLAIN = "as written"  # the setting of a recipe without a grid
_POINTS = 10  # of a curve, and checkpoints, where a recipe asks for none


@dataclass(frozen=True)
class Setting:
    """A value of the grid, for one key of a recipe; key "" for recipes as they are written."""

    key: str = ""
    value: Any = None

    @property
    def name(self) -> str:
        """The setting as the name of a folder, such as `lr=0.0015`."""
        return f"{self.key.rpartition('.')[2]}={self.value}".replace("/", "_") if self.key else _PLAIN.replace(" ", "-")

    def words(self) -> str:
        """The setting for people."""
        return f"{self.key} = {self.value}" if self.key else ""


@dataclass(frozen=True)
class Candidate:
    """A recipe that takes part.

    values: its plain values, before budget, seed and setting are put in. place: the folder, below the output, of its
    run where it is known to have one only.
    """

    name: str
    source: str
    values: dict[str, Any]
    place: str | None = None

    @classmethod
    def read(cls, source: str, overrides: Sequence[str], name: str | None = None) -> Candidate:
        """The recipe of a file, or of the package, with overrides."""
        values = read_values(source, overrides)
        require(isinstance(values.get("training"), dict), f"{source}: no [training] table; give a recipe of a run")
        return cls(name or Path(source).stem, source, values)

    def recipe(self, setting: Setting, seed: int, training: Mapping[str, Any]) -> Recipe:
        """The recipe of one run. UserError for a setting whose key no recipe has, or a warm-up that does not fit."""
        values = copy.deepcopy(self.values)
        values["training"] = {name: value for name, value in values["training"].items() if name not in _BUDGETS}
        values["training"] |= {"seed": seed, **training}
        if setting.key:
            _put(values, setting.key, setting.value)
        with within(f"--grid {setting.words()}") if setting.key else nullcontext():
            recipe = _with_points(values, self.source)
        warmup = recipe.schedule.warmup_steps
        steps = counted(recipe.steps, "step")
        fits = (
            f"{self.source}: schedule.warmup_steps = {warmup}: the budget is {steps}; give more of it, or less warm-up"
        )
        require(warmup < recipe.steps, fits)
        return recipe

    def step_tokens(self, setting: Setting) -> int:
        """Tokens of one optimizer step."""
        training = self.recipe(setting, 0, {"steps": 1 << 30}).training
        return training.batch_windows * training.window


_BUDGETS = ("steps", "flops")


def _with_points(values: dict[str, Any], source: str) -> Recipe:
    """The recipe, which is evaluated and saved on the way even where it does not say so."""
    recipe = recipe_of(values, source)
    require_one_folder(recipe, source)
    every = {name: max(1, recipe.steps // _POINTS) for name in ("evaluate_every", "checkpoint_every")}
    missing = {name: value for name, value in every.items() if not getattr(recipe.training, name)}
    return recipe_of({**values, "training": values["training"] | missing}, source) if missing else recipe


def require_one_folder(recipe: Recipe, source: str) -> None:
    """Raises UserError for a recipe over a mix of folders, whose losses are no one loss to compare."""
    require(not recipe.data.mix, f"{source}: data.mix: a comparison is over one folder; give data.folder in its place")


def _put(values: dict[str, Any], key: str, value: Any) -> None:
    *tables, last = key.split(".")
    for name in tables:
        values = values.setdefault(name, {})
        require(isinstance(values, dict), f"{key}: {name} is a value, not a table")
    values[last] = value


@dataclass(frozen=True)
class Run:
    """One training run of a comparison."""

    model: str
    setting: Setting
    seed: int
    budget: Budget
    recipe: Recipe
    folder: Path

    def words(self) -> str:
        """The run for people."""
        setting = f", {self.setting.words()}" if self.setting.key else ""
        return f"{self.model}{setting}, seed {self.seed}, {self.budget.words()}"


@dataclass(frozen=True)
class Line:
    """The runs of one model, setting and seed, by ascending budget."""

    runs: tuple[Run, ...]

    @property
    def flops(self) -> int:
        """The FLOPs that its runs are expected to take, counting anew what they can share."""
        return sum(run.recipe.steps * run.recipe.step_flops for run in self.runs)


@dataclass(frozen=True)
class Plan:
    """What is run where. pace: seconds of a step of each model, by its name, where budgets are minutes."""

    output: Path
    models: Sequence[Candidate]
    budgets: Sequence[Budget]
    pace: Mapping[str, float] = field(default_factory=dict[str, float])

    def line(self, model: Candidate, setting: Setting, seed: int) -> Line:
        """The runs of a model with a setting and a seed."""
        return Line(tuple(self._run(model, setting, seed, budget) for budget in self.budgets))

    def _run(self, model: Candidate, setting: Setting, seed: int, budget: Budget) -> Run:
        training = budget.training(model.step_tokens(setting), self.pace.get(model.name))
        own = Path(RUNS) / model.name / setting.name / f"seed-{seed}" / budget.name
        folder = self.output / (model.place or own)
        return Run(model.name, setting, seed, budget, model.recipe(setting, seed, training), folder)


def distinct(models: Sequence[Candidate]) -> Sequence[Candidate]:
    """The models, whose names have to tell them apart; UserError if they do not."""
    names = [model.name for model in models]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"{name}: two recipes of this name; give their files names of their own")
    return models
