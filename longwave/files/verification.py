"""Whether a folder is exactly as it was saved."""

import os
from pathlib import Path

from longwave.errors import UserError
from longwave.files.manifest import ALGORITHM, REMEDY, SavedFile, measure, measured, read_manifest
from longwave.files.opened import OpenFolder, read_whole
from longwave.files.paths import resolved
from longwave.units import counted


def verify(path: str | os.PathLike[str], full: bool = True) -> bool:
    """True if the folder is exactly as it was saved; False if it has no manifest, so that nothing can be said.

    `full` compares checksums (reads every byte); otherwise names and sizes only. Raises UserError naming the first file
    that is missing, cut, changed, or a weight file that was not saved; MachineError if a file cannot be read.
    """
    return read_whole(resolved(path), lambda folder: refuse_other(folder, full))


def refuse_other(folder: OpenFolder, full: bool = True, unread: str | None = None) -> bool:
    """The same, of an opened folder.

    unread: the end of the names of files whose content is left to a caller that reads them anyway, and compares
    `saved_checksums` with `refuse_damaged`.
    """
    files = read_manifest(folder)
    if files is None:
        return False
    _check_sizes(folder, files)
    if full:
        _check_content(folder, {name: files[name] for name in files if not (unread and name.endswith(unread))})
    return True


def refuse_damaged(path: Path, found: str, saved: str) -> None:
    """Raises UserError if the checksum found in a file is not the one that was saved."""
    if found != saved:
        raise UserError(f"{path} is damaged: its {ALGORITHM} is {found}, {saved} was saved; {REMEDY}")


def _check_sizes(folder: OpenFolder, files: dict[str, SavedFile]) -> None:
    for name, file in files.items():
        size = folder.size(name)
        if size != file.bytes:
            raise UserError(f"{folder / name} has {counted(size, 'byte')}; {file.bytes:,} were saved; {REMEDY}")
    for home in sorted({os.path.dirname(name) for name in files}):
        for extra in sorted(name for name in folder.names_in(home) if name.endswith(".safetensors")):
            if extra not in files:
                raise UserError(f"{folder / extra} was not saved with this folder; remove it")


def _check_content(folder: OpenFolder, files: dict[str, SavedFile]) -> None:
    found = measured([folder.descriptor(name) for name in files], measure)
    for (name, saved), one in zip(files.items(), found, strict=True):
        refuse_damaged(folder / name, one.checksum, saved.checksum)
