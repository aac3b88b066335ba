"""The two kinds of failure a person meets: their own mistake, and the machine's."""

from __future__ import annotations

import reprlib
from collections.abc import Generator
from contextlib import contextmanager


class UserError(ValueError):
    """A mistake the user can mend: one line that names the field, its value and what would do (exit code 2)."""


class MachineError(RuntimeError):
    """A fault of the machine, such as a full disk: one line (exit code 1)."""


def require(condition: bool, message: str) -> None:
    """Raises a UserError unless the condition holds."""
    if not condition:
        raise UserError(message)


@contextmanager
def within(source: object) -> Generator[None]:
    """Puts where values come from, such as the path of a recipe, before the message of a UserError that they cause."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{source}: {error}") from None


def shown(value: object) -> str:
    """A value for an error message, cut to a length that people read."""
    return _SHORT.repr(value)


_SHORT = reprlib.Repr()
_LONGEST = 1000  # characters of a line about an error
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 120


def cut(text: str, length: int = 200) -> str:
    """A text without its middle, if it is longer than people read."""
    half = length // 2
    return text if len(text) <= length else f"{text[:half]} ... {text[-half:]}"


def one_line(problem: object) -> str:
    """A problem as one line that people can read, whatever words and characters of a hostile file it repeats."""
    line = cut(" ".join(str(problem).split()), _LONGEST)
    return "".join(one if one.isprintable() else one.encode("unicode_escape").decode() for one in line)
