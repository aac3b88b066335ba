"""Writing a folder or a file under a hidden name, and giving it its own name when all of it is safe on the disk."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

from longwave.errors import UserError
from longwave.files import storage
from longwave.files.faults import faults
from longwave.files.leftovers import Hidden, hidden_name, sweep_siblings
from longwave.files.lock import held
from longwave.files.manifest import file_names, manifest_text, measure_path, measured, read_manifest
from longwave.files.names import CARD, MANIFEST
from longwave.files.opened import OpenFolder
from longwave.files.paths import resolved


@contextmanager
def folder(path: str | os.PathLike[str], overwrite: bool = True) -> Iterator[Path]:
    """Give a staging folder to write plain files into; on a normal exit it becomes `path`, whole and safe on the disk.

    Subfolders are allowed; links are not. On any exception the staging folder is removed and `path` stays as it was.
    Raises UserError if `path` is a file, holds something longwave did not write, or exists and `overwrite` is false;
    MachineError if the machine fails (disk full, read-only, no permission, input/output error).
    """
    with _staging(
        path, lambda target: _check_target(target, overwrite), lambda hidden: _publish(hidden, overwrite)
    ) as staging:
        yield staging


@contextmanager
def add_to(path: str | os.PathLike[str], replaced: str | None = None) -> Iterator[Path]:
    """Give a staging folder for plain files that then stand in `path`, a folder in which everything else stays.

    replaced: a pattern of the names of files that the new ones stand in place of, and that go with them.

    A new or empty folder appears whole, as with `folder`. Any other is changed file by file, first its manifest, which
    then lists the new files alone: until the last of them stands, `verify` refuses the folder. Raises as `folder` does.
    """
    target = Path(path)
    if target.is_dir() and not _is_empty_folder(target):
        with _staging(path, lambda target: None, partial(_merge, replaced)) as staging:
            yield staging
    else:
        with folder(path) as staging:
            yield staging


def write_file(path: str | os.PathLike[str], data: bytes) -> None:
    """Write one file as `file` does."""
    with file(path) as staging:
        storage.disk.write(staging, data)


@contextmanager
def file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A new file to write, which appears whole and safe on the disk or not at all; an older one is replaced.

    Raises UserError if `path` is a folder, a device or a pipe, MachineError if the machine fails.
    """
    target = resolved(path)
    with hidden_name(target) as staging:
        with faults(f"saving {target}", "nothing was changed"):
            _make_folder(target.parent)
            if target.is_dir():
                raise UserError(f"cannot save to {target}: it is a folder, not a file; give another path")
            if target.exists() and not target.is_file():  # a rename would put a file in place of /dev/null
                raise UserError(f"cannot save to {target}: it is a device or a pipe; give the name of a file")
            yield staging.path
            storage.disk.sync(staging.path)
            storage.disk.rename(staging.path, target)
        with faults(f"saving {target}", "the new file is in place, but the disk has not confirmed it"):
            storage.disk.sync(target.parent)


@contextmanager
def _staging(
    path: str | os.PathLike[str], check: Callable[[Path], None], publish: Callable[[Hidden], None]
) -> Iterator[Path]:
    """Give a hidden sibling of `path`; on a normal exit it is sealed and published, on any exception removed."""
    target = resolved(path)
    with hidden_name(target) as staging:
        with faults(f"saving {target}", "nothing was changed"):
            _make_folder(target.parent)
            sweep_siblings(target.parent, target.name)
            check(target)
            storage.disk.mkdir(staging.path)
            with held(staging.path):
                yield staging.path
                _seal(staging.path)
                publish(staging)
        with faults(f"saving {target}", "the new folder is in place, but the disk has not confirmed it"):
            storage.disk.sync(target.parent)


def _make_folder(path: Path) -> None:
    """Create `path` and its parents, each entry safe on the disk."""
    if path.is_dir():
        return
    if path.exists():
        raise UserError(f"cannot save below {path}: it is a file, not a folder; give another path")
    _make_folder(path.parent)
    with suppress(FileExistsError):  # another process was faster
        storage.disk.mkdir(path)
    storage.disk.sync(path.parent)


def _check_target(target: Path, overwrite: bool) -> None:
    """Refuse to overwrite anything but an empty folder or a folder that longwave wrote."""
    if not target.exists() or _is_empty_folder(target):
        return
    if not target.is_dir():
        raise UserError(f"cannot save to {target}: it is a file, not a folder; give another path")
    if not overwrite:
        raise UserError(f"cannot save to {target}: it exists; give another path, or remove it first")
    with OpenFolder(target) as folder:
        ours = read_manifest(folder) is not None
    if not ours:
        raise UserError(f"cannot save to {target}: it holds files that longwave did not write; give another path")


def _is_empty_folder(path: Path) -> bool:
    return path.is_dir() and not any(path.iterdir())


def _seal(staging: Path) -> None:
    """Make everything in `staging` safe on the disk and readable as its folder is, the manifest last."""
    names = file_names(staging)
    if MANIFEST in names:
        raise UserError(f"cannot save a file named {MANIFEST}: the name is that of longwave's own list; give another")
    listed = [name for name in names if name != CARD]
    files = dict(zip(listed, measured([staging / name for name in listed], measure_path), strict=True))
    for name in names:
        _open_up(staging / name, staging)
        storage.disk.sync(staging / name)
    storage.disk.write(staging / MANIFEST, manifest_text(files))
    storage.disk.sync(staging / MANIFEST)
    for root, _, _ in os.walk(staging, topdown=False):
        storage.disk.sync(Path(root))


def _open_up(path: Path, folder: Path) -> None:
    """Gives a file the rights of its folder, which are those of the umask: safetensors writes for the owner alone."""
    with suppress(PermissionError):  # a file system without rights
        os.chmod(path, folder.stat().st_mode & 0o666)


def _publish(staging: Hidden, overwrite: bool) -> None:
    """Give the staging folder its name; a folder that stood there keeps a hidden name, to be swept."""
    _check_target(staging.target, overwrite)  # again: a save can last long enough for somebody else to write there
    if not staging.target.exists() or _is_empty_folder(staging.target):
        storage.disk.rename(staging.path, staging.target)
    elif not storage.disk.exchange(staging.path, staging.target):
        with held(staging.target):
            storage.disk.rename(staging.target, staging._replace(kind="old").path)
            storage.disk.rename(staging.path, staging.target)


def _merge(replaced: str | None, staging: Hidden) -> None:
    """Move every file of the staging folder over its namesake in the target, the manifest before all others."""
    names = sorted(file_names(staging.path), key=lambda name: name != MANIFEST)
    stale = [path for path in staging.target.glob(replaced) if path.name not in names] if replaced else []
    outcome = f"{staging.target} holds some of the new files and is refused until it is saved again"
    with faults(f"saving {staging.target}", outcome):
        for name in names:
            storage.disk.rename(staging.path / name, staging.target / name)
            if name == MANIFEST:
                storage.disk.sync(staging.target)
        for path in stale:
            storage.disk.remove(path)
        storage.disk.sync(staging.target)
