"""Checkpoints of a run: folders named by their step, such as `step-00000100`. Standard library only."""

import os
import re
from pathlib import Path
from typing import NamedTuple

from longwave import files
from longwave.errors import UserError


class Checkpoint(NamedTuple):
    """A complete step folder."""

    step: int
    path: Path


def step_folder(parent: str | os.PathLike[str], step: int) -> Path:
    """The path of a step's folder, for example `parent/step-00000100`."""
    return Path(parent) / f"step-{step:08d}"


def complete(parent: str | os.PathLike[str]) -> list[Checkpoint]:
    """The complete step folders in `parent` (manifest present, sizes right, content not compared), newest last."""
    where = Path(parent).resolve()
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
    """The complete step folder with the highest step, or None; `files.verify` compares its checksums."""
    return next(reversed(complete(parent)), None)


def newest_undamaged(parent: Path) -> Checkpoint | None:
    """The newest checkpoint, checksums compared. Damage to it, or to a folder beyond it, is a UserError.

    An interrupted save leaves no folder of this name, so a damaged one was changed later: going on from an older
    checkpoint without a word would lose steps.
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


def prune(parent: str | os.PathLike[str], keep: int) -> list[Checkpoint]:
    """Delete all but the `keep` newest complete step folders, oldest first, and return what was deleted.

    Call it after a save: the newest is safe by then. Each folder is hidden before its content goes, so that a crash
    leaves it whole or out of sight. Raises UserError if `keep` is below 1, MachineError if the machine fails.
    """
    if keep < 1:
        raise UserError(f"keep = {keep}: would delete every checkpoint; the least is 1")
    doomed = complete(parent)[:-keep]
    with files.faults(f"pruning {parent}", "every newer checkpoint is untouched"):
        for checkpoint in doomed:
            files.delete(checkpoint.path)
    return doomed
