"""An end for a text that a tokenizer's pattern does not come to an end with.

A pattern (regular expression) of a tokenizer can take time that grows with the square of a text, or without end, and
nothing within Python stops it. A command of `longwave` is ended then, in one line; a program that uses longwave as a
library is not, since it is not ours to end.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import NoReturn

SECONDS, SECONDS_EACH = 3.0, 20e-6  # of the processor: for any text, and for each character; published ones take 1e-6
EXIT_CODE = 2
_OFTEN = 0.2  # seconds between two looks
_ends = False


@contextmanager
def ending_the_process() -> Iterator[None]:
    """While the block runs, a text that takes too long ends this process, after one line on stderr."""
    global _ends
    before, _ends = _ends, True
    try:
        yield
    finally:
        _ends = before


@contextmanager
def watching(characters: int) -> Iterator[None]:
    """Watches the encoding of a text of so many characters, if this process may be ended."""
    if not _ends:
        yield
        return
    done = threading.Event()
    threading.Thread(target=_watch, args=(characters, done), daemon=True).start()
    try:
        yield
    finally:
        done.set()


def _watch(characters: int, done: threading.Event) -> None:
    limit = SECONDS + SECONDS_EACH * characters
    begin = time.process_time()
    while not done.wait(_OFTEN):
        if time.process_time() - begin > limit and not done.is_set():
            _end(f"text: this tokenizer takes more than {limit:.0f} s for {characters:,} characters; use another one")


def _end(line: str) -> NoReturn:
    with suppress(OSError, ValueError):
        sys.stdout.flush()
    with suppress(OSError, ValueError):
        print(f"longwave: {line}", file=sys.stderr, flush=True)
    os._exit(EXIT_CODE)
