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

from longwave.errors import UserError, cut, require

_TOKEN = re.compile(r"\s*(?:(?P<count>\d+)|(?P<name>[a-z_][a-z_0-9]*)|(?P<letter>[A-Z])|(?P<mark>[(),:])|(?P<bad>\S))")
MOST_BLOCKS = 1024  # of a whole model; the deepest that has been published, DeepNet (2022), has 1,000
_DEEPEST, _LONGEST = 64, 1 << 16
_AROUND = 80  # characters of a layout that are shown on either side of a mistake
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
    require(len(text) <= _LONGEST, f"layout: {len(text):,} characters; at most {_LONGEST:,}")
    return _Parser(text).layout(inside=False)


def check_names(text: str, layout: Layout, letters: Collection[str], brackets: Collection[str]) -> None:
    """Raises a UserError that points at the first letter or bracket name that is not among the known ones."""
    for item in layout.walk():
        if isinstance(item, Blocks) and item.letter not in letters:
            raise pointed(text, item.at, f"no block kind '{item.letter}'; known: {_listed(letters)}")
        if isinstance(item, Bracketed) and item.name not in brackets:
            raise pointed(text, item.at, f"no bracket '{item.name}'; known: {_listed(brackets)}")


def pointed(text: str, at: int, message: str) -> UserError:
    """A UserError of one line that shows the text with the character at index `at` between arrows."""
    before, after = text[max(0, at - _AROUND) : at], text[at + 1 : at + 1 + _AROUND]
    shown = f"{'...' if at > _AROUND else ''}{before}>>{text[at : at + 1]}<<{after}"
    shown += "..." if at + 1 + _AROUND < len(text) else ""
    return UserError(f"layout, character {at + 1}: {cut(message)}: {shown!r}")


def _listed(names: Collection[str]) -> str:
    return ", ".join(sorted(names))


class _Parser:
    """A recursive-descent parser of layouts.

    at: the index of the next character to read. nesting: brackets that are open there. blocks: blocks so far.
    """

    def __init__(self, text: str) -> None:
        self.text, self.at, self.nesting, self.blocks = text, 0, 0, 0

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
            return self._counted(1, value, at, at)
        if kind == "count":
            return self._repeated(value, at)
        if kind == "name":
            return self._bracketed(value, at)
        raise pointed(self.text, at, "expected a block letter, a count or a bracket")

    def _repeated(self, digits: str, at: int) -> Blocks:
        kind, letter, letter_at = self._take()
        if kind != "letter":
            raise pointed(self.text, letter_at, "expected a block letter after the count")
        count = int(digits.lstrip("0")[:9] or 0)  # more digits are too many, whatever they are
        return self._counted(count, letter, at, letter_at)

    def _counted(self, count: int, letter: str, at: int, letter_at: int) -> Blocks:
        """The blocks of a letter, if a model may have as many more."""
        if not 1 <= count <= MOST_BLOCKS:
            raise pointed(self.text, at, f"a count is 1 to {MOST_BLOCKS}")
        self.blocks += count
        if self.blocks > MOST_BLOCKS:
            raise pointed(self.text, at, f"more than {MOST_BLOCKS} blocks in all")
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
