"""Special tokens in rendered conversations: those that a chat template writes, and none that a message says.

A rendered conversation may hold `<|eos|>` twice: written by the template, where it is a token, and said in a message,
where it is text. Once rendered the two look alike. So the template is changed to write marks instead, names that no
text can hold (`hiding.py`), and the tokenizer knows only the marks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from longwave.data.hiding import any_of, mark_of
from longwave.data.tokenizer import Tokenizer

Span = tuple[int, int]


class Marked(NamedTuple):
    """The ids of a text, and the character at which each token starts, ascending."""

    ids: list[int]
    starts: list[int]


class Marks:
    """The marks of one tokenizer's special tokens.

    names: the mark of each, by its name.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.names = {name: mark_of(id) for id, name in tokenizer.special_tokens.items()}
        marks = self.names.values()
        self._special, self._marks = any_of(self.names), any_of(marks)
        self._tokens = any_of([*marks, *tokenizer.plain_added_tokens])

    @property
    def pattern(self) -> str:
        """The regular expression that finds the names of special tokens."""
        return self._special.pattern

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
        """The ids of texts in which marks, and only marks, become special tokens. Raises UserError like `Tokenizer`."""
        encodings = self._tokenizer.encode_marked(texts)
        return [Marked(one.ids, [start for start, _ in one.offsets]) for one in encodings]
