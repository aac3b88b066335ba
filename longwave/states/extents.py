"""Contiguous head-major arrays that grow: where longwave keeps a state unless another store is asked for.

An array (heads, N, size) holds the entries of all sequences; a sequence has an extent of it, contiguous for each head.
Arrays grow by being laid out anew, one after the other, with half as much again for every sequence.

Legend: `G` heads of an entry, `K` its size, `N` entries of an array.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate

import torch
from torch import Tensor

from longwave.states.rows import Name, Row, Rows, Step
from longwave.states.spec import StateSpec
from longwave.streams import Located, Places, Stream

_SMALLEST = 64  # tokens that an extent has room for, if for any


@dataclass
class _Extent(Row):
    """The figures of one sequence, and where it lies. capacity: tokens that its extent has room for.

    begin: where the entries of its tokens begin; begins: those of each array.
    """

    capacity: int = 0
    begin: int = 0
    begins: dict[Name, int] = field(default_factory=dict)

    def like(self, other: _Extent) -> _Extent:
        """The figures of another sequence in this extent."""
        return replace(other, summed=dict(other.summed), capacity=self.capacity, begin=self.begin, begins=self.begins)


@dataclass(frozen=True)
class Saved:
    """A copy of what one row remembers: the row's figures, and those arrays that truncation could not bring back."""

    row: _Extent
    arrays: Mapping[Name, Tensor]


