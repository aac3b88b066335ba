"""Contiguous head-major arrays that grow: where longwave keeps a state unless another store is asked for.

An array (heads, N, size) holds the entries of all sequences; a sequence has an extent of it, contiguous for each head.
Arrays grow by being laid out anew, one after the other, with half as much again for every sequence. Recurrent state
lies in pools with a row for each sequence.

Legend: `T` tokens of the stream, `R` runs, `G` heads of an entry, `K` its size, `N` entries of an array.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from typing import TypeAlias

import torch
from jaxtyping import Bool, Float, Int64, Shaped
from torch import Tensor

from longwave.states.spec import PerToken, StateSpec
from longwave.streams import Places, Runs, Spans, Stream

_SMALLEST = 64  # tokens that an extent has room for, if for any
_FEW = 8  # tokens of a run, on average, up to which those of all runs are written at once

Name: TypeAlias = tuple[str, str]  # of an array: the part's, and its own


@dataclass
class _Row:
    """The memory of one sequence. length: tokens ever appended and not cut off again, those from `start` on held.

    capacity: tokens that its extent has room for. kept_from: the length to which `hold` made a return possible.
    """

    length: int = 0
    start: int = 0
    capacity: int = 0
    kept_from: int | None = None

    @property
    def held(self) -> int:
        """Tokens that are still held."""
        return self.length - self.start


@dataclass(frozen=True)
class Saved:
    """A copy of what one row remembers: the row's figures, and those arrays that truncation could not bring back."""

    row: _Row
    arrays: Mapping[Name, Tensor]


