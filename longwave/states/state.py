"""The state of a set of sequences: every part's memory, with snapshot, rollback, truncation and reordering."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor

from longwave.errors import UserError
from longwave.states.extents import Extents
from longwave.states.memory import Memory, NoMemory, Store
from longwave.states.pages import Kept, PageOptions, Pages, Usage
from longwave.states.spec import StateSpec
from longwave.streams import Continued, Stream
from longwave.units import LAST_PLACE


@dataclass(eq=False)
class _Sequence:
    """A sequence: its row in every store, the tokens seen, and the length of every cut made so far."""

    row: int
    seen: int = 0
    cuts: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Snapshot:
    """A token boundary of one sequence that `State.restore` returns to; what no part can forget is not copied."""

    sequence: _Sequence
    seen: int
    cuts: int
    lengths: tuple[int, ...]
    copies: tuple[Any, ...]


@dataclass(eq=False)
class Branch:
    """A token boundary of a state, kept for any slot to continue from, also after its sequence is gone.

    seen: its tokens. kept: what every store keeps of it; empty once it was dropped.
    """

    state: State
    seen: int
    kept: tuple[Kept, ...]

    def reaches(self, length: int) -> bool:
        """Whether a slot can continue from fewer tokens of it: where nothing recurs and no window has forgotten."""
        forgets = any(spec.forgets for spec in self.state.specs.values())
        return length == self.seen or (0 <= length < self.seen and not forgets)

    @property
    def nbytes(self) -> int:
        """Bytes of what it copies; what it shares is in pages."""
        return sum(kept.nbytes for kept in self.kept)

    def drop(self) -> None:
        """Lets go of its pages; dropping it again does nothing."""
        for kept in self.kept:
            kept.drop()
        self.kept = ()


class State:
    """The memory of a model for `slots` sequences.

    specs: what each part declares, by the part's name. Parts that grow alike (one kind of store, level and window)
    share a store. pages: keeps tokens in pages, with room for so many; by default each sequence has an extent that
    grows.
    """

    def __init__(
        self,
        specs: Mapping[str, StateSpec],
        slots: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        pages: PageOptions | None = None,
    ) -> None:
        usual: Any = Extents if pages is None else partial(Pages, options=pages)
        self.specs, self.dtype, self.device = dict(specs), dtype, torch.device(device)
        alike: dict[Any, dict[str, StateSpec]] = {}
        for part, spec in specs.items():
            alike.setdefault((spec.store or usual, spec.level, spec.window), {})[part] = spec
        self._stores: list[Store] = []
        self._store_of: dict[str, Store] = {}
        self._levels: dict[int, list[Store]] = {}
        for (kind, level, _), group in alike.items():
            store: Store = kind(group, slots, dtype=dtype, device=self.device)
            self._stores.append(store)
            self._levels.setdefault(level, []).append(store)
            self._store_of |= dict.fromkeys(group, store)
        self._sequences = [_Sequence(row) for row in range(slots)]
        self._free: list[int] = []
        self._rows = slots
        self._open: Stream | None = None
        self._is_postponed = False

    @property
    def slots(self) -> int:
        """The number of sequences that there is room for."""
        return len(self._sequences)

    @property
    def seen(self) -> list[int]:
        """Tokens of each sequence that have been run, at the outermost level."""
        return [sequence.seen for sequence in self._sequences]

    def lengths(self, level: int = -1) -> list[int]:
        """Tokens of each sequence that have reached a level (a resampler's index); -1, the outermost, sees all."""
        if level < 0:
            return self.seen
        store = self._levels[level][0]
        return [store.length(sequence.row) for sequence in self._sequences]

    def places(self, level: int, slot: int) -> Int64[Tensor, " n"]:
        """Where the tokens of one slot stand in their sequence that have reached a level."""
        part, spec = next((p, s) for p, s in self.specs.items() if s.level == level and s.places is not None)
        assert spec.places is not None
        return self.view(part, spec.places, slot).flatten().long()

    def view(self, part: str, name: str, slot: int) -> Tensor:
        """The held entries (heads, n, size) of an array of one slot, or its per-sequence array; to be read only."""
        return self._store_of[part].view(part, name, self._sequences[slot].row)

    def part(self, part: str, stream: Stream) -> Memory:
        """The memory of one part for the stream at hand."""
        if part not in self._store_of:
            raise UserError(f"state: it remembers nothing for {part}; take one from model.state(...) of this model")
        return self._store_of[part].memory(part, stream)

    def stream(self, lengths: Sequence[int], slots: Sequence[int] | None = None) -> Stream:
        """The stream of `lengths[r]` new tokens that continue slot `slots[r]` (0, 1, ... by default)."""
        slots = range(len(lengths)) if slots is None else slots
        if any(not 0 <= slot < self.slots for slot in slots):
            raise UserError(f"slots {list(slots)} are not all among the {self.slots} of this state")
        if len(set(slots)) != len(slots):
            raise UserError(f"slots {list(slots)} name a sequence twice")
        if len(lengths) != len(slots):
            raise UserError(f"lengths {list(lengths)}: {len(slots)} slots need as many")
        starts = [self._sequences[slot].seen for slot in slots]
        longest = max([start + length for start, length in zip(starts, lengths, strict=True)], default=0)
        if longest > LAST_PLACE + 1:
            raise UserError(f"a sequence of {longest:,} tokens: places are counted up to {LAST_PLACE:,}")
        self._open = None
        for store in self._stores:
            store.begin()
        rows = tuple([self._sequences[slot].row for slot in slots])
        continued = Continued(tuple(slots), rows, torch.tensor(rows, dtype=torch.int64, device=self.device))
        return replace(Stream.of(lengths, starts=starts, device=self.device), continued=continued)

    def advance(self, stream: Stream) -> None:
        """Counts the tokens of `stream` as seen, once every part has run them; or later, when `settle` is called."""
        self._open = stream
        if not self._is_postponed:
            self.settle()

    @contextmanager
    def postponed(self) -> Iterator[None]:
        """A stream that runs while the block does counts when `settle` is called, which may leave some of it out."""
        self._is_postponed = True
        try:
            yield
        finally:
            self._is_postponed = False

    def settle(self, undone: Collection[int] = ()) -> None:
        """Counts the tokens of the stream that has just run as seen, but for those of the slots in `undone`.

        These stand where they stood before, what recurs included; no copy is made for it.
        """
        if (stream := self._open) is None:
            return
        assert stream.continued is not None
        for slot, length in zip(stream.continued.slots, stream.lengths, strict=True):
            self._sequences[slot].seen += 0 if slot in undone else length
        rows = {self._sequences[slot].row for slot in undone}
        for store in self._stores:
            store.close(rows)
        self._open = None

    def reserve(self, tokens: int | Mapping[int, int], slots: Sequence[int] | None = None) -> None:
        """Makes room for `tokens` tokens per sequence, of each level if they are given by level, where no window is."""
        rows = [self._sequences[slot].row for slot in (range(self.slots) if slots is None else slots)]
        for level, stores in self._levels.items():
            count = tokens if isinstance(tokens, int) else tokens.get(level, 0)
            for store in stores:
                if store.window is None:
                    store.reserve(dict.fromkeys(rows, count))

    def make_room(self, tokens: int) -> None:
        """Makes room for so many more tokens of every sequence, so that they move nothing."""
        for store in self._stores:
            store.reserve({one.row: store.held(one.row) + tokens for one in self._sequences})

    def snapshot(self, slot: int) -> Snapshot:
        """Remembers where slot `slot` stands: lengths, and copies of what a window or a recurrence forgets."""
        one = self._sequences[slot]
        lengths = tuple(store.length(one.row) for store in self._stores)
        copies = tuple(store.save(one.row) for store in self._stores)
        return Snapshot(one, one.seen, len(one.cuts), lengths, copies)

    def restore(self, snapshot: Snapshot) -> None:
        """Returns the snapshot's sequence to where it stood; later tokens are forgotten. It can be used again.

        ValueError if the sequence is gone or has since been cut below the snapshot.
        """
        sequence = snapshot.sequence
        if not any(sequence is one for one in self._sequences):
            raise ValueError("the snapshot's sequence is no longer in this state")
        if min(sequence.cuts[snapshot.cuts :], default=snapshot.seen) < snapshot.seen:
            raise ValueError(f"the sequence was cut below token {snapshot.seen}, where the snapshot stands")
        for store, saved, length in zip(self._stores, snapshot.copies, snapshot.lengths, strict=True):
            store.load(sequence.row, saved, length)
        sequence.seen = snapshot.seen
        sequence.cuts.append(snapshot.seen)

    def branch(self, slot: int) -> Branch:
        """Keeps the token boundary at which a slot stands, for any slot to continue from (`continue_from`).

        Pages are shared, what recurs is copied. UserError unless all of the state is in pages.
        """
        one = self._sequences[slot]
        return Branch(self, one.seen, tuple(store.keep(one.row) for store in self._paged()))

    def continue_from(self, slot: int, branch: Branch, length: int | None = None) -> None:
        """Makes an empty slot stand at a branch, or at fewer tokens of it, if `branch.reaches(length)`.

        ValueError if the slot is not empty, the branch dropped or of another state, or the length out of reach.
        """
        one, length = self._sequences[slot], branch.seen if length is None else length
        if branch.state is not self or not branch.kept:
            raise ValueError("the branch is not of this state, or was dropped")
        if one.seen:
            raise ValueError(f"slot {slot} has {one.seen} tokens; release it first")
        if not branch.reaches(length):
            raise ValueError(f"the branch at {branch.seen} tokens does not reach length {length}")
        for store, kept in zip(self._paged(), branch.kept, strict=True):
            store.continue_from(one.row, kept)
        one.seen = branch.seen
        if length < branch.seen:
            self.truncate(slot, length)

    def usage(self) -> tuple[Usage, ...]:
        """How many pages every store has and how many are free; UserError unless all of the state is in pages."""
        return tuple(store.usage for store in self._paged())

    def _paged(self) -> Sequence[Pages]:
        paged = [store for store in self._stores if isinstance(store, Pages)]
        if len(paged) < len(self._stores):
            raise UserError("state: not in pages; make it by model.state(slots, pages=PageOptions(...))")
        return paged

    def hold(self, slot: int) -> None:
        """From now on `truncate` can return to any place that does not lie before the present one of a slot.

        Until the next call, parts with a window forget nothing that this needs; it costs no copy, unlike `snapshot`.
        Recurrent parts cannot: `truncate` refuses.
        """
        for store in self._stores:
            store.hold(self._sequences[slot].row)

    def truncate(self, slot: int, length: int) -> None:
        """Forgets the tokens of a slot from place `length` on, at every level.

        ValueError if the slot has fewer tokens, or what would be visible again is forgotten; nothing is changed then.
        """
        one = self._sequences[slot]
        if not 0 <= length <= one.seen:
            raise ValueError(f"length {length} is outside the {one.seen} tokens of slot {slot}")
        kept = {level: self._kept_before(level, one.row, length) for level in self._levels}
        for level, stores in self._levels.items():
            for store in stores:
                store.check_truncation(one.row, kept[level])
        for level, stores in self._levels.items():
            for store in stores:
                store.truncate(one.row, kept[level])
        one.seen = length
        one.cuts.append(length)

    def _kept_before(self, level: int, row: int, length: int) -> int:
        """Tokens of a level that stand before place `length` of the sequence; the outermost level keeps all."""
        if level < 0:
            return length
        located = next(s for s in self._levels[level] if any(one.places is not None for one in s.specs.values()))
        return located.kept_before(row, length)

    def reorder(self, sources: Sequence[int]) -> None:
        """Slot i becomes what slot `sources[i]` was (beam search); a slot that is named twice is copied."""
        old, pairs, used = self._sequences, list[tuple[int, int]](), set[int]()
        for slot in set(range(len(old))) - set(sources):
            self._let_go(old[slot])
        self._make_rows(len(sources) - len(set(sources)))
        self._sequences = []
        for source in sources:
            one = old[source]
            if source in used:
                pairs.append((one.row, self._free.pop()))
                one = _Sequence(pairs[-1][1], one.seen, list(one.cuts))
            self._sequences.append(one)
            used.add(source)
        for store in self._stores:
            store.copy(pairs)

    def release(self, slot: int) -> None:
        """Empties a slot for another sequence."""
        self._let_go(self._sequences[slot])
        self._sequences[slot] = _Sequence(self._free.pop())

    def _let_go(self, sequence: _Sequence) -> None:
        for store in self._stores:
            store.clear(sequence.row)
        self._free.append(sequence.row)

    def _make_rows(self, count: int) -> None:
        """Sees to it that so many rows are free."""
        new = count - len(self._free)
        if new > 0:
            self._free += range(self._rows, self._rows + new)
            self._rows += new
            for store in self._stores:
                store.extend(self._rows)

    def used_bytes(self, slot: int | None = None) -> int:
        """Bytes of what later tokens can see, of one slot or of all."""
        chosen = self._sequences if slot is None else [self._sequences[slot]]
        return sum(store.used_bytes(one.row) for one in chosen for store in self._stores)

    def reserved_bytes(self, slot: int | None = None) -> int:
        """Bytes allocated, of one slot or of all."""
        row = None if slot is None else self._sequences[slot].row
        return sum(store.reserved_bytes(row) for store in self._stores)


def memory_of(state: State | None, part: str, stream: Stream) -> Memory:
    """The memory of a part for the stream at hand, which without a state remembers nothing."""
    return NoMemory(stream) if state is None else state.part(part, stream)
