"""A lock on a folder, for as long as one process writes to it. It dies with its process, whatever kills that."""

from __future__ import annotations

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from longwave.errors import MachineError, UserError
from longwave.files.faults import faults

LOCK = ".lock"


class Lock:
    """A lock that is held on a folder: the system's lock on a file in it, which names the process for other people."""

    def __init__(self, folder: Path, descriptor: int) -> None:
        self.folder, self._descriptor = folder, descriptor

    def in_place(self) -> bool:
        """Whether the folder at this path is still the one that was locked."""
        try:
            return os.path.samestat(os.stat(self.folder / LOCK), os.fstat(self._descriptor))
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
def locked(folder: str | os.PathLike[str]) -> Iterator[Lock]:
    """Hold the lock of a folder, which is made if need be, and removed again if nothing was put into it.

    UserError where another process, or another part of this one, holds it; MachineError if the machine fails.
    """
    path = Path(folder)
    with faults(f"locking {path}", "nothing was changed"):
        is_new = not path.exists()
        path.mkdir(parents=True, exist_ok=True)
        lock = _acquired(path)
    try:
        yield lock
    finally:
        lock.release()
        if is_new:
            with suppress(OSError):  # it holds something, or is no more
                path.rmdir()


def _acquired(path: Path) -> Lock:
    while True:
        descriptor = os.open(path / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            # The lock is of this open file, so that two runs within one process exclude each other too.
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(descriptor, 200).decode(errors="replace").strip()
            os.close(descriptor)
            who = f"{holder} is writing" if holder else "another process writes"
            raise UserError(f"{path}: {who} to it; wait until it ends, or give another output folder") from None
        except BaseException:
            os.close(descriptor)
            raise
        lock = Lock(path, descriptor)
        if lock.in_place():
            os.truncate(descriptor, 0)
            os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
            return lock
        os.close(descriptor)  # who held it has just removed the file: begin again with a new one
