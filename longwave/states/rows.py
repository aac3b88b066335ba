"""What longwave's own stores share: the figures of their rows, the pools of what recurs, and the steps through them.

A store has arrays (heads, N, size) with an entry for each token, and pools with a row for each sequence. Stores differ
in which entries of an array are those of a sequence.

Legend: `T` tokens of the stream, `R` runs, `G` heads of an entry, `K` its size, `N` entries of an array.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Generic, TypeAlias, TypeVar

import torch
from jaxtyping import Bool, Float, Int64, Shaped
from torch import Tensor

from longwave.states.spec import PerToken, StateSpec
from longwave.streams import Located, Places, Runs, Stream, chosen

_FEW = 8  # tokens of a run, on average, up to which those of all runs are written at once

Name: TypeAlias = tuple[str, str]  # of an array: the part's, and its own


@dataclass
class Row:
    """The figures of one sequence. length: tokens ever appended and not cut off again, those from `start` on held.

    kept_from: the length to which `hold` made a return possible. summed: entries of arrays that sum up tokens.
    """

    length: int = 0
    start: int = 0
    kept_from: int | None = None
    summed: dict[Name, int] = field(default_factory=dict)

    @property
    def held(self) -> int:
        """Tokens that are still held."""
        return self.length - self.start


R = TypeVar("R", bound=Row)


class Rows(ABC, Generic[R]):
    """The memory of parts that grow alike: on one level, with one window (see `states.memory.Store`).

    After `hold` at some length, a window forgets nothing that a return to that length, or to a later one, would need.
    """

    def __init__(self, specs: Mapping[str, StateSpec], *, dtype: torch.dtype, device: torch.device) -> None:
        self.specs, self.dtype, self.device = dict(specs), dtype, device
        (self.window,) = {spec.window for spec in specs.values()}
        self._entries = {(part, name): one for part, spec in specs.items() for name, one in spec.per_token.items()}
        assert self.window is None or not any(entry.sums_up for entry in self._entries.values())
        self._fixed = {(part, name): one for part, spec in specs.items() for name, one in spec.per_sequence.items()}
        self._rows: list[R] = []
        self._arrays: dict[Name, Tensor] = {}
        self._pools: dict[Name, Tensor] = {}
        self._step: Step | None = None

    def _array(self, entry: PerToken, count: int) -> Tensor:
        """Room for so many entries; on a GPU all sequences are read at once, so what is not written yet is finite."""
        new = torch.empty if self.device.type == "cpu" else torch.zeros
        return new(entry.heads, count, entry.size, dtype=self._dtype_of(entry), device=self.device)

    def _dtype_of(self, entry: PerToken) -> torch.dtype:
        return entry.dtype or self.dtype

    # --- what differs -------------------------------------------------------------------------------------------------

    @abstractmethod
    def _open(self, stream: Stream) -> Step:
        """Begins a step: makes room for its tokens."""

    @abstractmethod
    def _located(self, name: Name, one: R, begin: int, end: int) -> slice | Int64[Tensor, " n"]:
        """The numbers, in an array, of the entries begin ... end - 1 that a row holds; a slice where they follow."""

    @abstractmethod
    def _located_in(self, name: Name, step: Step, counts: Sequence[int]) -> Located:
        """Where the first `counts[r]` entries that sum up tokens lie of the row of each run."""

    @abstractmethod
    def _changed(self, row: int) -> None:
        """Told when a row has been cut."""

    # --- one step -----------------------------------------------------------------------------------------------------

    def memory(self, part: str, stream: Stream) -> PartMemory:
        """The memory of one part for the stream at hand; the first part of a step makes room for all of them."""
        if self._step is None or self._step.runs is not stream.runs:
            self._step = self._open(stream)
        return PartMemory(self, part, self._step)

    def close(self, undone: Collection[int] = ()) -> None:
        """Counts the tokens of the step as remembered, and puts its recurrent states in place of the former ones.

        undone: rows for which the step has not happened.
        """
        if (step := self._step) is not None:
            done = [run for run, row in enumerate(step.rows) if row not in undone]
            for run in done:
                one = self._rows[step.rows[run]]
                one.length += step.runs.lengths[run]
                one.summed |= {name: complete[run] for name, complete in step.summed.items()}
            for name, rows in step.replaced.items():
                self._write(name, rows, step, done)
            self._step = None

    def _extend_pools(self, rows: int) -> None:
        for name, entry in self._fixed.items():
            pool = torch.zeros(rows, *entry.shape, dtype=entry.of(self.dtype), device=self.device)
            if name in self._pools:
                pool[: len(self._pools[name])] = self._pools[name]
            self._pools[name] = pool

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
        return self._view((part, name), self._rows[row])

    def _view(self, name: Name, one: R) -> Tensor:
        count = one.summed.get(name, 0) if self._entries[name].sums_up else one.held
        return chosen(self._arrays[name], self._located(name, one, 0, count))

    def kept_before(self, row: int, place: int) -> int:
        """The number of remembered tokens that stand before a place of their sequence."""
        return self._kept_before(self._rows[row], place)

    def _kept_before(self, one: R, place: int) -> int:
        name = next((part, spec.places) for part, spec in self.specs.items() if spec.places is not None)
        return int(torch.searchsorted(self._view(name, one).flatten(), place))

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
        self._cut(row, length)

    def _cut(self, row: int, length: int) -> None:
        one = self._rows[row]
        one.length = length
        one.summed = {name: min(count, self._entries[name].count(length)) for name, count in one.summed.items()}
        self._changed(row)

    def hold(self, row: int) -> None:
        """From now on `truncate` can return to any length not below the present one, except in what recurs."""
        self._rows[row].kept_from = self._rows[row].length

    def _forgettable(self, one: R) -> int:
        """The number of oldest tokens that no later query can see, even after a return to the length of `hold`."""
        if self.window is None:
            return 0
        length = one.length if one.kept_from is None else min(one.length, one.kept_from)
        return max(0, length - self.window - one.start)

    def _zero(self, row: int) -> None:
        for pool in self._pools.values():
            pool[row].zero_()

    def used_bytes(self, row: int) -> int:
        """Bytes of what later tokens can see: the declared formula."""
        return sum(spec.bytes(self._rows[row].length, self.dtype) for spec in self.specs.values())

    # --- what a part does in a step -----------------------------------------------------------------------------------

    def append(self, name: Name, entries: Shaped[Tensor, "T G K"], step: Step) -> Shaped[Tensor, "G N K"]:
        """Writes the stream's entries behind those of each run's row; the whole array."""
        array, entries = self._arrays[name], entries.to(self._dtype_of(self._entries[name])).transpose(0, 1)
        if len(step.rows) > 1 and step.runs.tokens <= _FEW * len(step.rows):
            return array.index_copy_(1, step.at, entries)
        lengths = step.runs.lengths  # a run's tokens follow each other, and one copy of many is 10x as fast on a CPU
        pieces = (entries,) if len(lengths) == 1 else entries.split(lengths, 1)
        for at, piece in zip(step.new_entries, pieces, strict=True):
            array[:, at] = piece
        return array

    def sum_up(
        self, name: Name, of: Name, make: Callable[[Tensor], Tensor], step: Step
    ) -> tuple[Float[Tensor, "G N K"], Located]:
        """Makes those entries of an array that the newest tokens complete; the array, and where each run's lie."""
        array, entry = self._arrays[name], self._entries[name]
        complete = [entry.count(end - begin) for begin, end in step.places.spans]
        for row, count in zip(step.rows, complete, strict=True):
            if count > (done := (one := self._rows[row]).summed.get(name, 0)):
                tokens = self._located(of, one, done * entry.every, (count - 1) * entry.every + entry.width)
                array[:, self._located(name, one, done, count)] = make(chosen(self._arrays[of], tokens))
        step.summed[name] = complete
        return array, self._located_in(name, step, complete)

    def recall(self, name: Name, step: Step) -> Tensor:
        """A pool's rows of the runs at hand: a view of them where they follow each other and nothing is learned."""
        pool = self._pools[name]
        if step.block is None or torch.is_grad_enabled():
            return pool.index_select(0, step.index)
        return pool[step.block]

    @torch.no_grad()
    def _write(self, name: Name, rows: Tensor, step: Step, done: Sequence[int]) -> None:
        """Writes the rows of a pool, those of these runs; what is stored is never a view of a batch's result."""
        pool = self._pools[name]
        if len(done) < len(step.rows):
            for run in done:
                pool[step.rows[run]] = rows[run]
        elif step.block is None:
            pool.index_copy_(0, step.index, rows.to(pool.dtype))
        else:
            pool[step.block] = rows


