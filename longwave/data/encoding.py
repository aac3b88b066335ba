"""Documents to ids: plain text here, conversations in `chat.py`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol, TypeVar, runtime_checkable

from longwave.data.marks import Span
from longwave.data.sources import Document
from longwave.data.tokenizer import Tokenizer

Kind = Literal["text", "chat"]
D = TypeVar("D", bound=Document, contravariant=True)


@dataclass(frozen=True)
class Encoded:
    """A document as it is stored.

    learned: the spans of ids that a model is to predict, in order; None for all of them.
    bytes: UTF-8 bytes of text in what is learned.
    """

    ids: list[int]
    learned: list[Span] | None
    bytes: int


@runtime_checkable
class Encoder(Protocol[D]):
    """What makes ids of documents of one kind.

    tokenizer: whose ids these are. by_answer: whether only answers are learned.
    """

    kind: ClassVar[Kind]

    @property
    def tokenizer(self) -> Tokenizer: ...

    @property
    def by_answer(self) -> bool: ...

    def encode(self, documents: Sequence[D]) -> list[list[Encoded]]:
        """What each document, in order, is stored as: one document, several, or none."""
        ...


@dataclass(frozen=True)
class TextEncoder:
    """bos, the ids of the text, eos, as far as the vocabulary has these two."""

    kind: ClassVar[Kind] = "text"
    tokenizer: Tokenizer
    by_answer: bool = False

    def encode(self, documents: Sequence[Document]) -> list[list[Encoded]]:
        """One document each."""
        opening, closing = ([] if id is None else [id] for id in (self.tokenizer.bos_id, self.tokenizer.eos_id))
        texts = [document.text for document in documents]
        encoded = zip(texts, self.tokenizer.encode_batch(texts), strict=True)
        return [[Encoded(opening + ids + closing, None, len(text.encode()))] for text, ids in encoded]
