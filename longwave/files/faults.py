"""Faults of the machine, such as a full disk, as one line instead of a traceback."""

import errno
import os
import re
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from longwave.errors import MachineError

_MACHINE_FAULTS = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO),
    *(errno.EBUSY, errno.EXDEV, errno.EMFILE, errno.ENFILE, errno.ENAMETOOLONG),
}


@contextmanager
def faults(doing: str, outcome: str) -> Iterator[None]:
    """Turn a fault of the machine into a MachineError of one line; any other exception passes as it is.

    doing: the work that failed, as "saving runs/a". outcome: the state it leaves, as "nothing was changed".
    """
    try:
        yield
    except Exception as error:
        reason = _machine_fault(error)
        if reason is None:
            raise
        raise MachineError(f"{doing} failed: {reason}; {outcome}") from error


def reading(path: Path) -> AbstractContextManager[None]:
    """Turn a fault of the machine while `path` is read into a MachineError."""
    return faults(f"reading {path}", "nothing was changed")


def _machine_fault(error: Exception) -> str | None:
    """The system's words for the fault, or None if `error` is not the machine's fault.

    safetensors is written in Rust and raises no OSError; its message ends in "(os error 28)".
    """
    rust = re.search(r"\(os error (\d+)\)", str(error))
    code = error.errno if isinstance(error, OSError) else int(rust[1]) if rust else None
    if code is None or code not in _MACHINE_FAULTS:
        return None
    where = getattr(error, "filename", None)
    return os.strerror(code) + (f" ({where})" if where else "")
