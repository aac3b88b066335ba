"""A store other than longwave's: every sequence has tensors of its own, which are put together for a step.

For states that grow and forget nothing. Slow, but what a paged store or another server's would have to do as well.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from copy import copy
from typing import Any

import torch
from torch import Tensor

from longwave.states import StateSpec
from longwave.streams import Located, Places, Stream


class ListStore:
    """See `longwave.states.Store`. held: of every row, the entries (G, n, K) of each array of each part."""

    def __init__(self, specs: Mapping[str, StateSpec], rows: int, *, dtype: torch.dtype, device: torch.device) -> None:
        self.specs, self.window, self.dtype, self.device = dict(specs), None, dtype, device
        self.rows: list[dict[tuple[str, str], Tensor]] = []
        self.step: ListMemory | None = None  # that of the first part which asked
        self.extend(rows)

    def begin(self) -> None:
        self.step = None

    def memory(self, part: str, stream: Stream) -> ListMemory:
        if self.step is None or self.step.runs is not stream.runs:
            self.step = ListMemory(self, part, stream)
        return self.step.of(part)

    def close(self, undone: Collection[int] = ()) -> None:
        if self.step is not None:
            for row, entries in zip(self.step.rows, self.step.after, strict=True):
                self.rows[row] = self.rows[row] if row in undone else entries

    def length(self, row: int) -> int:
        return next(iter(self.rows[row].values())).shape[1]

    held = length

    def kept_before(self, row: int, place: int) -> int:
        part, name = next((part, spec.places) for part, spec in self.specs.items() if spec.places is not None)
        return int((self.rows[row][part, name] < place).sum())

    def view(self, part: str, name: str, row: int) -> Tensor:
        return self.rows[row][part, name]

    def check_truncation(self, row: int, length: int) -> None:
        if not 0 <= length <= self.length(row):
            raise ValueError(f"length {length} is outside the {self.length(row)} tokens remembered")

    def truncate(self, row: int, length: int) -> None:
        self.rows[row] = {name: entries[:, :length] for name, entries in self.rows[row].items()}

    def hold(self, row: int) -> None:
        pass

    def clear(self, row: int) -> None:
        self.truncate(row, 0)

    def copy(self, pairs: Sequence[tuple[int, int]]) -> None:
        for source, target in pairs:
            self.rows[target] = dict(self.rows[source])

    def extend(self, rows: int) -> None:
        arrays = {(part, name): one for part, spec in self.specs.items() for name, one in spec.per_token.items()}
        while len(self.rows) < rows:
            self.rows.append(
                {
                    name: torch.empty(one.heads, 0, one.size, dtype=one.dtype or self.dtype)
                    for name, one in arrays.items()
                }
            )

    def reserve(self, tokens: Mapping[int, int]) -> None:
        pass

    def save(self, row: int) -> None:
        return None

    def load(self, row: int, saved: Any, length: int) -> None:
        self.truncate(row, length)

    def used_bytes(self, row: int) -> int:
        return sum(entries.nbytes for entries in self.rows[row].values())

    def reserved_bytes(self, row: int | None = None) -> int:
        return sum(self.used_bytes(one) for one in (range(len(self.rows)) if row is None else [row]))


class ListMemory:
    """See `longwave.states.Memory`. after: what every run's row holds once the step is closed."""

    def __init__(self, store: ListStore, part: str, stream: Stream) -> None:
        assert stream.continued is not None
        rows = stream.continued.rows
        self.part, self.runs, self.rows = part, stream.runs, rows
        self.after = [dict(store.rows[row]) for row in rows]
        before = torch.tensor([store.length(row) for row in rows], dtype=torch.int64)
        ends = (before + self.runs.sizes).cumsum(0)
        self.places, self.fresh = Places(ends - before - self.runs.sizes, ends), before == 0

    def of(self, part: str) -> ListMemory:
        """The same step, for another part."""
        other = copy(self)
        other.part = part
        return other

    def append(self, **entries: Tensor) -> tuple[Tensor, ...]:
        return tuple([self._append((self.part, name), new.transpose(0, 1)) for name, new in entries.items()])

    def _append(self, name: tuple[str, str], new: Tensor) -> Tensor:
        for held, piece in zip(self.after, new.split(self.runs.lengths, 1), strict=True):
            held[name] = torch.cat([held[name], piece.to(held[name])], 1)
        return torch.cat([held[name] for held in self.after], 1)

    def sum_up(self, name: str, of: str, make: Callable[[Tensor], Tensor]) -> tuple[Tensor, Located]:
        raise NotImplementedError

    def recall(self, name: str) -> Tensor:
        raise NotImplementedError

    def replace(self, **arrays: Tensor) -> None:
        raise NotImplementedError
