"""Prepared data as batches of packed training windows, each addressed by one integer: its position in the data order.

Notable:
- Text is laid end to end and cut every `window` tokens: nothing is padded, and no token is seen twice. A document that
  is cut goes on in the next window as a separate piece, from which attention does not reach back into the first.
- Conversations and recall tasks are never cut where they fit: a window holds as many whole ones as it has room for,
  since an answer without its question teaches nothing.
- The order of an epoch is a keyed permutation that is computed, not stored: resuming needs the position alone, and the
  number of workers changes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from math import isqrt
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from jaxtyping import Int64
from numpy.typing import NDArray
from torch import Tensor

from longwave import draws
from longwave.data.prepared import Split, SplitTokens
from longwave.errors import MachineError, UserError
from longwave.streams import Stream, Windows
from longwave.units import counted

NO_TARGET = -100  # the target that torch's cross-entropy ignores
_ROUNDS = 6  # of the Feistel network; four are enough for a permutation that looks random (Luby and Rackoff 1988)


@dataclass(frozen=True)
class Batch:
    """Training windows laid end to end, without padding.

    targets: the next token; `NO_TARGET` where it is not to be learned, another document starts next, or the split ends.
    runs: number of tokens of each document piece, in order; they add up to T, and no piece crosses a window's border.
    windows: number of tokens of each window; they add up to T.
    samples: each window's position in the data order. documents: the number in the split of each run's document.
    positions: what rotation goes by, where it is not each token's place in its run.
    """

    tokens: Int64[Tensor, " T"]
    targets: Int64[Tensor, " T"]
    runs: tuple[int, ...]
    windows: tuple[int, ...]
    samples: tuple[int, ...]
    documents: tuple[int, ...]
    positions: Int64[Tensor, " T"] | None = None

    def inputs(self, device: torch.device | str) -> tuple[Int64[Tensor, " T"], Int64[Tensor, " T"], Stream]:
        """The arguments of `Decoder.loss`, on a device: tokens, targets and their stream, with the rows that count."""
        stream = Stream.of(self.runs, windows=Windows(self.windows, self.samples), device=device)
        positions = stream.positions if self.positions is None else self.positions.to(device)
        rows = (self.targets != NO_TARGET).nonzero().flatten().to(device)
        return self.tokens.to(device), self.targets.to(device), replace(stream, positions=positions, outputs=rows)

    @property
    def predicted(self) -> int:
        """Number of tokens that have a target."""
        return int((self.targets != NO_TARGET).sum())


@dataclass(frozen=True)
class WindowSampler:
    """The data order: every training window once per epoch, in an order that the seed and the epoch alone decide.

    count: number of windows. A Feistel network permutes the smallest square range [0, side * side) that holds them all;
    a number beyond the last window goes through the network again until it falls on a window (cycle walking: Black and
    Rogaway 2002, "Ciphers with arbitrary finite domains").
    """

    count: int
    seed: int = 0

    def window(self, position: int) -> int:
        """The number of the window, in [0, count), at a position; position `count` is the first of the second epoch."""
        epoch, place = divmod(position, self.count)
        key = draws.key(self.seed, epoch)
        place = self._permuted(place, key)
        while place >= self.count:
            place = self._permuted(place, key)
        return place

    def _permuted(self, place: int, key: int) -> int:
        """One pass through the network: a permutation of [0, side * side)."""
        side = isqrt(self.count - 1) + 1
        left, right = divmod(place, side)
        # Each round adds a keyed hash of one half to the other, which can be undone: so no two places collide.
        for number in range(_ROUNDS):
            left, right = right, (left + draws.key(key, number << 32 | right)) % side
        return left * side + right


@dataclass(frozen=True)
class _EvenCuts:
    """Training windows of one size, which cut documents wherever their borders fall; the last one may be shorter."""

    total: int
    window: int
    count: int
    cut: ClassVar[int] = 0

    @classmethod
    def of(cls, tokens: SplitTokens, window: int, keep_last: bool) -> _EvenCuts:
        total = len(tokens)
        if window < 1 or (window > total and not keep_last):
            raise UserError(f"window = {window}: {tokens.where} takes windows of 1 to {counted(total, 'token')}")
        return cls(total, window, -(-total // window) if keep_last else total // window)

    def bounds(self, number: int) -> tuple[int, int]:
        """Where a window starts and stops in the split."""
        return number * self.window, min((number + 1) * self.window, self.total)


@dataclass(frozen=True)
class _WholeDocuments:
    """Training windows of whole documents, as many as fit, in the order of the split.

    starts, stops: the place in the split at which each window begins, and the place behind its last token.
    cut: number of documents longer than a window, which fill a window with their beginning and lose the rest.
    """

    starts: NDArray[np.int64]
    stops: NDArray[np.int64]
    cut: int

    @classmethod
    def of(cls, tokens: SplitTokens, window: int) -> _WholeDocuments:
        """Raises UserError for a window so short that no document has a token to learn within it."""
        if window < 1:
            raise UserError(f"window = {window}: 1 token or more")
        begun = tokens.starts(0, len(tokens))
        ended = np.append(begun[1:], len(tokens))
        seen = np.minimum(ended, begun + window)
        # A token is predicted at the place before it, so the targets of a document are those from its second token on.
        pairs = ((int(start) + 1, int(stop) + 1) for start, stop in zip(begun, seen, strict=True))
        if not any(tokens.learned(*pair).any() for pair in pairs):
            raise UserError(f"window = {window}: every answer in {tokens.where} begins beyond it; give more")
        firsts = _firsts(begun, ended, window)
        lasts = np.append(firsts[1:], len(begun)) - 1
        return cls(begun[firsts], seen[lasts], int((ended - begun > window).sum()))

    @property
    def count(self) -> int:
        return len(self.starts)

    def bounds(self, number: int) -> tuple[int, int]:
        """Where a window starts and stops in the split."""
        return int(self.starts[number]), int(self.stops[number])


def _firsts(begun: NDArray[np.int64], ended: NDArray[np.int64], window: int) -> NDArray[np.int64]:
    """The number of the first document of each window, from the places where documents begin and end."""
    firsts, first = list[int](), 0
    while first < len(begun):
        firsts.append(first)
        # The next window begins with the first document that ends beyond this one; a document too long stands alone.
        first = max(first + 1, int(np.searchsorted(ended, begun[first] + window, side="right")))
    return np.array(firsts, np.int64)


class PackedTokens:
    """The windows of one split of prepared data, for training or evaluation; len() is their number.

    window: number of tokens of a window; the most that one may hold, where none is cut.
    keep_last: whether the last, shorter window of a text is kept (for evaluation) or dropped (for training).
    Raises UserError for a folder that is not a prepared one or is damaged, for a window longer than a split of text,
    and for a window too short for any conversation.
    """

    def __init__(self, folder: str | Path, split: Split, window: int, *, keep_last: bool = False):
        self._tokens = SplitTokens(folder, split)
        if len(self._tokens) == 0:
            raise UserError(f"{self._tokens.where}: holds no tokens; prepare the data with held_out greater than 0")
        if self._tokens.info.kind != "text":
            self._cuts = _WholeDocuments.of(self._tokens, window)
        else:
            self._cuts = _EvenCuts.of(self._tokens, window, keep_last)
        self._window = window

    def __len__(self) -> int:
        return self._cuts.count

    def notes(self) -> list[str]:
        """Warnings for the user about data that no window shows."""
        cut = f"{counted(self._cuts.cut, 'document')} longer than a window of {counted(self._window, 'token')}"
        return [f"{self._tokens.where}: {cut}: the end is lost"] if self._cuts.cut else []

    @property
    def source_names(self) -> list[str]:
        """The names of sources; none in folders that were written before they were kept."""
        return self._tokens.info.sources

    def sources(self) -> Int64[Tensor, " documents"]:
        """The source of each document of the split, as its place in `source_names`."""
        return torch.from_numpy(self._tokens.sources).long()

    def batch(self, positions: Sequence[int], sampler: WindowSampler | None = None) -> Batch:
        """The windows at the given positions of the data order; without a sampler, the windows with these numbers.

        Raises IndexError for a window that the split does not have; MachineError for an id beyond the vocabulary, as
        data have that were damaged since they were opened.
        """
        numbers = positions if sampler is None else [sampler.window(position) for position in positions]
        bounds = [self._bounds(number) for number in numbers]
        sizes = [stop - start for start, stop in bounds]
        tokens, targets = np.empty((2, sum(sizes)), np.int64)
        runs, documents = list[int](), list[int]()
        row = 0  # of the batch, where the next window begins
        for (start, stop), size in zip(bounds, sizes, strict=True):
            pieces = self._fill(tokens[row : row + size], targets[row : row + size], start, stop)
            first = self._tokens.document_at(start)
            runs += pieces
            documents += range(first, first + len(pieces))  # every border but the window's own begins a document
            row += size
        self._require_ids(tokens)
        laid = torch.from_numpy(tokens), torch.from_numpy(targets)
        return Batch(*laid, tuple(runs), tuple(sizes), tuple(positions), tuple(documents))

    def _require_ids(self, tokens: NDArray[np.int64]) -> None:
        largest, entries = int(tokens.max(initial=0)), self._tokens.info.vocab_size
        if largest >= entries:
            raise MachineError(f"{self._tokens.where}: damaged: it has a token id {largest}, beyond {entries - 1}")

    def _bounds(self, number: int) -> tuple[int, int]:
        if not 0 <= number < len(self):
            raise IndexError(f"window {number}: {self._tokens.where} has {len(self)}")
        return self._cuts.bounds(number)

    def _fill(self, tokens: NDArray[np.int64], targets: NDArray[np.int64], start: int, stop: int) -> list[int]:
        """Writes the tokens and targets of one window; returns the lengths of its document pieces."""
        ahead = self._tokens.read(start, stop + 1)  # a token more than the window holds: the target of its last one
        tokens[:] = ahead[: stop - start]
        targets[: len(ahead) - 1] = ahead[1:]
        targets[len(ahead) - 1 :] = NO_TARGET  # nothing follows, if the split ends with this window
        targets[~self._tokens.learned(start + 1, stop + 1)] = NO_TARGET
        begun = self._tokens.starts(start + 1, stop + 1) - start
        targets[begun - 1] = NO_TARGET  # the last token of a document does not predict the next document's first
        # A border where a document begins; the first run of a window may be the rest of a document.
        borders = [0, *(place for place in begun.tolist() if place < stop - start), stop - start]
        return [end - begin for begin, end in pairwise(borders)]
