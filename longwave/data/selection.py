"""Which documents are prepared: by their length in tokens, and of every source up to its share of a number of tokens.

Long documents become more frequent, and sources keep their shares, when short documents are kept with a small
probability and each source is filled up to its share again (per-source length upsampling: Fu et al. 2024, "Data
Engineering for Scaling Language Models to 128K Context", arXiv 2402.10171). Without a number of tokens all that the
lengths let through is taken, which favours sources of long documents (the paper's global upsampling).

Every document has a draw of its own, by its name: the same documents and seed always give the same choice, and what a
budget cuts off is a random part of a source, not its end.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from pydantic import ConfigDict

from longwave.errors import require, shown
from longwave.units import parse_sizes

_BUCKETS = 4096  # of draws: how finely a source is cut off at its budget before it is filled up in order
_RANGE = re.compile(r"\s*(\w+)\s*-\s*(\w*)\s*(?::(.*))?")


@dataclass(frozen=True)
class Lengths:
    """Documents of `first` to below `stop` tokens, bos and eos included, are kept with this probability."""

    first: int
    stop: float
    probability: float

    def __contains__(self, tokens: int) -> bool:
        return self.first <= tokens < self.stop


def parse_keep(text: str) -> tuple[Lengths, ...]:
    """Ranges of lengths such as `0-4k:0.1,4k-`: short documents with a probability of 0.1, all long ones.

    Without a probability all documents of a range are kept; those of no range are left out. UserError for text that
    does not read so, and for ranges that overlap.
    """
    kept = sorted((_lengths(part, text) for part in text.split(",")), key=lambda one: one.first)
    apart = all(one.stop <= other.first for one, other in pairwise(kept))
    require(apart, f"keep = {shown(text)}: ranges overlap; let each begin where the one before it ends")
    return tuple(kept)


def _lengths(part: str, text: str) -> Lengths:
    problem = f"keep = {shown(text)}: lengths in tokens with a probability above 0 up to 1, such as 0-4k:0.1,4k-"
    found = _RANGE.fullmatch(part)
    require(found is not None, problem)
    assert found is not None
    first, last, probability = found.groups()
    begin = 0 if not first.strip("0") else parse_sizes(first)[0]
    stop = parse_sizes(last)[0] if last else math.inf
    try:
        chance = 1.0 if probability is None else float(probability)
    except ValueError:
        chance = math.nan
    require(begin < stop and 0 < chance <= 1, problem)
    return Lengths(begin, stop, chance)


@dataclass(frozen=True)
class Selection:
    """Which documents to take. keep: by length; all, if it is empty. tokens: of training in all. seed: of the draws."""

    keep: tuple[Lengths, ...] = ()
    tokens: int | None = None
    seed: int = 0

    @property
    def takes_all(self) -> bool:
        """Whether nothing is left out."""
        return not self.keep and self.tokens is None

    def place(self, name: str, tokens: int) -> float | None:
        """Where a document stands among the kept ones, uniform in [0, 1); None for one that its length leaves out."""
        chance = next((one.probability for one in self.keep if tokens in one), 0.0) if self.keep else 1.0
        digest = hashlib.blake2b(f"{self.seed}\0keep\0{name}".encode("utf-8", "surrogateescape"), digest_size=8)
        draw = (int.from_bytes(digest.digest(), "little") >> 11) * 2.0**-53
        return draw / chance if draw < chance else None


@dataclass
class SourceShare:
    """What was taken of a source for training.

    documents, tokens: taken. of_documents, of_tokens: there were. wanted: its share of the tokens that were asked for,
    if any were; what is taken ends with the document that reaches it, and is less where the source runs out.
    """

    __pydantic_config__ = ConfigDict(extra="forbid", strict=True)

    name: str
    documents: int = 0
    tokens: int = 0
    of_documents: int = 0
    of_tokens: int = 0
    wanted: int | None = None

    @property
    def missing(self) -> int:
        """Tokens that the source has too few of."""
        return 0 if self.wanted is None else max(0, self.wanted - self.tokens)


class Counts:
    """The training tokens of every source, and those of the documents that lengths let through, by their places."""

    def __init__(self, selection: Selection) -> None:
        self._selection = selection
        self.tokens = dict[int, int]()
        self._kept = dict[int, NDArray[np.int64]]()

    def add(self, source: int, name: str, tokens: int) -> None:
        """Counts a document."""
        self.tokens[source] = self.tokens.get(source, 0) + tokens
        if (place := self._selection.place(name, tokens)) is not None:
            kept = self._kept.setdefault(source, np.zeros(_BUCKETS, np.int64))
            kept[int(place * _BUCKETS)] += tokens

    def budgets(self) -> dict[int, _Budget]:
        """The budget of every source: the tokens asked for, in the ratio of what there is."""
        wanted, total = self._selection.tokens or 0, sum(self.tokens.values())
        return {source: self._budget(source, wanted * tokens // total) for source, tokens in self.tokens.items()}

    def _budget(self, source: int, wanted: int) -> _Budget:
        below = np.cumsum(self._kept.get(source, np.zeros(_BUCKETS, np.int64)))
        last = int(np.searchsorted(below, min(wanted, int(below[-1])), side="right"))
        return _Budget(wanted, last, wanted - (int(below[last - 1]) if last else 0))


@dataclass
class _Budget:
    """The tokens of a source: all documents in buckets before `last`, and of those in it the first, up to `left`."""

    wanted: int
    last: int
    left: int

    def takes(self, place: float, tokens: int) -> bool:
        bucket = int(place * _BUCKETS)
        if bucket == self.last and self.left > 0:
            self.left -= tokens
            return True
        return bucket < self.last


class Chooser:
    """Decides for each document whether it is taken, and keeps account of it. counts: if tokens are asked for."""

    def __init__(self, selection: Selection, counts: Counts | None = None) -> None:
        self._selection = selection
        self._budgets = {} if counts is None else counts.budgets()
        self._shares = dict[int, SourceShare]()

    def takes(self, source: int, name: str, tokens: int, held_out: bool) -> bool:
        """Whether a document is taken. Budgets are of training; held-out documents are chosen by length alone."""
        place = self._selection.place(name, tokens)
        if held_out:
            return place is not None
        budget = self._budgets.get(source)
        taken = place is not None and (budget is None or budget.takes(place, tokens))
        share = self._shares.setdefault(source, SourceShare("", wanted=None if budget is None else budget.wanted))
        share.of_documents += 1
        share.of_tokens += tokens
        share.documents += taken
        share.tokens += tokens * taken
        return taken

    def shares(self, names: Iterable[str]) -> list[SourceShare]:
        """The account of every source, by their names in the order of their numbers; none where all was taken."""
        if self._selection.takes_all:
            return []
        for number, name in enumerate(names):
            if number in self._shares:
                self._shares[number].name = name
        return [self._shares[number] for number in sorted(self._shares)]
