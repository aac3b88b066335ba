"""From documents to token ids: the interface, and the encoder of plain text (`chat.py` encodes conversations)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol, TypeVar, runtime_checkable

from longwave.data.documents import Document
from longwave.data.marks import Span
from longwave.data.tokenizer import Tokenizer

Kind = Literal["text", "chat", "recall"]
D = TypeVar("D", bound=Document, contravariant=True)


@dataclass(frozen=True)
class Encoded:
    """The ids of a document as they are stored.

    learned: the spans of ids that a model learns to predict, in order; None for all of them.
    bytes: number of UTF-8 bytes of the learned text.
    """

    ids: list[int]
    learned: list[Span] | None
    bytes: int


@runtime_checkable
class Encoder(Protocol[D]):
    """Encodes documents of one kind.

    tokenizer: the tokenizer that gives the ids. by_answer: whether only the assistant's answers are learned.
    """

    kind: ClassVar[Kind]

    @property
    def tokenizer(self) -> Tokenizer: ...

    @property
    def by_answer(self) -> bool: ...

    def encode(self, documents: Sequence[D]) -> list[list[Encoded]]:
        """For each document, in order, the documents to store: one, several, or none."""
        ...


def around(tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """The ids before and after a text that is stored: those that the tokenizer puts there, and eos, if it names one."""
    opening, closing, eos = tokenizer.opening, tokenizer.closing, tokenizer.eos_id
    return opening, closing if eos is None or eos in closing else [*closing, eos]


@dataclass(frozen=True)
class TextEncoder:
    """Encodes a text as its ids between those that the tokenizer puts around a text: bos as a rule, and none for some.

    The text ends with eos, if the tokenizer names one.
    """

    kind: ClassVar[Kind] = "text"
    tokenizer: Tokenizer
    by_answer: bool = False

    def encode(self, documents: Sequence[Document]) -> list[list[Encoded]]:
        """One document for each text."""
        opening, closing = around(self.tokenizer)
        texts = [document.text for document in documents]
        encoded = zip(texts, self.tokenizer.encode_batch(texts), strict=True)
        return [[Encoded(opening + ids + closing, None, len(text.encode()))] for text, ids in encoded]
