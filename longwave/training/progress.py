"""How far a run has come, as its checkpoints keep it (`trainer.json`), and whether a checkpoint is of this very run."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from longwave import files
from longwave.checkpoints import native
from longwave.config import build
from longwave.data.tokenizer import Tokenizer
from longwave.errors import UserError
from longwave.training.checkpoints import Checkpoint, step_folder
from longwave.training.recipe import Recipe, flat

FILE = "trainer.json"
# Settings that may differ when a run continues, since they do not change what is learned.
FREE_TO_CHANGE = {"log_every", "checkpoint_every", "keep", "tensorboard", "device", "deterministic", "max_skipped"}
_MOST_NAMED = 3  # files of the data that a message names


@dataclass(frozen=True)
class Progress:
    """How far a run has come.

    step, tokens, flops: updates done, tokens trained on, and FLOPs spent, at the tokens that every level really kept.
    skipped: updates that were skipped; in_a_row: those at the end.
    """

    step: int = 0
    tokens: int = 0
    flops: int = 0
    skipped: int = 0
    in_a_row: int = 0

    def after(self, tokens: int, flops: int, skipped: bool) -> Progress:
        """The progress after another step."""
        in_a_row = self.in_a_row + 1 if skipped else 0
        return Progress(self.step + 1, self.tokens + tokens, self.flops + flops, self.skipped + skipped, in_a_row)


def write_progress(progress: Progress, recipe: Recipe, tokenizer: Tokenizer, folder: Path) -> None:
    """Writes the progress into a checkpoint, with all that a run has to agree in to go on from it."""
    identity = {"recipe": recipe.to_dict(), "tokenizer": tokenizer.fingerprint, "data": _checksums(recipe)}
    (folder / FILE).write_text(json.dumps(asdict(progress) | identity, indent=2) + "\n")


def adopt(checkpoint: Checkpoint, recipe: Recipe, parent: Path) -> None:
    """Makes a checkpoint of another run the first one of a run of this recipe, among the checkpoints in `parent`.

    It is for runs that have come as far by the very same steps: whether they have is for the caller to know.
    """
    with files.folder(step_folder(parent, checkpoint.step)) as staging:
        for path in checkpoint.path.iterdir():
            if path.name != files.MANIFEST:
                shutil.copyfile(path, staging / path.name)
        kept = json.loads((staging / FILE).read_text())
        (staging / FILE).write_text(json.dumps(kept | {"recipe": recipe.to_dict()}, indent=2) + "\n")


def read_progress(checkpoint: Checkpoint, recipe: Recipe, tokenizer: Tokenizer) -> Progress:
    """The progress in a checkpoint. UserError unless it was written by a run of this recipe, tokenizer and data."""
    path = checkpoint.path
    try:
        kept = json.loads((path / FILE).read_text())
        step, written, fingerprint = int(kept["step"]), kept["recipe"], kept["tokenizer"]
        skipped = {name: int(kept.get(name, 0)) for name in ("skipped", "in_a_row")}
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{path}: no checkpoint of a run (no {FILE} to go by); remove the folder") from None
    if step != checkpoint.step:
        raise UserError(f"{path}: is a checkpoint of step {step}, whatever its name says; remove the folder")
    _require_recipe(written, recipe, path, data_may_move="data" in kept)
    if fingerprint != tokenizer.fingerprint:
        raise UserError(f"{path}: trained with another tokenizer than {_folders(recipe)} has; give another output")
    _require_data(kept.get("data"), recipe, path)
    run = recipe.training  # older checkpoints hold no count of tokens or FLOPs; all their training windows were full
    tokens = int(kept.get("tokens", step * run.batch_windows * run.window))
    flops = int(kept["flops"] if "flops" in kept else step * recipe.step_flops)
    return Progress(step, tokens, flops, **skipped)


def _require_recipe(written: dict[str, Any], recipe: Recipe, path: Path, data_may_move: bool) -> None:
    written = completed({**written, "model": native.from_format_1(written["model"])})
    ours, theirs = (_identity(values, data_may_move) for values in (json.loads(json.dumps(recipe.to_dict())), written))
    for name in sorted({*theirs, *ours} - {f"training.{name}" for name in FREE_TO_CHANGE}):
        if theirs.get(name) != ours.get(name):
            values = f"{name} = {theirs.get(name)!r} there, {ours.get(name)!r} here"
            raise UserError(f"{path}: a checkpoint of another run ({values}); give another output folder, or remove it")


def _identity(values: dict[str, Any], data_may_move: bool) -> dict[str, Any]:
    """The flat values of a recipe in which two runs have to agree. data_may_move: folders of data are left out."""
    found = flat(values)
    if data_may_move:
        found.pop("data.folder", None)
        found["data.mix"] = [one["share"] for one in found.get("data.mix", ())]
    return found


def completed(written: dict[str, Any]) -> dict[str, Any]:
    """The plain values of a recipe as it was written, with the defaults of keys that have been added since."""
    try:
        return json.loads(json.dumps(build(Recipe, written, FILE).to_dict()))
    except UserError:  # keys that are gone, or were legal then: compared as they stand
        return written


def _require_data(then: dict[str, str] | None, recipe: Recipe, path: Path) -> None:
    """UserError if the prepared data are not those that the run began with; older checkpoints cannot tell."""
    now = _checksums(recipe)
    if then is None or then == now:
        return
    changed = sorted(name for name in then.keys() | now.keys() if then.get(name) != now.get(name))
    more = f" and {len(changed) - _MOST_NAMED} more" if len(changed) > _MOST_NAMED else ""
    named = ", ".join(changed[:_MOST_NAMED]) + more
    advice = "prepare the same data again, or give another output folder"
    raise UserError(f"{_folders(recipe)}: other data than {path} was trained on ({named} changed); {advice}")


def _checksums(recipe: Recipe) -> dict[str, str]:
    """The checksum of every file of the data; of several folders, with the number of each before its files."""
    of_folders = [files.checksums(one.folder) for one in recipe.data.folders]
    if len(of_folders) == 1:
        return of_folders[0]
    return {f"{number}/{name}": one for number, its in enumerate(of_folders, 1) for name, one in its.items()}


def _folders(recipe: Recipe) -> str:
    return ", ".join(one.folder for one in recipe.data.folders)
