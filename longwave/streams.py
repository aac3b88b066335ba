"""The stream: a batch of token runs laid end to end, without padding - the one data shape inside the model.

Legend: `T` tokens of the stream, `R` runs, `W` training windows, `O` rows whose outputs are needed, `N` entries.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import accumulate, pairwise
from typing import Any, TypeAlias, TypeVar, cast

import numpy as np
import torch
from jaxtyping import Bool, Int32, Int64
from numpy.typing import NDArray
from torch import Tensor

from longwave.errors import UserError
from longwave.trees import Tree, tree_of

T = TypeVar("T")
Spans: TypeAlias = "Sequence[tuple[int, int]]"  # first entry and end of each run, on the host


_CPU = torch.device("cpu")


def to_host(numbers: Int64[Tensor, " n"]) -> tuple[int, ...]:
    """Integers of a device, read by the host: the one place where a forward waits for its device."""
    return tuple(cast("list[int]", numbers.tolist()))  # pyright: ignore[reportUnknownMemberType]


class Runs:
    """Where the runs of a stream begin and end. Made once per step and level, and shared by all layers there.

    bounds: the row where each run begins, and T at the end, on the stream's device. tokens: T. lengths: tokens of each
    run as host integers, where they are known; otherwise they are read when first asked for, which waits for the
    device. most: an upper bound of the longest run, which needs no reading. tree: the drafts among the tokens, where
    some are on different paths, so that not every token sees all that stand before it.
    """

    def __init__(
        self,
        bounds: Int64[Tensor, " ends"],
        tokens: int,
        lengths: tuple[int, ...] | None = None,
        most: int | None = None,
        tree: Tree | None = None,
    ) -> None:
        self.bounds, self.tokens, self._lengths, self.tree = bounds, tokens, lengths, tree
        self._most = tokens if most is None else min(most, tokens)
        self._notes: dict[object, Any] = {}

    @classmethod
    def of(cls, lengths: Sequence[int], device: torch.device | str = "cpu") -> Runs:
        """Runs of the given lengths, end to end."""
        given: Sequence[Any] = lengths
        if not all(isinstance(length, int) and length >= 0 for length in given):
            raise UserError(f"lengths {list(given)}: the number of tokens of each run, 0 or more")
        bounds = torch.tensor([0, *accumulate(lengths)], device=device)
        return cls(bounds, sum(lengths), tuple(lengths))

    @property
    def count(self) -> int:
        """R, empty runs included."""
        return self.bounds.shape[0] - 1

    @property
    def is_read(self) -> bool:
        """Whether the host knows the lengths."""
        return self._lengths is not None

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each run."""
        if self._lengths is None:
            self._lengths = to_host(self.sizes)
        return self._lengths

    @property
    def most(self) -> int:
        """At least the tokens of the longest run; exactly, where the host knows the lengths."""
        return self._most if self._lengths is None else self.longest

    def once(self, key: object, make: Callable[[], T]) -> T:
        """A value that an op derives from the runs: made for the first layer of a step, kept for the others."""
        if key not in self._notes:
            self._notes[key] = make()
        return self._notes[key]

    def visible(self) -> list[Bool[Tensor, "L L"]]:
        """For each run which of its tokens each of them sees, where there is a tree."""
        tree = self.tree
        assert tree is not None
        return self.once("visible", lambda: [tree.visible(*span) for span in pairwise((0, *accumulate(self.lengths)))])

    @cached_property
    def longest(self) -> int:
        """Tokens of the longest run."""
        return max(self.lengths, default=0)

    @cached_property
    def are_equal(self) -> bool:
        """Whether all runs have one length."""
        return len(set(self.lengths)) == 1

    @cached_property
    def sizes(self) -> Int64[Tensor, " R"]:
        """The lengths, on the device."""
        return self.bounds.diff()

    @cached_property
    def of_token(self) -> Int64[Tensor, " T"]:
        """The run that each row belongs to."""
        return torch.repeat_interleave(self.sizes, output_size=self.tokens)

    @cached_property
    def places(self) -> Int64[Tensor, " T"]:
        """The place of each row in its run, counted from 0."""
        rows = torch.arange(self.tokens, device=self.bounds.device)
        if self.count == 1:
            return rows
        return rows - self.bounds.index_select(0, self.of_token)

    @cached_property
    def bounds32(self) -> Int32[Tensor, " ends"]:
        """The bounds in the type that kernels take them in; a normal tensor, so that training can keep it."""
        with torch.inference_mode(False):
            return self.bounds.clone().to(torch.int32)


