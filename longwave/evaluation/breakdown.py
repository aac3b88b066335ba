"""Held-out loss in parts: by how much of its document a prediction sees, and by where the document comes from."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from longwave.data.packed import NO_TARGET, Batch

_BUCKETS = 32  # powers of two, up to more tokens than a sequence can have


def perplexity_of(loss: float) -> float:
    """e to a loss in nats; infinite where no number of double precision is as large."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


@dataclass(frozen=True)
class AtContext:
    """The mean loss of predictions that see `first` to `last` tokens of their document, the newest one included.

    In windows that hold one document this is the position in the window. tokens: number of predictions; loss: nats.
    """

    first: int
    last: int
    tokens: int
    loss: float

    @property
    def perplexity(self) -> float:
        """e to the loss; infinite where no number of double precision is as large."""
        return perplexity_of(self.loss)


@dataclass(frozen=True)
class AtWindow:
    """The loss in windows of so many tokens: the same text, cut to another context length."""

    window: int
    tokens: int
    loss: float

    @property
    def perplexity(self) -> float:
        """e to the loss; infinite where no number of double precision is as large."""
        return perplexity_of(self.loss)


@dataclass(frozen=True)
class OfSource:
    """The mean loss, in nats, on documents of one source. tokens: number of predictions."""

    source: str
    tokens: int
    loss: float


class ByContext:
    """Adds up losses by the number of tokens seen, in buckets 1, 2, 3 to 4, 5 to 8, and so on."""

    def __init__(self) -> None:
        self._losses = torch.zeros(_BUCKETS, dtype=torch.float64)
        self._counts = torch.zeros(_BUCKETS, dtype=torch.int64)
        self._ends = 2 ** torch.arange(_BUCKETS)
        self._longest = 0

    def __call__(self, batch: Batch, losses: Tensor) -> None:
        seen = torch.cat([torch.arange(1, length + 1) for length in batch.runs])
        self._longest = max(self._longest, *batch.runs)
        buckets = torch.bucketize(seen[batch.targets != NO_TARGET], self._ends)
        self._losses.index_add_(0, buckets, losses)
        self._counts += torch.bincount(buckets, minlength=_BUCKETS)

    def found(self) -> tuple[AtContext, ...]:
        """The buckets that hold anything."""
        parts = zip(self._counts.tolist(), self._losses.tolist(), strict=True)
        return tuple(
            AtContext(2**number // 2 + 1, min(2**number, self._longest), count, loss / count)
            for number, (count, loss) in enumerate(parts)
            if count
        )


class BySource:
    """Adds up losses by the source of the document.

    names: of all sources. of_documents: the source of each document of the split, as its place among the names.
    """

    def __init__(self, names: Sequence[str], of_documents: Tensor) -> None:
        self._names, self._of_documents = names, of_documents
        self._losses = torch.zeros(len(names), dtype=torch.float64)
        self._counts = torch.zeros(len(names), dtype=torch.int64)

    def __call__(self, batch: Batch, losses: Tensor) -> None:
        of_runs = self._of_documents[torch.tensor(batch.documents)]
        of_tokens = of_runs.repeat_interleave(torch.tensor(batch.runs))[batch.targets != NO_TARGET]
        self._losses.index_add_(0, of_tokens, losses)
        self._counts += torch.bincount(of_tokens, minlength=len(self._names))

    def found(self) -> tuple[OfSource, ...]:
        """The sources that have predictions, those with the most first."""
        parts = zip(self._names, self._counts.tolist(), self._losses.tolist(), strict=True)
        some = [OfSource(name, count, loss / count) for name, count, loss in parts if count]
        return tuple(sorted(some, key=lambda one: -one.tokens))
