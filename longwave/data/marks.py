"""Marks: stand-ins for special tokens that a chat template can write and no message can.

A rendered conversation may hold `<|eos|>` twice: written by the template, where it is a token, and said in a message,
where it is text. Once rendered the two look alike. So the template is changed to write marks instead (a number drawn in
this process, between private-use characters), and encoding uses a copy of the tokenizer that knows only the marks.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from tokenizers import AddedToken

from longwave.data.tokenizer import Tokenizer, not_unicode

Span = tuple[int, int]
_DRAW = secrets.randbits(64)  # a new one in each process, so that no text can be written to hold a mark


class Marked(NamedTuple):
    """The ids of a text, and the character at which each token starts, ascending."""

    ids: list[int]
    starts: list[int]


class Marks:
    """The marks of one tokenizer's special tokens."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        twin = tokenizer.twin()
        added = twin.get_added_tokens_decoder()
        special = {token.content: f"\ue000{_DRAW}.{id}\ue001" for id, token in added.items() if token.special}
        twin.encode_special_tokens = True  # encodes the names of special tokens as text
        twin.add_tokens([_twin_of(token, special[token.content]) for token in added.values() if token.special])
        self._twin, self._mark_of = twin, special
        ids = {token.content: id for id, token in added.items()}
        self._id_of_mark = {twin.token_to_id(mark): ids[token] for token, mark in special.items()}
        self._special, self._marks = _any_of(special), _any_of(special.values())
        self._tokens = _any_of([*special.values(), *(one.content for one in added.values() if not one.special)])

    def mark(self, text: str) -> str:
        """The text with a mark in place of the name of every special token."""
        return self._special.sub(lambda found: self._mark_of[found[0]], text)

    def unmark(self, text: str) -> str:
        """The text without marks."""
        return self._marks.sub("", text)

    def unmarked(self, text: str) -> set[str]:
        """The special tokens whose names stand in the text, unmarked."""
        return set(self._special.findall(text))

    def closing(self, text: str, start: int) -> list[Span]:
        """The spans of the added tokens, special or not, that end the text after `start`, with only blanks between."""
        spans, place = list[Span](), len(text)
        for found in reversed(list(self._tokens.finditer(text, start))):
            if text[found.end() : place].strip():
                break
            spans.append(found.span())
            place = found.start()
        return spans[::-1]

    def encode(self, texts: Sequence[str]) -> list[Marked]:
        """The ids of texts in which marks, and only marks, become special tokens.

        Raises UserError for a text that is not valid Unicode.
        """
        try:
            encodings = self._twin.encode_batch(list(texts), add_special_tokens=False)
        except TypeError as error:
            raise not_unicode() from error
        return [
            Marked([self._id_of_mark.get(id, id) for id in one.ids], [start for start, _ in one.offsets])
            for one in encodings
        ]


def _twin_of(token: AddedToken, mark: str) -> AddedToken:
    """The token of a mark: not special, so that `encode_special_tokens` spares it; otherwise like the original."""
    flags = {"single_word": token.single_word, "lstrip": token.lstrip, "rstrip": token.rstrip}
    return AddedToken(mark, special=False, normalized=False, **flags)


def _any_of(texts: Iterable[str]) -> re.Pattern[str]:
    """A pattern that finds the longest of the texts at each place; it finds nothing where there are no texts."""
    longest_first = sorted(texts, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
