"""Whether the files of a saved folder are as they were written: each is summed once, when it is first asked for."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

from longwave import files
from longwave.errors import UserError
from longwave.files.manifest import measure_path


class Intact:
    """The files of a folder that has a manifest. Raises UserError if the manifest is damaged."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._saved = folder, files.checksums(folder)

    def require(self, name: str) -> Path:
        """The path of a file. Raises UserError unless its content is what was saved; MachineError if it is unreadable.

        A file of the same size and time is not summed again in this process.
        """
        path = self._folder / name
        if name not in self._saved:
            raise UserError(f"{path}: is not among the files that were saved; prepare the data again")
        with files.reading(path):
            found = path.stat()
            checksum = _checksum(files.resolved(path), found.st_size, found.st_mtime_ns)
            files.refuse_damaged(path, checksum, self._saved[name])
        return path

    def require_small(self, *without: str) -> None:
        """Raises UserError unless every file is what was saved, but for those whose names end in one of `without`."""
        for name in self._saved:
            if not name.endswith(without):
                self.require(name)


@lru_cache(maxsize=1 << 16)
def _checksum(path: Path, size: int, time: int) -> str:
    """The checksum of a file, remembered by its size and time."""
    return measure_path(path).checksum
