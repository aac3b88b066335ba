"""Disks that die, fail or are full."""

import errno
import os
from collections.abc import Callable
from pathlib import Path

from longwave.files import storage


class Crash(BaseException):
    """The process is gone: nothing catches this, and no later operation happens."""


class CrashingDisk(storage.Disk):
    """The real disk for `crash_at` operations, dead from there on. It knows what a power cut would take.

    A power cut is the worst that POSIX allows: content never synced is gone, names in a folder never synced are gone,
    and renames since the folder's last sync are undone. Nothing is really synced, so that many trials are quick.
    """

    def __init__(
        self, crash_at: int | None = None, exchanges: bool = True, forgets: Callable[[Path], bool] = lambda path: False
    ) -> None:
        self.crash_at, self.exchanges, self.forgets = crash_at, exchanges, forgets
        self.count = 0
        self.dead = False
        self.safe_content: set[int] = set()
        self.safe_names: dict[int, set[str]] = {}
        self.pending: list[Callable[[], object]] = []  # how to undo each rename since the last sync

    def _step(self) -> None:
        if self.dead or self.count == self.crash_at:
            self.dead = True
            raise Crash
        self.count += 1

    def mkdir(self, path: Path) -> None:
        self._step()
        super().mkdir(path)

    def write(self, path: Path, data: bytes) -> None:
        if self.count == self.crash_at and not self.dead:
            super().write(path, data[: len(data) // 2])  # a torn write
        self._step()
        super().write(path, data)

    def sync(self, path: Path) -> None:
        self._step()
        if self.forgets(path):
            return
        inode = path.stat().st_ino
        if path.is_dir():
            self.safe_names[inode] = set(os.listdir(path))
            self.pending.clear()  # the tests rename in one folder only, and sync no other one in between
        else:
            self.safe_content.add(inode)

    def rename(self, source: Path, target: Path) -> None:
        self._step()
        replaced = target.read_bytes() if target.is_file() and target.stat().st_ino in self.safe_content else None
        super().rename(source, target)
        self.pending.append(lambda: self._undo(source, target, replaced))

    def _undo(self, source: Path, target: Path, replaced: bytes | None) -> None:
        os.rename(target, source)
        if replaced is not None:
            target.write_bytes(replaced)
            self.safe_content.add(target.stat().st_ino)

    def exchange(self, one: Path, other: Path) -> bool:
        self._step()
        if not self.exchanges or not super().exchange(one, other):
            return False
        self.pending.append(lambda: storage.Disk().exchange(one, other))
        return True

    def remove(self, path: Path) -> None:
        self._step()
        if path.is_file():
            self.safe_content.discard(path.stat().st_ino)
        super().remove(path)

    def cut_power(self, root: Path) -> None:
        """Take from `root` whatever was not synced."""
        for undo in reversed(self.pending):
            undo()
        for where, folders, files in os.walk(root):
            safe = self.safe_names.get(os.stat(where).st_ino, set()) | set(folders)
            for name in files:
                self._lose(Path(where, name), name in safe)

    def _lose(self, path: Path, name_is_safe: bool) -> None:
        if not name_is_safe:
            path.unlink()
        elif path.stat().st_ino not in self.safe_content:
            os.truncate(path, 0)


class InterruptedDisk(CrashingDisk):
    """Operation number `crash_at` is interrupted from the keyboard; the process lives on and tidies up."""

    def _step(self) -> None:
        self.count += 1
        if self.count - 1 == self.crash_at:
            raise KeyboardInterrupt


class FailingDisk(storage.Disk):
    """The real disk, whose operation number `fails_at` raises an OSError once."""

    def __init__(self, fails_at: int, code: int) -> None:
        self.fails_at, self.code = fails_at, code
        self.count = 0

    def _step(self, path: Path) -> None:
        self.count += 1
        if self.count - 1 == self.fails_at:
            raise OSError(self.code, os.strerror(self.code), str(path))

    def mkdir(self, path: Path) -> None:
        self._step(path)
        super().mkdir(path)

    def write(self, path: Path, data: bytes) -> None:
        self._step(path)
        super().write(path, data)

    def sync(self, path: Path) -> None:
        self._step(path)
        super().sync(path)

    def rename(self, source: Path, target: Path) -> None:
        self._step(target)
        super().rename(source, target)

    def exchange(self, one: Path, other: Path) -> bool:
        self._step(other)
        return super().exchange(one, other)

    def remove(self, path: Path) -> None:
        self._step(path)
        super().remove(path)


class FullDisk(storage.Disk):
    """The real disk with room for `room` things more; what lies there can still be moved and removed."""

    def __init__(self, room: float) -> None:
        self.room, self.count = room, 0

    def take(self, path: Path) -> None:
        """Takes room for one thing, or raises what the system does where there is none."""
        self.count += 1
        if self.count > self.room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    def mkdir(self, path: Path) -> None:
        self.take(path)
        super().mkdir(path)

    def write(self, path: Path, data: bytes) -> None:
        self.take(path)
        super().write(path, data)
