"""A lock on a folder, for as long as one process writes to it. It dies with its process, whatever kills that."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import stat
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from longwave.errors import MachineError, UserError
from longwave.files.faults import faults
from longwave.files.paths import resolved

LOCK = ".lock"
_NO_FILES = {errno.ELOOP, errno.EISDIR, errno.ENXIO}
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}


class Lock:
    """A lock that is held on a folder: the system's lock on a file in it, which names the process for other people."""

    def __init__(self, folder: Path, descriptor: int) -> None:
        self.folder, self._descriptor = folder, descriptor

    def in_place(self) -> bool:
        """Whether the folder at this path is still the one that was locked."""
        try:
            return os.path.samestat(os.lstat(self.folder / LOCK), os.fstat(self._descriptor))
        except OSError:
            return False

    def require_in_place(self, done: str) -> None:
        """MachineError if the folder was moved or deleted meanwhile. done: what is whole in it, for the message."""
        if not self.in_place():
            raise MachineError(f"{self.folder}: was moved or deleted while it was written to; {done}")

    def release(self) -> None:
        """Gives the folder free. The file goes first, while nobody else can hold it."""
        if self.in_place():
            with suppress(OSError):
                os.unlink(self.folder / LOCK)
        os.close(self._descriptor)


@contextmanager
def held(path: Path) -> Iterator[None]:
    """Marks a file or folder as one that a living process is writing, wherever that lives, for `is_held` to see."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def is_held(path: Path) -> bool:
    """Whether somebody holds this file or folder."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOFOLLOW)
    except OSError:  # gone, a link, or not ours to look into
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return False


@contextmanager
def locked(folder: str | os.PathLike[str]) -> Iterator[Lock]:
    """Hold the lock of a folder, which is made if need be, and removed again if nothing was put into it.

    UserError where another process, or another part of this one, holds it, and where a file in it is a link;
    MachineError if the machine fails.
    """
    path = Path(folder)
    with faults(f"locking {path}", "nothing was changed"):
        resolved(path)  # refuses links without an end, which `mkdir` takes for a file
        is_new = not path.exists()
        path.mkdir(parents=True, exist_ok=True)
        _refuse_others(path)
        lock = _acquired(path)
    try:
        yield lock
    finally:
        lock.release()
        if is_new:
            with suppress(OSError):  # it holds something, or is no more
                path.rmdir()


def _refuse_others(folder: Path) -> None:
    """UserError for what is no regular file: a pipe would never end, and a link leads what is written elsewhere.

    Folders may be links, as those that lie on another disk.
    """
    with os.scandir(folder) as entries:
        odd = sorted(one.name for one in entries if not (one.is_file(follow_symlinks=False) or one.is_dir()))
    for name in odd:
        if name != LOCK:
            raise UserError(f"{folder / name}: a link or no regular file, which a run does not write to; remove it")


def _acquired(path: Path) -> Lock:
    while True:
        descriptor = _opened(path / LOCK)
        try:
            _take(descriptor, path)
        except BaseException:
            os.close(descriptor)
            raise
        lock = Lock(path, descriptor)
        if lock.in_place():
            os.truncate(descriptor, 0)
            os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
            return lock
        os.close(descriptor)  # who held it has just removed the file: begin again with a new one


def _opened(path: Path) -> int:
    """A descriptor of the file of a lock, which is made if need be; UserError for a link, a pipe or a folder.

    What a link leads to would be emptied: a folder that somebody else made could name any file of the user's.
    """
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
    except OSError as error:
        if error.errno not in _NO_FILES:
            raise
    else:
        if stat.S_ISREG(os.fstat(descriptor).st_mode):
            return descriptor
        os.close(descriptor)
    raise UserError(f"{path}: no regular file, which the lock of a folder is; remove it")


def _take(descriptor: int, path: Path) -> None:
    """Takes the lock of an open file, which excludes two runs within one process too; UserError if it is taken."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.read(descriptor, 200).decode(errors="replace").strip()
        who = f"{holder} is writing" if holder else "another process is writing"
        raise UserError(f"{path}: {who} to it; wait until it ends, or give another output folder") from None
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        warnings.warn(f"{path}: its file system has no locks; a second run in it would not be noticed", stacklevel=2)
