"""The model's shape in one line, parsed and printed.

    5F subllm(0.64: 5F subllm(0.64: 4F) 5F) 5F

A letter stands for a kind of block, and a number before it repeats it. `name(arguments: layers)`, or `name(layers)`, is
a bracket: the named module decides how the layers inside run; `subllm` runs them on the tokens that it keeps. Blanks
may stand anywhere.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field

from longwave.errors import UserError

_TOKEN = re.compile(r"\s*(?:(?P<count>\d+)|(?P<name>[a-z_][a-z_0-9]*)|(?P<letter>[A-Z])|(?P<mark>[(),:])|(?P<bad>\S))")
_MOST_BLOCKS, _DEEPEST = 100_000, 64
_ARGUMENT = re.compile(r"\s*([^\s,:()]+)")
_BODY = re.compile(r"\s*(?:[a-z_]\w*\s*\(|\d*[A-Z](?![^()]*:))")  # the first layer of a body without arguments before


@dataclass(frozen=True)
class Blocks:
    """`count` blocks of the kind `letter`. at: the index of the character in the text where they stand."""

    count: int
    letter: str
    at: int = field(default=0, compare=False)

    def __str__(self) -> str:
        return f"{self.count if self.count > 1 else ''}{self.letter}"


@dataclass(frozen=True)
class Bracketed:
    """A bracket: its name, its arguments as written, the layers inside, and the index of its first character."""

    name: str
    arguments: tuple[str, ...]
    body: Layout
    at: int = field(default=0, compare=False)

    def __str__(self) -> str:
        return f"{self.name}({', '.join(self.arguments)}{': ' if self.arguments else ''}{self.body})"


@dataclass(frozen=True)
class Layout:
    """A sequence of blocks and brackets; each bracket holds the layout of its body."""

    items: tuple[Blocks | Bracketed, ...]

    def __str__(self) -> str:
        return " ".join(map(str, self.items))

    @property
    def depth(self) -> int:
        """The number of blocks, those inside brackets included."""
        return sum(item.count if isinstance(item, Blocks) else item.body.depth for item in self.items)

    def walk(self) -> Iterator[Blocks | Bracketed]:
        """Every block and bracket in the order of the text, a bracket before its body."""
        for item in self.items:
            yield item
            if isinstance(item, Bracketed):
                yield from item.body.walk()


def parse(text: str) -> Layout:
    """Parses a layout; a UserError points at the character that does not fit."""
    parser = _Parser(text)
    layout = parser.layout(inside=False)
    return layout


def check_names(text: str, layout: Layout, letters: Collection[str], brackets: Collection[str]) -> None:
    """Raises a UserError that points at the first letter or bracket name that is not among the known ones."""
    for item in layout.walk():
        if isinstance(item, Blocks) and item.letter not in letters:
            raise pointed(text, item.at, f"no block kind '{item.letter}'; known: {_listed(letters)}")
        if isinstance(item, Bracketed) and item.name not in brackets:
            raise pointed(text, item.at, f"no bracket '{item.name}'; known: {_listed(brackets)}")


def pointed(text: str, at: int, message: str) -> UserError:
    """A UserError of one line that shows the text with the character at index `at` between arrows."""
    shown = f"{text[:at]}>>{text[at : at + 1]}<<{text[at + 1 :]}"
    return UserError(f"layout, character {at + 1}: {message}: {shown!r}")


def _listed(names: Collection[str]) -> str:
    return ", ".join(sorted(names))


class _Parser:
    """A recursive-descent parser of layouts. at: the index of the next character to read."""

    def __init__(self, text: str) -> None:
        self.text, self.at, self.nesting = text, 0, 0

    def layout(self, inside: bool) -> Layout:
        items: list[Blocks | Bracketed] = []
        while True:
            kind, value, at = self._peek()
            if kind == "end" or (inside and value == ")"):
                break
            items.append(self._item())
        if not items:
            raise pointed(self.text, at, "expected a block or a bracket")
        if inside and kind == "end":
            raise pointed(self.text, at, "expected ')' that closes the bracket")
        return Layout(tuple(items))

    def _item(self) -> Blocks | Bracketed:
        kind, value, at = self._take()
        if kind == "letter":
            return Blocks(1, value, at)
        if kind == "count":
            return self._repeated(int(value[:9]), at)
        if kind == "name":
            return self._bracketed(value, at)
        raise pointed(self.text, at, "expected a block letter, a count or a bracket")

    def _repeated(self, count: int, at: int) -> Blocks:
        kind, letter, letter_at = self._take()
        if kind != "letter":
            raise pointed(self.text, letter_at, "expected a block letter after the count")
        if not 1 <= count <= _MOST_BLOCKS:
            raise pointed(self.text, at, f"a count is 1 to {_MOST_BLOCKS}")
        return Blocks(count, letter, letter_at)

    def _bracketed(self, name: str, at: int) -> Bracketed:
        self._expect("(", f"expected '(' after {name}")
        self.nesting += 1
        if self.nesting > _DEEPEST:
            raise pointed(self.text, self.at - 1, f"nested deeper than {_DEEPEST} levels")
        arguments = [] if _BODY.match(self.text, self.at) else self._arguments(name)
        body = self.layout(inside=True)
        self._expect(")", f"expected ')' that closes {name}")
        self.nesting -= 1
        return Bracketed(name, tuple(arguments), body, at)

    def _arguments(self, name: str) -> list[str]:
        arguments = [self._argument(name)]
        while self._peek()[1] == ",":
            self._take()
            arguments.append(self._argument(name))
        self._expect(":", f"expected ',' or ':' after the arguments of {name}")
        return arguments

    def _argument(self, name: str) -> str:
        match = _ARGUMENT.match(self.text, self.at)
        if match is None:
            raise pointed(self.text, self._peek()[2], f"expected an argument of {name}")
        self.at = match.end()
        return match[1]

    def _expect(self, mark: str, message: str) -> None:
        _, value, at = self._peek()
        if value != mark:
            raise pointed(self.text, at, message)
        self._take()

    def _peek(self) -> tuple[str, str, int]:
        match = _TOKEN.match(self.text, self.at)
        if match is None or match.lastgroup is None:
            return "end", "", len(self.text)
        return match.lastgroup, match[match.lastgroup], match.start(match.lastgroup)

    def _take(self) -> tuple[str, str, int]:
        kind, value, at = self._peek()
        self.at = at + len(value)
        return kind, value, at
