"""Paths without links."""

import errno
import os
from pathlib import Path

from longwave.errors import UserError


def resolved(path: str | os.PathLike[str]) -> Path:
    """Where a path leads when all links are followed, whether anything lies there or not.

    UserError for links that lead nowhere but to each other, for which `Path.resolve` raises a RuntimeError in some
    versions of Python, and which others give back unresolved.
    """
    try:
        os.stat(path)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise UserError(f"{path}: links that lead to each other without an end; give another path") from None
    return Path(os.path.realpath(path))