@dataclass(frozen=True, eq=False)
class Table:
    """The pages of one run, in order: page p of an array has `size` entries, from number p * size on.

    numbers: of the pages, on the host. The place of an entry in its run, divided by the size, says which page it is in.
    """

    numbers: NDArray[np.int32]

    @cached_property
    def follow(self) -> bool:
        """Whether the pages follow each other, so that the run's entries do."""
        return _follow(self.numbers)

    def entries(self, size: int, begin: int, end: int, device: torch.device) -> slice | Int64[Tensor, " n"]:
        """The numbers of the entries at places begin ... end - 1: as a slice of the array where they follow each other.

        size: entries of a page.
        """
        first = begin // size
        numbers = self.numbers[first : -(-end // size)]
        if self.follow or _follow(numbers):
            offset = (int(numbers[0]) - first) * size if len(numbers) else -begin
            return slice(offset + begin, offset + max(begin, end))
        every = numbers[:, None].astype(np.int64) * size + np.arange(size)
        return _on(device, every.ravel()[begin - first * size : end - first * size])


def _on(device: torch.device, numbers: NDArray[Any]) -> Tensor:
    return torch.from_numpy(numbers).to(device)  # pyright: ignore[reportUnknownMemberType]


def _follow(numbers: NDArray[np.int32]) -> bool:
    return bool((numbers[1:] - numbers[:-1] == 1).all())


class Located:
    """Where the entries of each run lie in an array of N entries, as the host knows it.

    spans: run `r` has the entries at places spans[r][0] to spans[r][1] - 1. A place is the number of an entry. Where
    there are tables (one for each run) and a page size, it is counted in the run's own pages instead, and `entries`
    says which entries those are.
    """

    def __init__(
        self,
        spans: Spans | None,
        tables: Sequence[Table] | None = None,
        size: int = 0,
        device: torch.device = _CPU,
    ) -> None:
        self._spans: Spans | None = spans
        self.tables, self.size, self.device = tables, size, device

    @property
    def spans(self) -> Spans:
        """First place and end of each run, on the host."""
        assert self._spans is not None
        return self._spans

    @cached_property
    def pages(self) -> Int32[Tensor, "R M"] | None:
        """The numbers of each run's pages, on the device, filled up with 0; None where places are entries."""
        if self.tables is None:
            return None
        found = np.zeros((len(self.tables), max([len(one.numbers) for one in self.tables], default=0)), np.int32)
        for row, table in zip(found, self.tables, strict=True):
            row[: len(table.numbers)] = table.numbers
        return _on(self.device, found)

    def entries(self, run: int, span: tuple[int, int] | None = None) -> slice | Int64[Tensor, " n"]:
        """The numbers of a run's entries, or of those in a span of its places: a slice where they follow each other."""
        begin, end = self.spans[run] if span is None else span
        if self.tables is None:
            return slice(begin, end)
        return self.tables[run].entries(self.size, begin, end, self.device)

    def is_broken(self, run: int) -> bool:
        """Whether a run's pages do not follow each other."""
        return self.tables is not None and not self.tables[run].follow

    def of(self, array: Tensor, run: int) -> Tensor:
        """The entries (G, n, K) of a run in an array (G, N, K): a view where they follow each other, else a copy."""
        return chosen(array, self.entries(run))


class Places(Located):
    """Where the entries of each run lie (see `Located`): run `r` has those at places begins[r] to ends[r] - 1.

    begins, ends: on the stream's device. spans: the same as host integers, where they are known; otherwise they are
    read when first asked for.
    """

    def __init__(
        self,
        begins: Int64[Tensor, " R"],
        ends: Int64[Tensor, " R"],
        spans: Spans | None = None,
        tables: Sequence[Table] | None = None,
        size: int = 0,
    ) -> None:
        super().__init__(spans, tables, size, begins.device)
        self.begins, self.ends = begins, ends

    @property
    def spans(self) -> Spans:
        if self._spans is None:
            self._spans = list(zip(to_host(self.begins), to_host(self.ends), strict=True))
        return self._spans

    def at(self, run: Int64[Tensor, " *n"], place: Int64[Tensor, " *n"]) -> Int64[Tensor, " *n"]:
        """The number of the entry at each of these places of these runs."""
        if self.pages is None:
            return place
        return self.pages[run, place // self.size].long() * self.size + place % self.size

    def until(self, ends: Int64[Tensor, " R"], spans: Spans) -> Places:
        """The same runs up to other ends, which `spans` tells the host."""
        return Places(self.begins, ends, spans, self.tables, self.size)


def chosen(array: Tensor, entries: slice | Int64[Tensor, " n"]) -> Tensor:
    """Entries (G, n, K) of an array (G, N, K): a view for a slice, a copy for numbers."""
    return array[:, entries] if isinstance(entries, slice) else array.index_select(1, entries)


@dataclass(frozen=True)
class Windows:
    """Training windows: groups of whole runs among which a resampler may rank its tokens.

    sizes: tokens of each window, in the order of the stream; they add up to T.
    samples: the index of each window in the data order, which keys its random draws.
    of_runs: the window that each run lies in, on the host and on the device; ids: the samples, on the device. A stream
        fills them in.
    """

    sizes: tuple[int, ...]
    samples: tuple[int, ...]
    of_runs: tuple[int, ...] = field(default=(), compare=False, repr=False)
    index: Int64[Tensor, " R"] | None = field(default=None, compare=False, repr=False)
    ids: Int64[Tensor, " W"] | None = field(default=None, compare=False, repr=False)

    @classmethod
    def each(cls, runs: Runs) -> Windows:
        """Every run as a window of its own, numbered as they come."""
        index = torch.arange(runs.count, device=runs.bounds.device)
        samples = tuple(range(runs.count))
        return cls(runs.lengths, samples, samples, index, index)

    def over(self, runs: Runs) -> Windows:
        """These windows over the runs of a stream."""
        device, of_runs = runs.bounds.device, _window_of_runs(runs.lengths, self.sizes)
        ids = torch.tensor(self.samples, dtype=torch.int64, device=device)
        return replace(self, of_runs=of_runs, index=torch.tensor(of_runs, dtype=torch.int64, device=device), ids=ids)

    @property
    def are_runs(self) -> bool:
        """Whether every window is one run."""
        return self.of_runs == tuple(range(len(self.sizes)))

    def resized(self, sizes: tuple[int, ...]) -> Windows:
        """A copy whose windows have other numbers of tokens, as after a level has dropped some."""
        return replace(self, sizes=sizes)

    def by_run(self, runs: Runs) -> Windows:
        """Every run as a window of its own that keeps the sample of the window it lay in."""
        assert self.ids is not None
        assert self.index is not None
        samples = tuple([self.samples[window] for window in self.of_runs])
        each = torch.arange(runs.count, device=self.ids.device)
        return Windows(runs.lengths, samples, tuple(range(runs.count)), each, self.ids.index_select(0, self.index))


def _window_of_runs(lengths: tuple[int, ...], sizes: tuple[int, ...]) -> tuple[int, ...]:
    windows, window, left = list[int](), 0, sum(sizes[:1])
    for length in lengths:
        while left == 0 and window + 1 < len(sizes):
            window += 1
            left = sizes[window]
        windows.append(window)
        left -= length
    return tuple(windows)


@dataclass(frozen=True)
class Continued:
    """The sequences of a state that the runs of a stream continue.

    slots: of the state. rows: where their memory lies, as integers of the host and, as `index`, on the device.
    """

    slots: tuple[int, ...]
    rows: tuple[int, ...]
    index: Int64[Tensor, " R"]


@dataclass(frozen=True)
class Stream:
    """The description of the rows of `hidden (T, D)` that all layers share.

    runs: where each run begins and ends. A run is a piece of one sequence (in training, of one document), and attention
        never leaves it.
    order: each token's place in its sequence, which causality goes by.
    positions: what rotation goes by; the same tensor as `order` unless a position scheme says otherwise.
    continued: the sequences that the runs continue, or None without a state.
    windows: the training windows, or None outside training.
    outputs: rows whose outputs are needed, or None for all.
    passengers: per-token tensors (T, ...) that travel along when a resampler gathers tokens.
    """

    runs: Runs
    order: Int64[Tensor, " T"]
    positions: Int64[Tensor, " T"]
    continued: Continued | None = None
    windows: Windows | None = None
    outputs: Int64[Tensor, " O"] | None = None
    passengers: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])

    @classmethod
    def of(
        cls,
        lengths: Sequence[int],
        *,
        starts: Sequence[int] | None = None,
        windows: Windows | None = None,
        device: torch.device | str = "cpu",
    ) -> Stream:
        """A stream of runs, run `r` beginning at place `starts[r]` (0 by default) of its sequence."""
        runs = Runs.of(lengths, device)
        if starts is not None and len(starts) != len(lengths):
            raise UserError(f"starts {list(starts)}: {len(lengths)} runs need as many")
        order = runs.places
        if starts is not None and len(starts) == 1:
            order = order + starts[0]
        elif starts is not None and any(starts):
            order = order + torch.tensor(list(starts), device=device).index_select(0, runs.of_token)
        return cls(runs, order, order, windows=None if windows is None else windows.over(runs))

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each run, as host integers."""
        return self.runs.lengths

    @property
    def tokens(self) -> int:
        """T, the rows of the stream."""
        return self.runs.tokens

    def last_rows(self, counts: Sequence[int] | None = None) -> Stream:
        """A copy in which outputs are needed at the last row of each run that has one, as for the next token.

        counts: at how many of the last rows of each run instead.
        """
        lengths, bounds = self.lengths, self.runs.bounds[1:]
        counts = [min(length, 1) for length in lengths] if counts is None else counts
        if all(count == 1 for count in counts):
            return replace(self, outputs=bounds - 1)
        ends = accumulate(lengths)
        rows = [row for end, count in zip(ends, counts, strict=True) for row in range(end - count, end)]
        return replace(self, outputs=torch.tensor(rows, dtype=torch.int64, device=bounds.device))

    def branching(self, parents: Sequence[Sequence[int]]) -> Stream:
        """A copy whose runs end in drafts on several paths (`longwave.trees`).

        parents: for the last tokens of each run, the number of the draft that each follows; -1 for the text.
        """
        tree, early = tree_of(self.lengths, parents, self.order.device)
        runs = Runs(self.runs.bounds, self.runs.tokens, self.lengths, tree=tree)
        order = self.order - early
        return replace(self, runs=runs, order=order, positions=order)

    def carrying(self, **passengers: Tensor) -> Stream:
        """A copy with more passengers."""
        return replace(self, passengers={**self.passengers, **passengers})

    def gather(self, rows: Int64[Tensor, " K"], runs: Runs, windows: Windows | None = None) -> Stream:
        """The stream of the given rows (ascending), whose runs are `runs`: as many as here, some of them empty."""
        order = self.order.index_select(0, rows)
        positions = order if self.positions is self.order else self.positions.index_select(0, rows)
        passengers = {name: value.index_select(0, rows) for name, value in self.passengers.items()}
        runs.tree = None if self.runs.tree is None else self.runs.tree.gather(rows)
        return Stream(runs, order, positions, self.continued, windows, None, passengers)
