"""A folder that is read as it was at one moment, whoever writes over it meanwhile.

    model = files.read_whole("runs/a/model", lambda folder: build(folder.object("config.json"), folder))

- The folder is opened once, and with it all of its files: a writer that exchanges or deletes it changes nothing then.
- Nothing but regular files is read: no pipe to wait at, no device. A link is followed to a file inside the folder, into
  the cache of the Hugging Face hub, to a file of the same name (folders that share files), and for weights anywhere:
  what cannot be told from its content (a template, a setting) is never taken from somewhere else, and so never copied
  into what is saved.
- A text is read up to a bound, which is compared with the file's size first.
"""

from __future__ import annotations

import errno
import os
import stat
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from longwave.errors import UserError
from longwave.files.faults import reading
from longwave.files.jsonfile import object_in
from longwave.files.leftovers import being_written, is_displaced, put_back
from longwave.files.paths import resolved

T = TypeVar("T")
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth")
_TOGETHER = (
    *WEIGHTS,
    ".json",
    ".jinja",
    ".model",
    ".txt",
    ".tiktoken",
)  # files of a model, which have to be of one moment
_TEXT = 8 << 20  # bytes of a text: a parsed one takes up to 27 times as much
_TRIES = 1000  # to open a folder in one moment
_PATIENCE = 5.0  # seconds for which a reader begins again while somebody writes
_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def read_whole(path: str | os.PathLike[str], read: Callable[[OpenFolder], T]) -> T:
    """The result of `read` for a folder as it was at one moment.

    Where that moment fell into somebody's writing, so that the folder is refused or was changed while it was read, it
    is read again. UserError as `read` raises it, and for a path that is no folder; MachineError for a fault of the
    machine.
    """
    where = Path(path)
    deadline = time.monotonic() + _PATIENCE
    while True:
        with reading(where), OpenFolder(where) as folder:
            try:
                result = read(folder)
                if not folder.changed():
                    return result
                refusal = UserError(f"{where}: was written to while it was read; load it again")
            except UserError as error:
                refusal = error
            if time.monotonic() > deadline or not (folder.changed() or folder.disturbed()):
                raise refusal
        time.sleep(0.005)


