"""Checkpoints of a run: folders named by their step, such as `step-00000100`. Imports no torch."""

import os
import re
from pathlib import Path
from typing import NamedTuple

from longwave import files
from longwave.errors import UserError


class Checkpoint(NamedTuple):
    """A complete checkpoint: its step, and its folder."""

    step: int
    path: Path


def step_folder(parent: str | os.PathLike[str], step: int) -> Path:
    """The path of a step's folder, for example `parent/step-00000100`."""
    return Path(parent) / f"step-{step:08d}"


def complete(parent: str | os.PathLike[str]) -> list[Checkpoint]:
    """The complete checkpoints in `parent`, newest last: manifest present, sizes right, checksums not compared."""
    where = files.resolved(parent)
    with files.reading(where):
        matches = (re.fullmatch(r"step-(\d{8,})", name) for name in files.folder_names(where))
        found = sorted(Checkpoint(int(match[1]), where / match[0]) for match in matches if match)
        return [checkpoint for checkpoint in found if _is_complete(checkpoint.path)]


def _is_complete(path: Path) -> bool:
    try:
        return files.verify(path, full=False)
    except UserError:
        return False


def newest(parent: str | os.PathLike[str]) -> Checkpoint | None:
    """The complete checkpoint with the highest step, or None; its checksums are not compared (`files.verify` does)."""
    return next(reversed(complete(parent)), None)


def newest_undamaged(parent: Path) -> Checkpoint | None:
    """The newest checkpoint, or None, after comparing its checksums.

    Raises UserError if the newest step folder is damaged. An interrupted save leaves no folder of this name, so it must
    have been damaged later, and continuing from an older checkpoint without a word would lose steps.
    """
    found = newest(parent)
    beyond = [path for path in parent.glob("step-*") if found is None or path.name > found.path.name]
    last = max(beyond, default=None if found is None else found.path)
    try:
        if last is not None and not files.verify(last):
            raise UserError(f"{last} has no {files.MANIFEST}")
    except UserError as error:
        raise UserError(f"{error}; remove the folder to go on from an earlier one") from None
    return found


def prune(parent: str | os.PathLike[str], keep: int, newest: int | None = None) -> list[Checkpoint]:
    """Deletes all but the `keep` newest complete checkpoints, oldest first, and returns the deleted ones.

    To be called after a save, when the newest checkpoint is safe. newest: the step that was saved; folders of higher
    steps, which this run did not write, do not count and are left alone. Each folder is renamed out of sight before its
    content is deleted, so that a crash leaves it whole or invisible. Raises UserError if `keep` is below 1,
    MachineError if the machine fails.
    """
    if keep < 1:
        raise UserError(f"keep = {keep}: 1 or more; fewer would delete every checkpoint")
    ours = [one for one in complete(parent) if newest is None or one.step <= newest]
    doomed = ours[:-keep]
    with files.faults(f"pruning {parent}", "every newer checkpoint is untouched"):
        for checkpoint in doomed:
            files.delete(checkpoint.path)
    return doomed
