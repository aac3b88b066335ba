"""The state of a set of sequences: every part's memory, with snapshot, rollback, truncation and reordering."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from longwave.errors import UserError
from longwave.states.extents import Extents
from longwave.states.spec import StateSpec
from longwave.stream import Stream
from longwave.units import LAST_PLACE


@dataclass(eq=False)
class _Sequence:
    """The memory of one sequence: its parts, the tokens seen, and the length of every cut made so far."""

    parts: dict[str, Extents]
    seen: int = 0
    cuts: list[int] = field(default_factory=list)

    def copy(self) -> _Sequence:
        return _Sequence({name: part.copy() for name, part in self.parts.items()}, self.seen, list(self.cuts))


@dataclass(frozen=True)
class Snapshot:
    """A token boundary of one sequence that `State.restore` returns to; what no part can forget is not copied."""

    sequence: _Sequence
    seen: int
    cuts: int
    lengths: Mapping[str, int]
    copies: Mapping[str, Extents]


class State:
    """What a model remembers of `slots` sequences.

    specs: what each part declares, by the part's name.
    """

    def __init__(
        self,
        specs: Mapping[str, StateSpec],
        slots: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        self.specs, self.dtype, self.device = dict(specs), dtype, torch.device(device)
        self._sequences = [self._fresh() for _ in range(slots)]

    @property
    def slots(self) -> int:
        """How many sequences there is room for."""
        return len(self._sequences)

    @property
    def seen(self) -> list[int]:
        """Tokens of each sequence that have been run, at the outermost level."""
        return [sequence.seen for sequence in self._sequences]

    def of(self, part: str, slot: int) -> Extents:
        """The memory of one part for one slot."""
        return self._sequences[slot].parts[part]

    def stream(self, lengths: Sequence[int], slots: Sequence[int] | None = None) -> Stream:
        """The stream of `lengths[r]` new tokens that continue slot `slots[r]` (0, 1, ... by default)."""
        slots = range(len(lengths)) if slots is None else slots
        if any(not 0 <= slot < self.slots for slot in slots):
            raise ValueError(f"slots {list(slots)} are not all among the {self.slots} of this state")
        if len(set(slots)) != len(slots):
            raise ValueError(f"slots {list(slots)} name a sequence twice")
        starts = [self._sequences[slot].seen for slot in slots]
        longest = max((start + length for start, length in zip(starts, lengths, strict=True)), default=0)
        if longest > LAST_PLACE + 1:
            raise UserError(f"a sequence of {longest:,} tokens: places are counted up to {LAST_PLACE:,}")
        return Stream.of(lengths, starts=starts, slots=slots, device=self.device)

    def advance(self, stream: Stream) -> None:
        """Counts the tokens of `stream` as seen, once every part has run them."""
        assert stream.slots is not None
        for slot, length in zip(stream.slots, stream.lengths, strict=True):
            self._sequences[slot].seen += length

    def reserve(self, tokens: int, slots: Sequence[int] | None = None) -> None:
        """Makes room for `tokens` tokens per sequence in every part without a window."""
        for slot in range(self.slots) if slots is None else slots:
            for part in self._sequences[slot].parts.values():
                if part.spec.window is None:
                    part.reserve(tokens)

    def snapshot(self, slot: int) -> Snapshot:
        """Remembers where slot `slot` stands: lengths, and copies of what a window or a recurrence forgets."""
        sequence = self._sequences[slot]
        copies = {name: part.copy() for name, part in sequence.parts.items() if part.spec.forgets}
        lengths = {name: part.length for name, part in sequence.parts.items()}
        return Snapshot(sequence, sequence.seen, len(sequence.cuts), lengths, copies)

    def restore(self, snapshot: Snapshot) -> None:
        """Returns the snapshot's sequence to where it stood; later tokens are forgotten. It can be used again.

        ValueError if the sequence is gone or has since been cut below the snapshot.
        """
        sequence = snapshot.sequence
        if not any(sequence is one for one in self._sequences):
            raise ValueError("the snapshot's sequence is no longer in this state")
        if min(sequence.cuts[snapshot.cuts :], default=snapshot.seen) < snapshot.seen:
            raise ValueError(f"the sequence was cut below token {snapshot.seen}, where the snapshot stands")
        for name, length in snapshot.lengths.items():
            if name in snapshot.copies:
                sequence.parts[name] = snapshot.copies[name].copy()
            else:
                sequence.parts[name].truncate(length)
        sequence.seen = snapshot.seen
        sequence.cuts.append(snapshot.seen)

    def hold(self, slot: int) -> None:
        """From now on `truncate` can return to any place that does not lie before the present one of a slot.

        Until the next call, parts with a window forget nothing that this needs; it costs no copy, unlike `snapshot`.
        Recurrent parts cannot: `truncate` refuses.
        """
        for part in self._sequences[slot].parts.values():
            part.hold()

    def truncate(self, slot: int, length: int) -> None:
        """Forgets the tokens of a slot from place `length` on, at every level.

        ValueError if the slot has fewer tokens, or what would be visible again is forgotten; nothing is changed then.
        """
        sequence = self._sequences[slot]
        if not 0 <= length <= sequence.seen:
            raise ValueError(f"length {length} is outside the {sequence.seen} tokens of slot {slot}")
        levels = {part.spec.level for part in sequence.parts.values()}
        kept = {level: _kept_before(sequence, level, length) for level in levels}
        for part in sequence.parts.values():
            part.check_truncation(kept[part.spec.level])
        for part in sequence.parts.values():
            part.truncate(kept[part.spec.level])
        sequence.seen = length
        sequence.cuts.append(length)

    def reorder(self, sources: Sequence[int]) -> None:
        """Slot i becomes what slot `sources[i]` was (beam search); a slot that is named twice is copied."""
        old = self._sequences
        used: set[int] = set()
        self._sequences = []
        for source in sources:
            self._sequences.append(old[source].copy() if source in used else old[source])
            used.add(source)

    def release(self, slot: int) -> None:
        """Empties a slot for another sequence."""
        self._sequences[slot] = self._fresh()

    def used_bytes(self, slot: int | None = None) -> int:
        """Bytes of what later tokens can see, of one slot or of all."""
        return sum(part.used_bytes for part in self._parts(slot))

    def reserved_bytes(self, slot: int | None = None) -> int:
        """Bytes allocated, of one slot or of all."""
        return sum(part.reserved_bytes for part in self._parts(slot))

    def _parts(self, slot: int | None) -> list[Extents]:
        chosen = self._sequences if slot is None else [self._sequences[slot]]
        return [part for sequence in chosen for part in sequence.parts.values()]

    def _fresh(self) -> _Sequence:
        return _Sequence({name: Extents(spec, self.dtype, self.device) for name, spec in self.specs.items()})


def _kept_before(sequence: _Sequence, level: int, length: int) -> int:
    """Tokens of a level that stand before place `length` of the sequence; the outermost level, -1, keeps all."""
    if level < 0:
        return length
    parts = (part for part in sequence.parts.values() if part.spec.level == level and "order" in part.spec.per_token)
    return int(torch.searchsorted(next(parts).view("order").flatten(), length))
