"""Recall tasks as training documents: a plan of what is made, the documents, and which of their tokens are learned.

The answers alone are learned, unless everything is asked for: keys and values are drawn, so that nothing else in such a
text could be. Training windows hold whole documents. No document is one that an evaluation asks, whatever its seed.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import ClassVar

from longwave.data.documents import Document
from longwave.data.encoding import Encoded, Kind, TextEncoder
from longwave.data.marks import Span
from longwave.data.recall.families import family_of
from longwave.data.recall.fitting import sample
from longwave.data.tokenizer import Tokenizer
from longwave.errors import require, shown
from longwave.units import LAST_PLACE, parse_amount, parse_sizes

NAME = "recall"  # the source of `longwave prepare` that stands for these documents
FAMILIES = ("key-value", "multi-key", "copy", "variables")  # by default
MOST_QUESTIONS = 1000  # in a document: no name and no code comes twice
_TRAINING = 1  # the first part of the keys of training samples; those of evaluations have another


@dataclass(frozen=True)
class RecallDocument(Document):
    """A recall task. answers: all of them, with their line ends. spans: the tokens of each; the last ends the text."""

    answers: str
    spans: tuple[Span, ...]


@dataclass(frozen=True)
class RecallPlan:
    """Which recall tasks to make. families: their names. lengths: of whole documents, in tokens. tokens: in all.

    questions: that each document asks in turn, of families that can ask more than one (`Family.asks_many`).
    Every family has about the same number of tokens at each length. Raises UserError for a family that is not known or
    named twice, for lengths that are none, for fewer tokens than a document has, and for questions that are none.
    """

    families: Sequence[str]
    lengths: Sequence[int]
    tokens: int
    seed: int = 0
    questions: int = 1

    def __post_init__(self) -> None:
        for name in self.families:
            family_of(name)
        for field in ("families", "lengths"):
            given = getattr(self, field)
            distinct = 0 < len(given) == len(set(given))
            require(distinct, f"{field} = {','.join(map(str, given))}: name one or more, each once")
        asked = 0 < self.questions <= MOST_QUESTIONS
        require(asked, f"questions = {self.questions}: from 1 to {MOST_QUESTIONS:,} in a document")
        least = 2 * sum(self.lengths) * len(self.families)
        many = f"tokens = {self.tokens:,}: two documents of every family and length have {least:,} tokens together"
        require(least <= self.tokens <= LAST_PLACE, f"{many}; give from {least:,} to {LAST_PLACE:,}")

    @property
    def names(self) -> Iterator[str]:
        """The names of all documents, in order."""
        return (_name(*row) for row in self._rows())

    def documents(self, tokenizer: Tokenizer) -> Iterator[RecallDocument]:
        """The documents, in order."""
        for family, length, number in self._rows():
            key = _TRAINING, self.seed, number
            made = sample(family_of(family), tokenizer, length, None, *key, questions=self.questions)
            name, answers = _name(family, length, number), "".join(made.targets)
            yield RecallDocument(name, made.text, source=family, answers=answers, spans=made.spans)

    def _rows(self) -> Iterator[tuple[str, int, int]]:
        """Family, length and number of each document: next comes what has the fewest tokens so far."""
        kinds = [(0, place, *kind) for place, kind in enumerate(product(self.families, self.lengths))]
        left, numbers = self.tokens, dict.fromkeys(((family, length) for *_, family, length in kinds), 0)
        while left >= kinds[0][-1]:
            had, place, family, length = kinds[0]
            heapq.heapreplace(kinds, (had + length, place, family, length))
            yield family, length, numbers[family, length]
            numbers[family, length] += 1
            left -= length


def _name(family: str, length: int, number: int) -> str:
    return f"{family}-{length}-{number}"


def recall_plan(
    families: str | Sequence[str] | None,
    lengths: int | str | Sequence[int | str] | None,
    tokens: str | float | None,
    seed: int = 0,
    questions: int | None = None,
) -> RecallPlan:
    """A plan from what people write: `key-value,copy` or a list, `512,1k` or a list, and `2.5M`."""
    require(lengths is not None, "lengths: say how many tokens a document has, such as 512, or 256,1k for both")
    require(tokens is not None, "tokens: say how many to make in all, such as 2.5M")
    assert lengths is not None
    names = FAMILIES if families is None else tuple(_parts(families))
    given = [lengths] if isinstance(lengths, int | str) else lengths
    sizes = tuple(size for one in given for size in parse_sizes(str(one)))
    return RecallPlan(names, sizes, int(parse_amount(str(tokens))), seed, 1 if questions is None else questions)


def _parts(families: str | Sequence[str]) -> Iterator[str]:
    for one in [families] if isinstance(families, str) else families:
        require(isinstance(one, str), f"families = {shown(one)}: a name, such as key-value")
        yield from (part.strip() for part in one.split(","))


@dataclass(frozen=True)
class RecallEncoder:
    """Encodes recall tasks as texts of which the answers and the end of the text are learned, or everything."""

    kind: ClassVar[Kind] = "recall"
    tokenizer: Tokenizer
    by_answer: bool = True

    def encode(self, documents: Sequence[RecallDocument]) -> list[list[Encoded]]:
        """One document for each task."""
        texts = TextEncoder(self.tokenizer).encode(documents)
        if not self.by_answer:
            return texts
        pairs = [(document, text.ids) for document, [text] in zip(documents, texts, strict=True)]
        return [[Encoded(ids, _learned(one, len(ids)), len(one.answers.encode()))] for one, ids in pairs]


def _learned(document: RecallDocument, length: int) -> list[Span]:
    """The tokens of the answers, and of what ends the text."""
    *earlier, (start, _) = document.spans
    return [*earlier, (start, length)]
