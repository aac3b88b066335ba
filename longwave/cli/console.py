"""The standard streams of a command, which may be closed, full, broken, or in an encoding that lacks what is written.

- A stream that was closed (`>&-`) is the null device; otherwise the next file that is opened would take its number.
- A character that the console's encoding lacks is written as an escape.
- Nothing fails because progress or an error could not be written to stderr: the work goes on without readers.
- What cannot be written to stdout is an OSError where it is written, and is not tried again when Python ends.
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO, cast


@contextmanager
def standard_streams() -> Iterator[None]:
    """While the block runs, the standard streams can be used whatever they are."""
    _reopen_closed()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    stderr = sys.stderr
    sys.stderr = cast(TextIO, _Unfailing(stderr))
    try:
        yield
    finally:
        sys.stderr = stderr
        _settle(sys.stdout)
        _settle(sys.stderr)


class _Unfailing:
    """A text stream whose writes never fail; what cannot be written is lost."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with suppress(OSError, ValueError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError, ValueError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _reopen_closed() -> None:
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            number = os.open(os.devnull, os.O_RDWR)  # the lowest that is free: the one that was closed
            setattr(sys, name, os.fdopen(number, mode, encoding="utf-8"))


def _settle(stream: Any) -> None:
    """Writes what is left to be written, or lets it go: Python would try again at its end, and complain."""
    try:
        stream.flush()
    except (OSError, ValueError):
        with suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
