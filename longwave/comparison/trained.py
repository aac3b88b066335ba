"""Results of runs that are there already: folders that `longwave train` wrote, and files of other comparisons."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

from longwave import files
from longwave.comparison.budgets import Budget, Unit
from longwave.comparison.grid import Choice, choose
from longwave.comparison.results import COMPARISON, RESULT, Result, read_result
from longwave.comparison.runs import Run, Setting, require_one_folder
from longwave.comparison.worker import result_of
from longwave.config import build
from longwave.errors import UserError, require
from longwave.files.jsonfile import read_object
from longwave.training import checkpoints
from longwave.training.loop import Trainer
from longwave.training.progress import FILE
from longwave.training.recipe import Recipe


def results_of_folders(folders: Sequence[str | Path], budgets: Sequence[Budget]) -> list[Result]:
    """The results of finished runs in their folders; those of one recipe in several seeds are one model.

    budgets: of the comparison; none for that of the first folder. UserError for a folder that holds no finished run, or
    one of another budget.
    """
    found, names = list[Result](), dict[str, str]()
    for folder in folders:
        trainer = _finished(Path(folder))
        run = trainer.recipe
        same = json.dumps({**run.to_dict(), "training": {**run.to_dict()["training"], "seed": None}}, sort_keys=True)
        named = files.resolved(folder).name
        name = names.setdefault(same, str(folder) if named in names.values() else named)
        budget = _budget(folder, trainer, budgets)
        budgets = budgets or (budget,)
        found.append(result_of(Run(name, Setting(), run.training.seed, budget, run, trainer.output), trainer))
    return found


def _finished(folder: Path) -> Trainer:
    """The run in a folder, which is at its end."""
    newest = checkpoints.newest(folder / "checkpoints")
    require(newest is not None, f"{folder}: holds no run of `longwave train`; give its folder, with checkpoints/ in it")
    assert newest is not None
    recipe = build(Recipe, read_object(newest.path / FILE)["recipe"], str(newest.path / FILE))
    require_one_folder(recipe, str(folder))
    trainer = Trainer(recipe, folder)
    require(
        trainer.finished, f"{folder}: is at step {trainer.step} of {recipe.steps}; the same `longwave train` ends it"
    )
    return trainer


def _budget(folder: str | Path, trainer: Trainer, budgets: Sequence[Budget]) -> Budget:
    """The budget, among those of the comparison, that a run was trained to, within a step."""
    share = 1 / max(trainer.step, 1)
    spent: dict[Unit, float] = {"tokens": trainer.tokens, "flops": trainer.flops}
    if not budgets:
        return Budget("tokens", trainer.tokens)
    for budget in budgets:
        if budget.unit in spent and abs(spent[budget.unit] / budget.amount - 1) <= share:
            return budget
    wanted = " or ".join(budget.words() for budget in budgets)
    has = " and ".join(Budget(unit, amount).words() for unit, amount in spent.items())
    raise UserError(f"{folder}: a finished run of {has}, not of {wanted}; give runs of one budget")


def read_results(paths: Sequence[str | Path]) -> list[Result]:
    """The results in files, and in all folders within folders. UserError where there is none."""
    found = list[Result]()
    for path in map(Path, paths):
        files = sorted(path.rglob(RESULT)) if path.is_dir() else [path]
        require(bool(files), f"{path}: no {RESULT} in it; give files of a comparison, or its folder")
        found += sorted((read_result(file) for file in files), key=_order_in(path))
    return found


def _order_in(path: Path) -> Callable[[Result], int]:
    """The place of a result's model in the comparison of which a folder is the output; 0 elsewhere."""
    if not (path / COMPARISON).is_file():
        return lambda _: 0
    names = [row.get("model") for row in read_object(path / COMPARISON).get("rows", [])]
    return lambda result: names.index(result.model) if result.model in names else len(names)


def settled(results: Sequence[Result]) -> tuple[list[Result], list[Choice]]:
    """The results of each model at the best of the settings that were tried, and what was tried."""
    kept, choices = list[Result](), list[Choice]()
    for model in dict.fromkeys(one.model for one in results):
        own = [one for one in results if one.model == model]
        keys = {key for one in own for key in one.setting}
        if len(keys) == 1 and len({json.dumps(dict(one.setting)) for one in own}) > 1:
            choice = _choice(model, keys.pop(), own)
            own = [one for one in own if one.setting.get(choice.key) == choice.best]
            choices.append(choice)
        kept += own
    return kept, choices


def _choice(model: str, key: str, results: Sequence[Result]) -> Choice:
    """Of the largest budget, and the seed with which most values were tried."""
    largest = [one for one in results if key in one.setting and one.budget == max(r.budget for r in results)]
    seeds = [one.seed for one in largest]
    tried = max(dict.fromkeys(seeds), key=seeds.count)
    return choose(model, key, [one for one in largest if one.seed == tried])