class Step:
    """A stream under way through a store: the rows its runs continue, and where their tokens go.

    places: of each run's entries, the new ones included. lengths: how many tokens each run's row ever had before.
    summed, replaced: what closing will make of it: how many summed-up entries of each array its runs have, and the rows
    of pools.
    """

    def __init__(self, runs: Runs, rows: tuple[int, ...], index: Tensor, places: Places, lengths: Tensor) -> None:
        self.runs, self.rows, self.index, self.places, self._lengths = runs, rows, index, places, lengths
        self.summed: dict[Name, list[int]] = {}
        self.replaced: dict[Name, Tensor] = {}

    @cached_property
    def fresh(self) -> Bool[Tensor, " R"]:
        """Whether a run's sequence remembers nothing yet."""
        return self._lengths == 0

    @cached_property
    def at(self) -> Int64[Tensor, " T"]:
        """The entry that each token becomes."""
        run = self.runs.of_token
        before = self.places.ends - self.runs.sizes
        return self.places.at(run, before.index_select(0, run) + self.runs.places)

    @cached_property
    def new_entries(self) -> list[slice | Int64[Tensor, " n"]]:
        """The entries that the tokens of each run become."""
        spans = [(end - count, end) for (_, end), count in zip(self.places.spans, self.runs.lengths, strict=True)]
        return [self.places.entries(run, span) for run, span in enumerate(spans)]

    @cached_property
    def block(self) -> slice | None:
        """The rows as a slice of a pool, if they follow each other."""
        first = self.rows[0] if self.rows else 0
        follow = self.rows == tuple(range(first, first + len(self.rows)))
        return slice(first, first + len(self.rows)) if follow else None


@dataclass(slots=True)
class PartMemory:
    """`states.memory.Memory` of one part: its arrays, and the step that all parts of the store share."""

    store: Rows[Any]
    part: str
    step: Step

    @property
    def places(self) -> Places:
        return self.step.places

    @property
    def fresh(self) -> Bool[Tensor, " R"]:
        return self.step.fresh

    def append(self, **entries: Shaped[Tensor, "T _G _K"]) -> tuple[Shaped[Tensor, "_G _N _K"], ...]:
        return tuple([self.store.append((self.part, name), entry, self.step) for name, entry in entries.items()])

    def sum_up(self, name: str, of: str, make: Callable[[Tensor], Tensor]) -> tuple[Float[Tensor, "G N K"], Located]:
        return self.store.sum_up((self.part, name), (self.part, of), make, self.step)

    def recall(self, name: str) -> Tensor:
        return self.store.recall((self.part, name), self.step)

    def replace(self, **arrays: Tensor) -> None:
        self.step.replaced |= {(self.part, name): rows.detach() for name, rows in arrays.items()}
