"""Text that people give in a file or through stdin: UTF-8, without a byte order mark, its line ends as they are."""

from __future__ import annotations

import sys
from pathlib import Path

from longwave.errors import UserError

_MOST_BYTES = 256 << 20


def read_text(path: str, name: str, instead: str = "give a text file") -> str:
    """The text of a file, or of stdin for `-`.

    name: what an error calls it. instead: what an error says would do. UserError for a file that cannot be read, is not
    UTF-8, or is larger than 256 MiB.
    """
    try:
        raw = _stdin() if path == "-" else _file(path)
    except (OSError, ValueError) as error:
        problem = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise UserError(f"{name}: {problem.lower()}; {instead}") from None
    if len(raw) > _MOST_BYTES:
        raise UserError(f"{name}: more than {_MOST_BYTES >> 20} MiB of text; give less at a time")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise UserError(f"{name}: not UTF-8 text") from None


def _file(path: str) -> bytes:
    with Path(path).open("rb") as file:
        return file.read(_MOST_BYTES + 1)


def _stdin() -> bytes:
    return sys.stdin.buffer.read(_MOST_BYTES + 1)