class Extents:
    """The memory of parts that grow alike: on one level, with one window (see `states.memory.Store`).

    After `hold` at some length, a window forgets nothing that a return to that length, or to a later one, would need.
    """

    def __init__(self, specs: Mapping[str, StateSpec], rows: int, *, dtype: torch.dtype, device: torch.device) -> None:
        self.specs, self.dtype, self.device = dict(specs), dtype, device
        # on a GPU all sequences are read at once, up to the longest: what lies behind the others' entries is finite
        self._new = torch.empty if device.type == "cpu" else torch.zeros
        (self.window,) = {spec.window for spec in specs.values()}
        self._entries = {(part, name): one for part, spec in specs.items() for name, one in spec.per_token.items()}
        assert self.window is None or not any(entry.sums_up for entry in self._entries.values())
        self._fixed = {(part, name): one for part, spec in specs.items() for name, one in spec.per_sequence.items()}
        self._rows: list[_Row] = []
        self._arrays: dict[Name, Tensor] = {}
        self._pools: dict[Name, Tensor] = {}
        self._begins: dict[Name, list[int]] = {}  # of every array: where each row's extent begins
        self._summed: dict[Name, list[int]] = {name: [] for name, entry in self._entries.items() if entry.sums_up}
        self._step: _Step | None = None
        self.extend(rows)
        self.begin()

    # --- one step -----------------------------------------------------------------------------------------------------

    def memory(self, part: str, stream: Stream) -> _PartMemory:
        """The memory of one part for the stream at hand; the first part of a step makes room for all of them."""
        if self._step is None or self._step.runs is not stream.runs:
            self._step = self._open(stream)
        return _PartMemory(self, part, self._step)

    def begin(self) -> None:
        """Ready for a step; one that was begun and not closed has not happened."""
        self._step = None
        self._upload()

    def close(self) -> None:
        """Counts the tokens of the step as remembered, and puts its recurrent states in place of the former ones."""
        if (step := self._step) is not None:
            for row, count in zip(step.rows, step.runs.lengths, strict=True):
                self._rows[row].length += count
            for name, complete in step.summed.items():
                for row, count in zip(step.rows, complete, strict=True):
                    self._summed[name][row] = count
            for name, rows in step.replaced.items():
                self._write(name, rows, step)
            self._counts = self._counts.index_add(1, step.index, step.runs.sizes.expand(2, -1))
            self._step = None

    def _open(self, stream: Stream) -> _Step:
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
        firsts = [self._offsets[row] for row in rows]
        ends = [first + one.length - one.start + n for first, one, n in zip(firsts, table, lengths, strict=True)]
        return _Step(stream.runs, rows, index, self._firsts, self._counts, list(zip(firsts, ends, strict=True)))

    # --- room ---------------------------------------------------------------------------------------------------------

    def _make_room(self, new: Sequence[tuple[int, int]]) -> None:
        """Room for more tokens in some rows (row, tokens): by forgetting what no window sees, or by growing."""
        window, grown = self.window or 0, dict[int, int]()
        for row, count in new:
            one, idle = self._rows[row], self._forgettable(row)
            needed = max(window, one.held - idle) + count
            too_large = bool(window) and one.capacity > 4 * max(_SMALLEST, needed)  # a long prefill has left it so
            if one.held + count <= one.capacity and not too_large:
                continue
            if idle:
                self._forget(row, idle)
            if too_large:
                grown[row] = max(_SMALLEST, one.held + count + window)
            elif one.held + count + window // 2 > one.capacity:  # slack: a window moves once in window / 2 tokens
                grown[row] = max(_SMALLEST, one.held + count + window, one.capacity + one.capacity // 2)
        if grown:
            self._lay_out(grown)
        self._upload()

    def _forgettable(self, row: int) -> int:
        """The number of oldest tokens that no later query can see, even after a return to the length of `hold`."""
        if self.window is None:
            return 0
        one = self._rows[row]
        length = one.length if one.kept_from is None else min(one.length, one.kept_from)
        return max(0, length - self.window - one.start)

    def _forget(self, row: int, count: int) -> None:
        """Drops the oldest `count` tokens of a row by moving the others to the front of its extent."""
        begin = self._offsets[row]
        for name, array in self._arrays.items():
            kept = self.view(*name, row)[:, count:].clone()
            array[:, begin : begin + kept.shape[1]] = kept
        self._rows[row].start += count
        self._stale = True

    def _lay_out(self, capacities: Mapping[int, int]) -> None:
        """Gives these rows extents of new sizes; the others keep theirs, or get half as much again as they hold.

        So a store whose sequences grow in turn is not laid out anew for each of them.
        """
        for row, one in enumerate(self._rows):
            half_more = 0 if self.window else one.held + one.held // 2
            one.capacity = capacities.get(row, max(one.capacity, half_more))
        for name, entry in self._entries.items():
            counts = [entry.count(one.capacity) for one in self._rows]
            begins = [0, *accumulate(counts)]
            array = self._new(entry.heads, begins[-1], entry.size, dtype=self._dtype_of(entry), device=self.device)
            for row in range(len(self._rows)):
                if held := self._count(name, row):
                    array[:, begins[row] : begins[row] + held] = self.view(*name, row)
            self._arrays[name], self._begins[name] = array, begins[:-1]
        self._offsets = [0, *accumulate(one.capacity if self._entries else 0 for one in self._rows)][:-1]
        self._stale = True

    def _dtype_of(self, entry: PerToken) -> torch.dtype:
        return entry.dtype or self.dtype

    def _count(self, name: Name, row: int) -> int:
        """Entries of an array that a row holds."""
        return self._summed[name][row] if name in self._summed else self._rows[row].held

    def _upload(self) -> None:
        """Tells the device where each row's extent begins and where its next token goes, if it does not know."""
        if self._stale:
            ends = [offset + one.held for offset, one in zip(self._offsets, self._rows, strict=True)]
            numbers = [self._offsets, ends, [one.length for one in self._rows]]
            self._firsts, self._counts = torch.tensor(numbers, dtype=torch.int64, device=self.device).split([1, 2])
            self._stale = False

    def extend(self, rows: int) -> None:
        """Makes room for so many rows in all."""
        new = rows - len(self._rows)
        self._rows += [_Row() for _ in range(new)]
        for counts in self._summed.values():
            counts += [0] * new
        for name, entry in self._fixed.items():
            pool = torch.zeros(rows, *entry.shape, dtype=entry.of(self.dtype), device=self.device)
            if name in self._pools:
                pool[: rows - new] = self._pools[name]
            self._pools[name] = pool
        self._lay_out({})

    def reserve(self, tokens: Mapping[int, int]) -> None:
        """Makes room for `tokens[row]` held tokens in all, so that appending moves nothing."""
        more = {row: count for row, count in tokens.items() if count > self._rows[row].capacity}
        if more and self._entries:
            self._lay_out(more)

    # --- one row ------------------------------------------------------------------------------------------------------

    def length(self, row: int) -> int:
        """Tokens that were ever appended and not cut off again."""
        return self._rows[row].length

    def held(self, row: int) -> int:
        """Tokens that are still held."""
        return self._rows[row].held

    def view(self, part: str, name: str, row: int) -> Tensor:
        """The held entries (G, n, K) of a per-token array, or a per-sequence array; not to be changed."""
        if (part, name) in self._pools:
            return self._pools[part, name][row]
        begin = self._begins[part, name][row]
        return self._arrays[part, name][:, begin : begin + self._count((part, name), row)]

    def kept_before(self, row: int, place: int) -> int:
        """The number of remembered tokens that stand before a place of their sequence."""
        part, name = next((part, spec.places) for part, spec in self.specs.items() if spec.places is not None)
        return int(torch.searchsorted(self.view(part, name, row).flatten(), place))

    def check_truncation(self, row: int, length: int) -> None:
        """ValueError if there are fewer tokens than `length`, or if what would be visible again is forgotten."""
        one, window = self._rows[row], self.window
        if not 0 <= length <= one.length:
            raise ValueError(f"length {length} is outside the {one.length} tokens remembered")
        if window is not None and one.start > max(0, length - window + 1):
            raise ValueError(f"length {length} cannot be returned to: a window of {window} has forgotten it; snapshot")
        if self._fixed and length not in (0, one.length):
            raise ValueError(f"length {length} cannot be returned to: a recurrent state has forgotten it; snapshot")

    def truncate(self, row: int, length: int) -> None:
        """Forgets every token from `length` on."""
        self.check_truncation(row, length)
        if length == 0:
            self._zero(row)
        for name, counts in self._summed.items():
            counts[row] = min(counts[row], self._entries[name].count(length))
        self._rows[row].length = length
        self._stale = True

    def hold(self, row: int) -> None:
        """From now on `truncate` can return to any length not below the present one, except in what recurs."""
        self._rows[row].kept_from = self._rows[row].length

    def clear(self, row: int) -> None:
        """Makes a row ready for another sequence; it keeps its extent."""
        self._rows[row] = _Row(capacity=self._rows[row].capacity)
        for counts in self._summed.values():
            counts[row] = 0
        self._zero(row)
        self._stale = True

    def _zero(self, row: int) -> None:
        for pool in self._pools.values():
            pool[row].zero_()

    def copy(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Makes the second row of each pair what the first is."""
        self.reserve({target: self._rows[source].held for source, target in pairs})
        for source, target in pairs:
            self._put(target, Saved(self._rows[source], {name: self.view(*name, source) for name in self._names()}))
            for counts in self._summed.values():
                counts[target] = counts[source]

    def save(self, row: int) -> Saved | None:
        """A copy of what truncation could not bring back; None where it brings back all."""
        names = self._names() if self.window is not None else self._pools
        if self.window is None and not self._pools:
            return None
        return Saved(replace(self._rows[row]), {name: self.view(*name, row).clone() for name in names})

    def load(self, row: int, saved: Saved | None, length: int) -> None:
        """Returns a row to where `save` was called, at `length` tokens."""
        if saved is None or self.window is None:
            for name, counts in self._summed.items():
                counts[row] = min(counts[row], self._entries[name].count(length))
            self._rows[row].length = length
            self._stale = True
        if saved is not None:
            self._put(row, saved)

    def _names(self) -> list[Name]:
        return [*self._arrays, *self._pools]

    def _put(self, row: int, saved: Saved) -> None:
        """Writes copied arrays into a row, which takes over their length."""
        self.reserve({row: saved.row.held})
        self._rows[row] = replace(saved.row, capacity=self._rows[row].capacity)
        self._stale = True
        for name, kept in saved.arrays.items():
            if name in self._pools:
                self._pools[name][row] = kept
            else:
                begin = self._begins[name][row]
                self._arrays[name][:, begin : begin + kept.shape[1]] = kept

    def used_bytes(self, row: int) -> int:
        """Bytes of what later tokens can see: the declared formula."""
        return sum(spec.bytes(self._rows[row].length, self.dtype) for spec in self.specs.values())

    def reserved_bytes(self, row: int | None = None) -> int:
        """Bytes allocated, for one row or in all."""
        if row is None:
            return sum(array.nbytes for array in (*self._arrays.values(), *self._pools.values()))
        capacity = self._rows[row].capacity
        grown = sum(entry.bytes(capacity, self.dtype) for entry in self._entries.values())
        return grown + sum(entry.bytes(self.dtype) for entry in self._fixed.values())

    # --- what a part does in a step -----------------------------------------------------------------------------------

    def append(self, name: Name, entries: Shaped[Tensor, "T G K"], step: _Step) -> Shaped[Tensor, "G N K"]:
        """Writes the stream's entries behind those of each run's row; the whole array."""
        array, entries = self._arrays[name], entries.to(self._dtype_of(self._entries[name])).transpose(0, 1)
        if len(step.rows) > 1 and step.runs.tokens <= _FEW * len(step.rows):
            return array.index_copy_(1, step.at, entries)
        lengths = step.runs.lengths  # a run's tokens follow each other, and one copy of many is 10x as fast on a CPU
        pieces = (entries,) if len(lengths) == 1 else entries.split(lengths, 1)
        for (_, end), count, piece in zip(step.places.spans, lengths, pieces, strict=True):
            array[:, end - count : end] = piece
        return array

    def sum_up(
        self, name: Name, of: Name, make: Callable[[Tensor], Tensor], step: _Step
    ) -> tuple[Float[Tensor, "G N K"], Spans]:
        """Makes those entries of an array that the newest tokens complete; the array, and where each run's lie."""
        array, counts, begins = self._arrays[name], self._summed[name], self._begins[name]
        width, every = self._entries[name].width, self._entries[name].every
        complete = [max(0, (end - first - width) // every + 1) for first, end in step.places.spans]
        for row, (first, _), count in zip(step.rows, step.places.spans, complete, strict=True):
            if count > (done := counts[row]):
                tokens = slice(first + done * every, first + (count - 1) * every + width)
                array[:, begins[row] + done : begins[row] + count] = make(self._arrays[of][:, tokens])
        step.summed[name] = complete
        return array, [(begins[row], begins[row] + count) for row, count in zip(step.rows, complete, strict=True)]

    def recall(self, name: Name, step: _Step) -> Tensor:
        """A pool's rows of the runs at hand: a view of them where they follow each other and nothing is learned."""
        pool = self._pools[name]
        if step.block is None or torch.is_grad_enabled():
            return pool.index_select(0, step.index)
        return pool[step.block]

    @torch.no_grad()
    def _write(self, name: Name, rows: Tensor, step: _Step) -> None:
        """Writes the rows of a pool; what is stored is never a view of a batch's result."""
        pool = self._pools[name]
        if step.block is None:
            pool.index_copy_(0, step.index, rows.to(pool.dtype))
        else:
            pool[step.block] = rows


class _Step:
    """A stream under way through a store: the rows its runs continue, and where their tokens go.

    firsts (1, rows), counts (2, rows): where the extent of every row of the store begins; where its next token goes,
    and how many were ever appended.
    spans: for every run, where its entries begin and end, the new ones included. summed, replaced: what closing will
    make of it: how many summed-up entries of each array its runs have, and the rows of pools.
    """

    def __init__(
        self, runs: Runs, rows: tuple[int, ...], index: Tensor, firsts: Tensor, counts: Tensor, spans: Spans
    ) -> None:
        self.runs, self.rows, self.index = runs, rows, index
        self._before, self._lengths = counts.index_select(1, self.index)
        self.places = Places(firsts[0].index_select(0, self.index), self._before + self.runs.sizes, spans)
        self.summed: dict[Name, list[int]] = {}
        self.replaced: dict[Name, Tensor] = {}

    @cached_property
    def fresh(self) -> Bool[Tensor, " R"]:
        """Whether a run's sequence remembers nothing yet."""
        return self._lengths == 0

    @cached_property
    def at(self) -> Int64[Tensor, " T"]:
        """The entry that each token becomes."""
        return self._before.index_select(0, self.runs.of_token) + self.runs.places

    @cached_property
    def block(self) -> slice | None:
        """The rows as a slice of a pool, if they follow each other."""
        first = self.rows[0] if self.rows else 0
        follow = self.rows == tuple(range(first, first + len(self.rows)))
        return slice(first, first + len(self.rows)) if follow else None


@dataclass(slots=True)
class _PartMemory:
    """`states.memory.Memory` of one part: its arrays, and the step that all parts of the store share."""

    store: Extents
    part: str
    step: _Step

    @property
    def places(self) -> Places:
        return self.step.places

    @property
    def fresh(self) -> Bool[Tensor, " R"]:
        return self.step.fresh

    def append(self, **entries: Shaped[Tensor, "T _G _K"]) -> tuple[Shaped[Tensor, "_G _N _K"], ...]:
        return tuple([self.store.append((self.part, name), entry, self.step) for name, entry in entries.items()])

    def sum_up(self, name: str, of: str, make: Callable[[Tensor], Tensor]) -> tuple[Float[Tensor, "G N K"], Spans]:
        return self.store.sum_up((self.part, name), (self.part, of), make, self.step)

    def recall(self, name: str) -> Tensor:
        return self.store.recall((self.part, name), self.step)

    def replace(self, **arrays: Tensor) -> None:
        self.step.replaced |= {(self.part, name): rows.detach() for name, rows in arrays.items()}
