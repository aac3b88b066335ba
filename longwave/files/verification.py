"""Whether a folder is exactly as it was saved."""

import os
from pathlib import Path

from longwave.errors import UserError
from longwave.files.faults import reading
from longwave.files.leftovers import put_back
from longwave.files.manifest import ALGORITHM, REMEDY, SavedFile, measured, read_manifest
from longwave.units import counted


def verify(path: str | os.PathLike[str], full: bool = True, unread: str | None = None) -> bool:
    """True if the folder is exactly as it was saved; False if it has no manifest, so that nothing can be said.

    `full` compares checksums (reads every byte); otherwise names and sizes only. The content of files whose name ends
    in `unread` is left to a caller that reads them anyway, and compares `checksums` with `refuse_damaged`.
    Raises UserError naming the first file that is missing, cut, changed, or a weight file that was not saved;
    MachineError if a file cannot be read.
    """
    folder = Path(path).resolve()
    with reading(folder):
        put_back(folder)
        if not folder.is_dir():
            raise UserError(f"there is no folder {folder}; give one that exists")
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


def _check_sizes(folder: Path, files: dict[str, SavedFile]) -> None:
    for name, file in files.items():
        if not (folder / name).is_file():
            raise UserError(f"{folder / name} is missing; {REMEDY}")
        size = (folder / name).stat().st_size
        if size != file.bytes:
            raise UserError(f"{folder / name} has {counted(size, 'byte')}; {file.bytes:,} were saved; {REMEDY}")
    for home in sorted({(folder / name).parent for name in files}):
        for extra in sorted(home.glob("*.safetensors")):
            if extra.relative_to(folder).as_posix() not in files:
                raise UserError(f"{extra} was not saved with this folder; remove it")


def _check_content(folder: Path, files: dict[str, SavedFile]) -> None:
    for (name, saved), found in zip(files.items(), measured(folder, files), strict=True):
        refuse_damaged(folder / name, found.checksum, saved.checksum)
