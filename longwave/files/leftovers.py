"""Hidden siblings, `.{name}.{kind}-{pid}-{token}`: names to write under, and the recovery of what a crash left.

`kind` is `partial` (being written), `old` (displaced by the first of two renames) or `trash` (being deleted).
"""

import os
import re
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from longwave.files import storage
from longwave.files.faults import faults
from longwave.files.lock import is_held
from longwave.files.names import MANIFEST
from longwave.files.paths import resolved

_NAME = re.compile(r"\.(?P<name>.+)\.(?P<kind>partial|old|trash)-(?P<pid>\d+)-(?P<token>[0-9a-f]{12})", re.DOTALL)
_PATIENCE = 2.0  # seconds that a reader waits for a live writer between its two renames
_ACTIVE: set[str] = set()  # tokens this process is using: in a restarted container a dead run had the very same pid


class Hidden(NamedTuple):
    """A hidden sibling of `target`."""

    target: Path
    kind: str
    pid: int
    token: str

    @property
    def path(self) -> Path:
        return self.target.with_name(f".{self.target.name}.{self.kind}-{self.pid}-{self.token}")

    def in_use(self) -> bool:
        """Whether a living process uses it: this one, one of this machine, or one in another container, by its hold."""
        if self.token in _ACTIVE or is_held(self.path):
            return True
        return self.pid != os.getpid() and _is_alive(self.pid)


@contextmanager
def hidden_name(target: Path) -> Iterator[Hidden]:
    """Give a hidden name beside `target` to write under; whatever still has such a name at the end is removed."""
    hidden = _new(target, "partial")
    _ACTIVE.add(hidden.token)
    try:
        yield hidden
    finally:
        _ACTIVE.discard(hidden.token)
        with suppress(OSError):  # a leftover that cannot be removed now is swept later
            sweep_siblings(target.parent, target.name)


def _new(target: Path, kind: str) -> Hidden:
    return Hidden(target, kind, os.getpid(), secrets.token_hex(6))


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # it lives, and is somebody else's
        return True
    return True


def _siblings(parent: Path, name: str | None = None) -> list[Hidden]:
    """The hidden siblings in `parent`: of the folder `name`, or of any."""
    entries = os.listdir(parent) if parent.is_dir() else []
    found = [match for match in map(_NAME.fullmatch, sorted(entries)) if match and name in (None, match["name"])]
    return [Hidden(parent / match["name"], match["kind"], int(match["pid"]), match["token"]) for match in found]


def being_written(target: Path) -> bool:
    """Whether a living process is about to put something at `target`."""
    return any(hidden.kind == "partial" and hidden.in_use() for hidden in _siblings(target.parent, target.name))


def folder_names(parent: Path) -> set[str]:
    """The names in `parent`, also those of folders that an interrupted overwrite hid: `verify` puts these back."""
    displaced = {hidden.target.name for hidden in _siblings(parent) if hidden.kind == "old"}
    return displaced.union(os.listdir(parent) if parent.is_dir() else [])


# --- putting a displaced folder back ----------------------------------------------------------------------------------


def recover(path: str | os.PathLike[str]) -> bool:
    """Put back the folder that an interrupted overwrite left under a hidden name; True if that was needed and done.

    Only where the file system cannot exchange two folders is there anything to do. Readers call this themselves.
    """
    target = resolved(path)
    with faults(f"recovering {target}", "nothing was changed"):
        return put_back(target)


def put_back(target: Path) -> bool:
    """`recover`, with the faults of the machine left to the caller."""
    if target.exists():
        return False
    displaced = _displaced(target)
    if not displaced:
        return False
    last = max(displaced, key=lambda hidden: hidden.path.stat().st_ctime_ns)
    if last.in_use() and _appears(target):
        return False
    return _rename_back(last)


def is_displaced(target: Path) -> bool:
    """Whether an overwrite, which may go on, has hidden the folder that stood at `target`."""
    return bool(_displaced(target))


def _displaced(target: Path) -> list[Hidden]:
    """The whole folders that stood at `target`: deletion takes the manifest first."""
    old = [hidden for hidden in _siblings(target.parent, target.name) if hidden.kind == "old"]
    return [hidden for hidden in old if (hidden.path / MANIFEST).is_file()]


def _rename_back(displaced: Hidden) -> bool:
    try:
        storage.disk.rename(displaced.path, displaced.target)
    except OSError:
        if displaced.target.exists():  # the writer went on, or another reader was faster
            return False
        raise
    return True  # not synced: if a power cut undoes it, the next reader does it again


def _appears(path: Path) -> bool:
    """Whether `path` comes to be within the time that a live writer may need between its two renames."""
    deadline = time.monotonic() + _PATIENCE
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    return path.exists()


# --- removing ---------------------------------------------------------------------------------------------------------


def sweep(parent: str | os.PathLike[str]) -> None:
    """Remove from `parent` what dead processes left behind, and put back what they displaced; a live one's is kept.

    "Dead" is judged on this machine: do not sweep a shared folder that another machine may be writing to.
    """
    where = resolved(parent)
    with faults(f"sweeping {where}", "every whole folder is untouched"):
        sweep_siblings(where)


def sweep_siblings(parent: Path, name: str | None = None) -> None:
    """`sweep`, for the siblings of `name` alone if it is given, with the faults of the machine left to the caller."""
    leftovers = [hidden for hidden in _siblings(parent, name) if not hidden.in_use()]
    for hidden in leftovers:
        if hidden.kind == "old":
            put_back(hidden.target)
    if leftovers:
        storage.disk.sync(parent)  # names first: content goes only when nothing on the disk leads to it any more
    for hidden in leftovers:
        _remove(hidden.path)


def delete(path: Path) -> None:
    """Delete a folder, hidden before its content goes, so that a crash leaves it whole or out of sight."""
    trash = _new(path, "trash")
    storage.disk.rename(path, trash.path)
    storage.disk.sync(path.parent)
    _remove(trash.path)


def _remove(path: Path) -> None:
    if path.is_symlink():  # what it leads to is somebody else's
        storage.disk.remove(path)
        return
    storage.disk.remove(path / MANIFEST)  # first: from here on it is not a whole folder
    for root, folders, files in os.walk(path, topdown=False):
        for name in files + folders:
            storage.disk.remove(Path(root, name))
    storage.disk.remove(path)
