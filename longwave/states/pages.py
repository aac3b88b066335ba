"""Pages: the store of an engine that serves many sequences, which may share what they have in common.

An array (heads, P * S, size) consists of P pages of S tokens. A sequence has a table of pages, the same for all parts
of a store, and a page counts its holders: sequences, and token boundaries that were kept to continue from. Who appends
to a page that others hold copies it first. Arrays are made once; on a CPU memory is taken when a page is first written.

Entries that sum up tokens lie in the pages of the same table, in that of the last token which they sum up, so a page
depends on no later one.

Legend: `P` pages, `S` tokens of a page, `G` heads of an entry, `K` its size.
"""

from __future__ import annotations

import weakref
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import starmap
from typing import NamedTuple, TypeAlias

import numpy as np
import torch
from jaxtyping import Int64
from numpy.typing import NDArray
from torch import Tensor

from longwave.errors import MachineError, require
from longwave.states.rows import Name, Row, Rows, Step
from longwave.states.spec import PerToken, StateSpec
from longwave.streams import Located, Places, Stream, Table

Numbers: TypeAlias = "NDArray[np.int32]"  # of pages


@dataclass(frozen=True)
class PageOptions:
    """Room for tokens in pages.

    tokens: of all sequences together, at every level and for every window; or by level (a resampler's index; -1 is the
    outermost). size: tokens of a page.
    """

    tokens: int | Mapping[int, int]
    size: int = 64

    def __post_init__(self) -> None:
        require(self.size > 0, f"pages.size = {self.size}: 1 token or more")
        counts = [self.tokens] if isinstance(self.tokens, int) else self.tokens.values()
        require(all(count >= 0 for count in counts), f"pages.tokens = {self.tokens}: 0 or more")

    def pages(self, level: int) -> int:
        """P, the pages of a level."""
        tokens = self.tokens if isinstance(self.tokens, int) else self.tokens.get(level, 0)
        return -(-tokens // self.size)


class OutOfPages(MachineError):
    """A step needs more pages than are free; it has happened nowhere, and can be tried again once some are."""


class Usage(NamedTuple):
    """The pages of one store. free: pages that nobody holds. page_bytes: of a page in all of the store's arrays."""

    level: int
    window: int | None
    size: int
    pages: int
    free: int
    page_bytes: int


class Stock:
    """Which pages are free, and how many hold each of the others. name: of the store, for errors."""

    def __init__(self, pages: int, name: str) -> None:
        self.holders, self.free, self._name = np.zeros(pages, np.int32), pages, name

    def require(self, count: int) -> None:
        """OutOfPages unless so many pages are free."""
        if count > self.free:
            raise OutOfPages(f"state: {count} pages needed of {self._name}, {self.free} free of {len(self.holders)}")

    def take(self, count: int, after: int | None = None) -> Numbers:
        """So many free pages: those that follow page `after`, and then the longest stretches that there are.

        Whoever begins anew does so in the middle of the longest stretch, so that those around it can grow.
        """
        self.require(count)
        found = [] if after is None else [self._following(after, count)]
        left = count - sum(map(len, found))
        while left > 0:
            found.append(self._stretch(left))
            left -= len(found[-1])
        return np.concatenate(found) if found else np.zeros(0, np.int32)

    def _following(self, after: int, count: int) -> Numbers:
        taken = np.flatnonzero(self.holders[after + 1 : after + 1 + count])
        room = min(count, len(self.holders) - after - 1)
        return self._taken(after + 1, int(taken[0]) if len(taken) else room)

    def _stretch(self, most: int) -> Numbers:
        """At most so many pages of the longest stretch that is free."""
        edges = np.flatnonzero(np.diff(np.pad(self.holders == 0, 1).astype(np.int8)))
        begins, lengths = edges[::2], edges[1::2] - edges[::2]
        longest = int(lengths.argmax())
        begin, length = int(begins[longest]), int(lengths[longest])
        slack = max(0, length - most) // 2 if begin else 0
        return self._taken(begin + slack, min(most, length))

    def _taken(self, begin: int, count: int) -> Numbers:
        numbers = np.arange(begin, begin + count, dtype=np.int32)
        self.hold(numbers)
        return numbers

    def hold(self, numbers: Numbers) -> None:
        """One more holds these pages."""
        self.free -= int((self.holders[numbers] == 0).sum())
        self.holders[numbers] += 1

    def let_go(self, numbers: Numbers) -> None:
        """One less holds these pages."""
        self.holders[numbers] -= 1
        assert (self.holders[numbers] >= 0).all()
        self.free += int((self.holders[numbers] == 0).sum())


_NO_PAGES = Table(np.zeros(0, np.int32))


@dataclass
class _Paged(Row):
    """The figures of one sequence, and its pages from that of token `start` on, which is a page's first."""

    table: Table = _NO_PAGES

    def copy(self) -> _Paged:
        return replace(self, summed=dict(self.summed))


class Kept:
    """A token boundary that is kept: its pages have one more holder, and what recurs is copied.

    row: the figures there. pools: the recurrent rows. It lets go when it is dropped, at the latest when nobody has it.
    """

    def __init__(self, stock: Stock, row: _Paged, pools: Mapping[Name, Tensor]) -> None:
        stock.hold(row.table.numbers)
        self.row, self.pools = row, pools
        self.drop = weakref.finalize(self, stock.let_go, row.table.numbers)
        self.drop.atexit = False

    @property
    def nbytes(self) -> int:
        """Bytes of what is copied."""
        return sum(pool.nbytes for pool in self.pools.values())


class Pages(Rows[_Paged]):
    """The memory of parts that grow alike, in pages (see `states.rows.Rows`)."""

    def __init__(
        self,
        specs: Mapping[str, StateSpec],
        rows: int,
        *,
        dtype: torch.dtype,
        device: torch.device,
        options: PageOptions,
    ) -> None:
        super().__init__(specs, dtype=dtype, device=device)
        (self.level,) = {spec.level for spec in specs.values()}
        self.size = options.size
        for entry in self._entries.values():
            fits = self.size % entry.every == 0
            require(fits, f"pages.size = {self.size}: a multiple of {entry.every}, as entries sum up tokens")
        pages = options.pages(self.level) if self._entries else 0
        whose = f"level {self.level}" + (f" with a window of {self.window}" if self.window else "")
        self.stock = Stock(pages, whose)
        self._arrays = {name: self._array(entry, pages * self._each(entry)) for name, entry in self._entries.items()}
        self.extend(rows)

    def _each(self, entry: PerToken) -> int:
        """Entries of a page."""
        return self.size // entry.every

    @property
    def usage(self) -> Usage:
        """How many pages there are, and how many are free."""
        return Usage(self.level, self.window, self.size, len(self.stock.holders), self.stock.free, self._page_bytes)

    @property
    def _page_bytes(self) -> int:
        entries = self._entries.values()
        return sum(self._each(e) * e.heads * e.size * self._dtype_of(e).itemsize for e in entries)

    # --- one step -----------------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """Ready for a step; one that was begun and not closed has not happened, and gives its pages back."""
        if self._step is not None:
            for row in self._step.rows:
                self._changed(row)
            self._step = None

    def close(self, undone: Collection[int] = ()) -> None:
        """Counts the tokens of the step as remembered; pages that no window sees any more are let go."""
        if (step := self._step) is not None:
            super().close(undone)
            for row in undone:
                self._changed(row)
            for one in [self._rows[row] for row in step.rows] if self.window else ():
                self._keep(one, self._forgettable(one) // self.size, len(one.table.numbers))

    def _open(self, stream: Stream) -> Step:
        assert stream.continued is not None, "the stream comes from state.stream(...)"
        rows, runs = stream.continued.rows, stream.runs
        table = [self._rows[row] for row in rows]
        if self._entries:
            self._make_room(list(zip(table, runs.lengths, strict=True)))
        tables = [one.table for one in table]
        together = all(one.follow for one in tables)
        begins = [self._first(one) for one in tables] if together else [0] * len(rows)
        ends = [begin + one.held + n for begin, one, n in zip(begins, table, runs.lengths, strict=True)]
        numbers = np.array([begins, ends, [one.length for one in table]], np.int64)
        first, end, length = torch.from_numpy(numbers).to(self.device)
        spans = list(zip(*numbers[:2].tolist(), strict=True))
        places = Places(first, end, spans) if together else Places(first, end, spans, tables, self.size)
        return Step(runs, rows, stream.continued.index, places, length)

    def _first(self, table: Table) -> int:
        """The first entry of a table whose pages follow each other."""
        return int(table.numbers[0]) * self.size if len(table.numbers) else 0

    def _make_room(self, new: Sequence[tuple[_Paged, int]]) -> None:
        """Room for more tokens of some sequences, in pages that nobody else holds; all of it, or none (OutOfPages)."""
        self.stock.require(sum(starmap(self._needed, new)))
        for one, count in new:
            if count and self._shares_last(one):
                self._copy_last(one)
            if missing := max(0, self._pages(one.held + count) - len(one.table.numbers)):
                numbers = one.table.numbers
                more = self.stock.take(missing, int(numbers[-1]) if len(numbers) else None)
                one.table = Table(np.concatenate([numbers, more]))

    def _needed(self, one: _Paged, count: int) -> int:
        more = max(0, self._pages(one.held + count) - len(one.table.numbers))
        return more + bool(count and self._shares_last(one))

    def _pages(self, tokens: int) -> int:
        return -(-tokens // self.size)

    def _shares_last(self, one: _Paged) -> bool:
        """Whether the next token goes to a page that has tokens and that others hold, too."""
        begun = one.held % self.size > 0
        return begun and bool(self.stock.holders[one.table.numbers[one.held // self.size]] > 1)

    def _copy_last(self, one: _Paged) -> None:
        """Copies the page that the next token goes to."""
        numbers, last = one.table.numbers.copy(), one.held // self.size
        old = numbers[last : last + 1].copy()
        new = self.stock.take(1, int(numbers[last - 1]) if last else None)
        for name, entry in self._entries.items():
            pages = self._arrays[name].unflatten(1, (-1, self._each(entry)))
            pages[:, int(new[0])] = pages[:, int(old[0])]
        numbers[last : last + 1] = new
        one.table = Table(numbers)
        self.stock.let_go(old)

    def _located(self, name: Name, one: _Paged, begin: int, end: int) -> slice | Int64[Tensor, " n"]:
        entry = self._entries[name]
        ahead = entry.ahead
        return one.table.entries(self._each(entry), begin + ahead, end + ahead, self.device)

    def _located_in(self, name: Name, step: Step, counts: Sequence[int]) -> Located:
        entry = self._entries[name]
        spans = [(entry.ahead, entry.ahead + count) for count in counts]
        return Located(spans, [self._rows[row].table for row in step.rows], self._each(entry), self.device)

    def _changed(self, row: int) -> None:
        one = self._rows[row]
        self._keep(one, 0, self._pages(one.held))

    def _keep(self, one: _Paged, first: int, end: int) -> None:
        """Keeps the pages first ... end - 1 of a sequence's table, and lets go of the others."""
        numbers = one.table.numbers
        if first or end < len(numbers):
            self.stock.let_go(np.concatenate([numbers[:first], numbers[end:]]))
            one.table = Table(numbers[first:end])
            one.start += first * self.size

    # --- one row ------------------------------------------------------------------------------------------------------

    def extend(self, rows: int) -> None:
        """Makes room for so many rows in all."""
        self._rows += [_Paged() for _ in range(rows - len(self._rows))]
        self._extend_pools(rows)

    def reserve(self, tokens: Mapping[int, int]) -> None:
        """Nothing: appending never moves anything."""

    def clear(self, row: int) -> None:
        """Makes a row ready for another sequence."""
        self._put(row, _Paged())
        self._zero(row)

    def copy(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Makes the second row of each pair what the first is; they share its pages."""
        for source, target in pairs:
            self._changed(source)
            self._put(target, self._rows[source].copy())
            for pool in self._pools.values():
                pool[target] = pool[source]

    def keep(self, row: int) -> Kept:
        """The present token boundary of a row, which any row can continue from."""
        self._changed(row)
        return Kept(self.stock, self._rows[row].copy(), {n: pool[row].clone() for n, pool in self._pools.items()})

    def continue_from(self, row: int, kept: Kept) -> None:
        """Makes a row stand at a token boundary that was kept."""
        self._put(row, kept.row.copy())
        for name, pool in self._pools.items():
            pool[row] = kept.pools[name]

    def save(self, row: int) -> Kept | None:
        """What truncation could not bring back, for `load`; None where it brings back all."""
        return None if self.window is None and not self._pools else self.keep(row)

    def load(self, row: int, saved: Kept | None, length: int) -> None:
        """Returns a row to where `save` was called, at `length` tokens."""
        if saved is None:
            self._cut(row, length)
        else:
            self.continue_from(row, saved)

    def _put(self, row: int, one: _Paged) -> None:
        """Puts a sequence in place of a row's, whose pages are let go."""
        self.stock.hold(one.table.numbers)
        self.stock.let_go(self._rows[row].table.numbers)
        self._rows[row] = one

    def reserved_bytes(self, row: int | None = None) -> int:
        """Bytes of a row's pages, those that others hold as well included; or of all there are."""
        if row is None:
            return sum(array.nbytes for array in (*self._arrays.values(), *self._pools.values()))
        fixed = sum(entry.bytes(self.dtype) for entry in self._fixed.values())
        return len(self._rows[row].table.numbers) * self._page_bytes + fixed
