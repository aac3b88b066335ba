"""Drafts of the next tokens of a text: in a row, or on several paths of a tree."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from longwave.trees import chain


class Drafts(NamedTuple):
    """Drafted tokens. parents: the number of the draft, before it in the list, that each follows; -1 for the text."""

    tokens: tuple[int, ...] = ()
    parents: tuple[int, ...] = ()

    @classmethod
    def of(cls, tokens: Sequence[int]) -> Drafts:
        """Tokens that follow each other."""
        return cls(tuple(tokens), chain(len(tokens)))

    @property
    def branch(self) -> bool:
        """Whether they are on more than one path."""
        return self.parents != chain(len(self.parents))

    def after(self, number: int, token: int) -> int | None:
        """The number of the draft of a token behind another draft, or behind the text (-1); None if there is none."""
        pairs = enumerate(zip(self.parents, self.tokens, strict=True))
        return next((one for one, pair in pairs if pair == (number, token)), None)