class OpenFolder:
    """A folder and its files, held open; to be used in a `with` statement.

    path: where it lay, for messages. UserError for a path that is no folder.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = self._real = Path(path)
        self._files: dict[str, int] = {}
        self._states: dict[str, tuple[int, int]] = {}
        self._folder = -1
        try:
            if not any(self._open_all() for _ in range(_TRIES)):
                raise UserError(f"{path}: somebody writes there without a pause")
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> OpenFolder:
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes everything; closing again does nothing."""
        for descriptor in (*self._files.values(), self._folder):
            if descriptor >= 0:
                os.close(descriptor)
        self._files, self._folder = {}, -1

    # --- what is there ------------------------------------------------------------------------------------------------

    def __truediv__(self, name: str) -> Path:
        """Where a file lies, for messages."""
        return self.path / name

    def __contains__(self, name: str) -> bool:
        return name in self.names

    def names_in(self, home: str) -> list[str]:
        """The names of what lies in a folder below, or at the top (""), from the top on."""
        if not home:
            return sorted(self.names)
        try:
            return [f"{home}/{name}" for name in sorted(os.listdir(self.path / home))]
        except (FileNotFoundError, NotADirectoryError):
            raise UserError(f"{self / home} is no folder") from None

    def size(self, name: str) -> int:
        """The bytes of a file. UserError for what is missing or not to be read."""
        if name in self._files:
            return os.fstat(self._files[name]).st_size
        self._check(name)
        return os.stat(name, dir_fd=self._folder).st_size

    def descriptor(self, name: str) -> int:
        """A descriptor of a file, to be read with `os.pread` alone. UserError for what is missing or not to be read."""
        if name not in self._files:
            self._files[name] = self._open(name)
            self._states[name] = _state(self._files[name])
        return self._files[name]

    def reopened(self, name: str) -> str:
        """A path to an opened file, for libraries that open files themselves."""
        return f"/dev/fd/{self.descriptor(name)}"

    def read(self, name: str, most: int = _TEXT) -> bytes:
        """The content of a file. UserError for one of more bytes than `most`."""
        size = self.size(name)
        if size > most:
            raise UserError(f"{self / name}: {size:,} bytes; at most {most:,} are read")
        with reading(self / name):
            return os.pread(self.descriptor(name), size, 0)

    def object(self, name: str, most: int = _TEXT) -> dict[str, Any]:
        """The JSON object in a file. UserError for any other content."""
        return object_in(self.read(name, most), self / name)

    # --- whether it stayed as it was ----------------------------------------------------------------------------------

    def changed(self) -> bool:
        """Whether somebody wrote into an opened file."""
        return any(_state(descriptor) != self._states[name] for name, descriptor in self._files.items())

    def disturbed(self) -> bool:
        """Whether another folder or other files lie there now, or somebody is about to put them there."""
        return not self._is_there() or being_written(self._real)

    def _is_there(self) -> bool:
        """Whether the path still leads to the opened folder, and the names in it to the opened files."""
        try:
            here, there = os.fstat(self._folder), os.stat(self.path)
            names = {name: os.stat(name, dir_fd=self._folder) for name in self._files}
        except OSError:
            return False
        same = os.path.samestat(here, there) and self.names == _names(self._folder)
        return same and all(os.path.samestat(names[name], os.fstat(one)) for name, one in self._files.items())

    # --- opening ------------------------------------------------------------------------------------------------------

    def _open_all(self) -> bool:
        """Opens the folder and the files of a model in it; False if that was not one moment."""
        self.close()
        self._real = resolved(self.path)
        put_back(self._real)
        try:
            self._folder = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except (FileNotFoundError, NotADirectoryError):
            if self.path.is_dir() or is_displaced(self._real):  # it was gone between a writer's two renames
                return False
            raise UserError(f"there is no folder {self.path}") from None
        self.names = _names(self._folder)
        for name in sorted(self.names):
            if name.endswith(_TOGETHER):
                with suppress(UserError):  # is raised when the file is asked for
                    self.descriptor(name)
        return self._is_there()

    def _open(self, name: str) -> int:
        """Opens a regular file, without waiting for the other end of a pipe."""
        self._check(name)
        try:
            descriptor = os.open(name, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=self._folder)
        except FileNotFoundError:
            raise UserError(f"{self / name} is missing") from None
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):  # exchanged since it was looked at
            os.close(descriptor)
            raise UserError(f"{self / name}: no regular file; no other is read")
        return descriptor

    def _check(self, name: str) -> None:
        """UserError for what is missing, no regular file, or leads by a link to where none may lead."""
        try:
            kind = stat.S_IFMT(os.stat(name, dir_fd=self._folder).st_mode)
        except (FileNotFoundError, NotADirectoryError):
            there = name in self.names
            raise UserError(f"{self / name} " + ("is a link that leads nowhere" if there else "is missing")) from None
        except OSError as error:
            if error.errno != errno.ELOOP:
                raise
            raise UserError(f"{self / name} is a link that leads to itself") from None
        if kind != stat.S_IFREG:
            raise UserError(f"{self / name} is {_KINDS.get(kind, 'no file')}; only regular files are read")
        if not self._may_lead(name):
            raise UserError(f"{self / name} is a link out of this folder; put a copy of the file there")

    def _may_lead(self, name: str) -> bool:
        """Whether a name leads to where it may, by links of files or of the folders above them."""
        target, parts = Path(os.path.realpath(self / name)), Path(name).parts
        within = target.is_relative_to(self._real)
        cached = target.parent.name == "blobs" and target.parent.parent.name.startswith("models--")
        return within or cached or target.parts[-len(parts) :] == parts or name.endswith(WEIGHTS)


def _names(folder: int) -> frozenset[str]:
    return frozenset(os.listdir(folder))


def _state(descriptor: int) -> tuple[int, int]:
    found = os.fstat(descriptor)
    return found.st_size, found.st_mtime_ns