class Extents(Rows[_Extent]):
    """The memory of parts that grow alike, in extents (see `states.rows.Rows`)."""

    def __init__(self, specs: Mapping[str, StateSpec], rows: int, *, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(specs, dtype=dtype, device=device)
        self.extend(rows)
        self.begin()

    # --- one step -----------------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """Ready for a step; one that was begun and not closed has not happened."""
        self._step = None
        self._upload()

    def close(self, undone: Collection[int] = ()) -> None:
        """Counts the tokens of the step as remembered, and puts its recurrent states in place of the former ones."""
        if (step := self._step) is not None:
            super().close(undone)
            self._counts = self._counts.index_add(1, step.index, step.runs.sizes.expand(2, -1))
            self._stale |= bool(undone)

    def _open(self, stream: Stream) -> Step:
        assert stream.continued is not None, "the stream comes from state.stream(...)"
        self._upload()
        rows, index = stream.continued.rows, stream.continued.index
        table, lengths = [self._rows[row] for row in rows], stream.runs.lengths
        if self._arrays:
            largest = 4 * _SMALLEST if self.window else 1 << 62  # beyond it a window may give its extent back
            tight = [
                (row, count)
                for row, one, count in zip(rows, table, lengths, strict=True)
                if one.length - one.start + count > one.capacity or one.capacity > largest
            ]
            self._make_room(tight)
        spans = [(one.begin, one.begin + one.length - one.start + n) for one, n in zip(table, lengths, strict=True)]
        before, counted = self._counts.index_select(1, index)
        places = Places(self._firsts.index_select(0, index), before + stream.runs.sizes, spans)
        return Step(stream.runs, rows, index, places, counted)

    def _located(self, name: Name, one: _Extent, begin: int, end: int) -> slice:
        return slice(one.begins[name] + begin, one.begins[name] + end)

    def _located_in(self, name: Name, step: Step, counts: Sequence[int]) -> Located:
        begins = [self._rows[row].begins[name] for row in step.rows]
        return Located([(begin, begin + n) for begin, n in zip(begins, counts, strict=True)])

    def _changed(self, row: int) -> None:
        self._stale = True

    # --- room ---------------------------------------------------------------------------------------------------------

    def _make_room(self, new: Sequence[tuple[int, int]]) -> None:
        """Room for more tokens in some rows (row, tokens): by forgetting what no window sees, or by growing."""
        window, grown = self.window or 0, dict[int, int]()
        for row, count in new:
            one = self._rows[row]
            idle = self._forgettable(one)
            needed = max(window, one.held - idle) + count
            too_large = bool(window) and one.capacity > 4 * max(_SMALLEST, needed)  # a long prefill has left it so
            if one.held + count <= one.capacity and not too_large:
                continue
            if idle:
                self._forget(one, idle)
            if too_large:
                grown[row] = max(_SMALLEST, one.held + count + window)
            elif one.held + count + window // 2 > one.capacity:  # slack: a window moves once in window / 2 tokens
                grown[row] = max(_SMALLEST, one.held + count + window, one.capacity + one.capacity // 2)
        if grown:
            self._lay_out(grown)
        self._upload()

    def _forget(self, one: _Extent, count: int) -> None:
        """Drops the oldest `count` tokens of a row by moving the others to the front of its extent."""
        for name, array in self._arrays.items():
            kept = self._view(name, one)[:, count:].clone()
            array[:, one.begin : one.begin + kept.shape[1]] = kept
        one.start += count
        self._stale = True

    def _lay_out(self, capacities: Mapping[int, int]) -> None:
        """Gives these rows extents of new sizes; the others keep theirs, or get half as much again as they hold.

        So a store whose sequences grow in turn is not laid out anew for each of them.
        """
        for row, one in enumerate(self._rows):
            half_more = 0 if self.window else one.held + one.held // 2
            one.capacity = capacities.get(row, max(one.capacity, half_more))
        for name, entry in self._entries.items():
            begins = [0, *accumulate(entry.count(one.capacity) for one in self._rows)]
            array = self._array(entry, begins[-1])
            for one, begin in zip(self._rows, begins[:-1], strict=True):
                if name in one.begins and (held := self._view(name, one)).shape[1]:
                    array[:, begin : begin + held.shape[1]] = held
                one.begins[name] = begin
            self._arrays[name] = array
        for one, begin in zip(self._rows, accumulate((one.capacity for one in self._rows), initial=0), strict=False):
            one.begin = begin if self._entries else 0
        self._stale = True

    def _upload(self) -> None:
        """Tells the device where each row's extent begins and where its next token goes, if it does not know."""
        if self._stale:
            ends = [one.begin + one.held for one in self._rows]
            numbers = [[one.begin for one in self._rows], ends, [one.length for one in self._rows]]
            all_rows = torch.tensor(numbers, dtype=torch.int64, device=self.device)
            self._firsts, self._counts, self._stale = all_rows[0], all_rows[1:], False

    def extend(self, rows: int) -> None:
        """Makes room for so many rows in all."""
        self._rows += [_Extent() for _ in range(rows - len(self._rows))]
        self._extend_pools(rows)
        self._lay_out({})

    def reserve(self, tokens: Mapping[int, int]) -> None:
        """Makes room for `tokens[row]` held tokens in all, so that appending moves nothing."""
        more = {row: count for row, count in tokens.items() if count > self._rows[row].capacity}
        if more and self._entries:
            self._lay_out(more)

    # --- one row ------------------------------------------------------------------------------------------------------

    def clear(self, row: int) -> None:
        """Makes a row ready for another sequence; it keeps its extent."""
        self._rows[row] = self._rows[row].like(_Extent())
        self._zero(row)
        self._stale = True

    def copy(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Makes the second row of each pair what the first is."""
        self.reserve({target: self._rows[source].held for source, target in pairs})
        for source, target in pairs:
            self._put(target, Saved(self._rows[source], {name: self.view(*name, source) for name in self._names()}))

    def save(self, row: int) -> Saved | None:
        """A copy of what truncation could not bring back; None where it brings back all."""
        names = self._names() if self.window is not None else self._pools
        if self.window is None and not self._pools:
            return None
        one = self._rows[row]
        return Saved(one.like(one), {name: self.view(*name, row).clone() for name in names})

    def load(self, row: int, saved: Saved | None, length: int) -> None:
        """Returns a row to where `save` was called, at `length` tokens."""
        if saved is None:
            self._cut(row, length)
        else:
            self._put(row, saved)

    def _names(self) -> list[Name]:
        return [*self._arrays, *self._pools]

    def _put(self, row: int, saved: Saved) -> None:
        """Writes copied arrays into a row, which takes over their length."""
        self.reserve({row: saved.row.held})
        self._rows[row] = self._rows[row].like(saved.row)
        self._stale = True
        for name, kept in saved.arrays.items():
            if name in self._pools:
                self._pools[name][row] = kept
            else:
                begin = self._rows[row].begins[name]
                self._arrays[name][:, begin : begin + kept.shape[1]] = kept

    def reserved_bytes(self, row: int | None = None) -> int:
        """Bytes allocated, for one row or in all."""
        if row is None:
            return sum(array.nbytes for array in (*self._arrays.values(), *self._pools.values()))
        capacity = self._rows[row].capacity
        grown = sum(entry.bytes(capacity, self.dtype) for entry in self._entries.values())
        return grown + sum(entry.bytes(self.dtype) for entry in self._fixed.values())
