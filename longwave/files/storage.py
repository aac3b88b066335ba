"""The operations that change the disk, in one object that a test can replace by a disk that crashes or fails."""

import ctypes
import errno
import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any


def _load_renameat2() -> Any:
    """The C library's renameat2, or None where there is none."""
    if not sys.platform.startswith("linux"):
        return None
    return getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)


class Disk:
    """Every operation of this package that changes the disk, so that a test can crash between any two of them."""

    renameat2 = staticmethod(_load_renameat2())

    def mkdir(self, path: Path) -> None:
        os.mkdir(path)

    def write(self, path: Path, data: bytes) -> None:
        with open(path, "xb") as file:
            file.write(data)

    def sync(self, path: Path) -> None:
        """Return once `path`, a file's content or a folder's entries, would survive a power cut."""
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def rename(self, source: Path, target: Path) -> None:
        os.rename(source, target)

    def exchange(self, one: Path, other: Path) -> bool:
        """Swap two folders in one step; False, with nothing done, where the kernel or file system cannot."""
        if self.renameat2 is None:
            return False
        at_cwd, swap = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
        if self.renameat2(at_cwd, os.fsencode(one), at_cwd, os.fsencode(other), swap) == 0:
            return True
        code = ctypes.get_errno()
        if code in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP):
            return False
        raise OSError(code, os.strerror(code), str(other))

    def remove(self, path: Path) -> None:
        """Remove a file, a link or an empty folder; it is fine if that is already gone."""
        with suppress(FileNotFoundError, NotADirectoryError):
            if path.is_dir() and not path.is_symlink():
                os.rmdir(path)
            else:
                os.unlink(path)


disk = Disk()  # used as `storage.disk`, never imported by its own name: a replaced one has to be seen everywhere
