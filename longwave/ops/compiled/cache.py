"""The folder in which builds are kept from one process to the next: the user's own, and every file is checked.

A build is loaded into the process, so whoever can write it can do anything as the user. The folder therefore has to
belong to the user and to be writable by nobody else, and a file's name holds a checksum of its content: one that was
damaged (and would end the process when a missing page is touched) is not loaded, but built anew.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from longwave import files
from longwave.errors import MachineError, UserError


class Unavailable(RuntimeError):
    """The compiled kernels cannot be used; the message says why."""


def folder() -> Path:
    """The cache folder, made if it is not there. Raises Unavailable where it cannot be made, or is not private."""
    path = _caches() / "longwave"
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        path = path.resolve(strict=True)
        found = path.stat()
    except (OSError, RuntimeError) as error:  # RuntimeError: a loop of links
        raise Unavailable(f"{path}: {getattr(error, 'strerror', None) or error}") from None
    if found.st_uid != os.geteuid():
        raise Unavailable(f"{path} belongs to another user: name a folder of your own in XDG_CACHE_HOME")
    if found.st_mode & 0o022:
        raise Unavailable(f"{path} can be written by other users: chmod go-w {path}")
    return path


def find(name: str) -> Path | None:
    """The file that was kept under a name and is as it was then, or None; damaged ones are removed."""
    for path in sorted(folder().glob(f"{name}-*.so")):
        try:
            if path.name == _file_name(name, path.read_bytes()):
                return path
            path.unlink()
        except OSError:
            continue  # another process has removed it, or it cannot be read: it is built anew
    return None


def keep(name: str, content: bytes) -> Path:
    """Keeps a file under a name; it appears whole or not at all."""
    path = folder() / _file_name(name, content)
    try:
        files.write_file(path, content)
    except (MachineError, UserError) as error:
        raise Unavailable(str(error)) from None
    return path


def _file_name(name: str, content: bytes) -> str:
    return f"{name}-{hashlib.sha256(content).hexdigest()[:32]}.so"


def _caches() -> Path:
    home = os.environ.get("XDG_CACHE_HOME")
    if home:
        return Path(home)
    try:
        return Path.home() / ".cache"
    except RuntimeError:
        raise Unavailable("there is no home folder to keep a build in: name one in XDG_CACHE_HOME") from None
