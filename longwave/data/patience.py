"""The faults of the `tokenizers` library that Python does not see: an encoding without an end, and a panic.

A pattern (regular expression) of a tokenizer can take the square of a text's length, and nothing within Python stops
it. A command of `longwave` is ended then, in one line; a program that uses longwave as a library is not, since it is
not ours to end. A panic (as of a pattern that tries ten million ways) is no Exception to Python, and becomes one here.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import NoReturn

from longwave.errors import UserError

SECONDS, SECONDS_EACH = 2.0, 10e-6  # of the processor: for any text, and for each character; published ones take 1e-6
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
def sparing_the_process() -> Iterator[None]:
    """While the block runs, no text ends this process: a server outlives what one client sends."""
    global _ends
    before, _ends = _ends, False
    try:
        yield
    finally:
        _ends = before


@contextmanager
def watching(characters: int) -> Iterator[None]:
    """Watches the encoding of a text of so many characters, if this process may be ended; UserError for a panic."""
    done = threading.Event()
    if _ends:
        threading.Thread(target=_watch, args=(characters, done), daemon=True).start()
    try:
        with without_panic():
            yield
    finally:
        done.set()


@contextmanager
def without_panic(where: str = "") -> Iterator[None]:
    """A panic of the library as a UserError. where: what its message begins with."""
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        said = " ".join(str(error).split())
        raise UserError(f"{where}the tokenizers library fails on this tokenizer ({said})") from None


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
