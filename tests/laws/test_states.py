"""States: what is remembered of a sequence is its own, no more than is declared, and never memory not written.

Stores are compared with plain Python lists, over several rows at once.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import accumulate, pairwise
from typing import Any

import pytest
import torch
from contract import (
    CASES,
    CLOSE,
    VOCABULARY,
    WINDOW,
    Case,
    alone,
    by_itself,
    company,
    decoder,
    distance,
    in_pieces,
    model_of,
    reordering,
    rows_run,
    snapshots,
    step,
    truncation,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from list_store import ListStore
from torch import Tensor

from longwave.errors import UserError
from longwave.mixers import FullAttention
from longwave.model import Decoder
from longwave.part import Part
from longwave.resamplers.subllm import Subllm
from longwave.states import (
    Extents,
    Memory,
    PageOptions,
    Pages,
    PerSequence,
    PerToken,
    State,
    StateSpec,
    Store,
)
from longwave.streams import Continued, Stream

every_case = pytest.mark.parametrize("name", CASES)
KEY, ORDER, SUMS = PerToken(2, 3), PerToken(1, 1, torch.int32), PerToken(2, 3, width=3, every=2)


def tokens_from(seed: int, count: int) -> list[int]:
    return random.Random(seed).choices(range(VOCABULARY), k=count)


def stream_of(rows: Sequence[int], lengths: Sequence[int]) -> Stream:
    """The stream of so many new tokens of these rows of a store."""
    rows = tuple(rows)
    return replace(Stream.of(lengths), continued=Continued(rows, rows, torch.tensor(rows, dtype=torch.int64)))


def extents_of(spec: StateSpec, rows: int = 1, dtype: torch.dtype = torch.float32) -> Extents:
    return Extents({"part": spec}, rows, dtype=dtype, device=torch.device("cpu"))


@contextmanager
def stepping(extents: Extents, lengths: Sequence[int], rows: Sequence[int] = (0,)) -> Iterator[Memory]:
    """The memory of the part for a step, which is closed behind the block."""
    extents.begin()
    yield extents.memory("part", stream_of(rows, lengths))
    extents.close()


def appended(extents: Extents, numbers: Tensor, row: int = 0) -> Tensor:
    """What attention sees of a row once these entries (n, 2, 3) are appended to it."""
    with stepping(extents, [len(numbers)], [row]) as memory:
        (keys,) = memory.append(key=numbers)
        ((begin, end),) = memory.places.spans
    return keys[:, begin:end]


def entries(first: int, count: int) -> Tensor:
    """(n, 2, 3) entries that tell their own number."""
    return torch.arange(first, first + count, dtype=torch.float32).view(-1, 1, 1).expand(count, 2, 3)


def held_as(first: int, count: int) -> Tensor:
    """The same as they are held: (2, n, 3)."""
    return entries(first, count).transpose(0, 1)


def allocated(state: State) -> int:
    """Bytes of all distinct storages behind what a state shows."""
    arrays = [(part, name) for part, spec in state.specs.items() for name in (*spec.per_token, *spec.per_sequence)]
    views = [state.view(part, name, slot) for part, name in arrays for slot in range(state.slots)]
    storages = {view.untyped_storage().data_ptr(): view.untyped_storage().nbytes() for view in views}
    return sum(storages.values())


# --- stores against lists ---------------------------------------------------------------------------------------------

PLENTY = 10_000  # tokens that fit into pages

STORES: dict[str, Callable[..., Store]] = {
    "extents": Extents,
    **{f"pages of {size}": partial(Pages, options=PageOptions(PLENTY, size)) for size in (2, 4, 64)},
}


@dataclass
class Plain:
    """One row as a list. numbers: those of its tokens. total: its recurrent state. held: the length that `hold` met."""

    numbers: list[int] = field(default_factory=list)
    total: tuple[int, int] = (0, 0)
    held: int | None = None

    def copy(self) -> Plain:
        return Plain(list(self.numbers), self.total, self.held)

    def continued(self, numbers: Sequence[int]) -> Plain:
        """With more tokens."""
        total = (self.total[0] + sum(numbers), self.total[1] + len(numbers))
        return Plain([*self.numbers, *numbers], total, self.held)

    @property
    def keys(self) -> Tensor:
        """(2, n, 3)"""
        return torch.tensor(self.numbers, dtype=torch.float64).view(1, -1, 1).expand(2, -1, 3)

    @property
    def sums(self) -> Tensor:
        """(2, m, 3): three tokens each, one every two."""
        numbers = self.numbers
        summed = [sum(numbers[first : first + 3]) for first in range(0, len(numbers) - 2, 2)]
        return torch.tensor(summed, dtype=torch.float64).view(1, -1, 1).expand(2, -1, 3)


def summed(keys: Tensor) -> Tensor:
    """The entries of `SUMS` that tokens make."""
    return keys.unfold(1, 3, 2).sum(-1)


class StoresAreLists(RuleBasedStateMachine):
    """Two parts that share a store of several rows: what each row holds is a list of its own.

    Every token has a number of its own, ascending, so an entry of another row, or of an earlier time, shows.
    """

    @initialize(
        kind=st.sampled_from([*STORES]),
        window=st.none() | st.integers(1, 9),
        pools=st.booleans(),
        rows=st.integers(1, 3),
    )
    def begin(self, kind: str, window: int | None, pools: bool, rows: int) -> None:
        self.window, self.pools, self.numbers = window, pools, 0
        arrays = {"key": KEY} if window else {"key": KEY, "sums": SUMS}
        fixed = {"total": PerSequence((2,))} if pools else {}
        specs = {
            "a": StateSpec(arrays, window, per_sequence=fixed),
            "b": StateSpec({"order": ORDER}, window, places="order"),
        }
        self.store = STORES[kind](specs, rows, dtype=torch.float64, device=torch.device("cpu"))
        self.rows = [Plain() for _ in range(rows)]
        self.saved: list[tuple[int, Any, Plain]] = []

    def row(self, data: st.DataObject) -> int:
        return data.draw(st.integers(0, len(self.rows) - 1), "row")

    @rule(data=st.data(), closes=st.sampled_from([True, True, True, False]))
    def run(self, data: st.DataObject, closes: bool) -> None:
        """A step that appends runs of any lengths to some rows; if it is not closed, it has not happened."""
        rows = data.draw(st.lists(st.integers(0, len(self.rows) - 1), unique=True, min_size=1), "rows")
        sizes = [data.draw(st.integers(0, 60), "tokens") for _ in rows]
        bounds = list(accumulate(sizes, initial=self.numbers))
        pieces, self.numbers = [list(range(*ends)) for ends in pairwise(bounds)], bounds[-1]
        stream = stream_of(rows, sizes)
        self.store.begin()
        self.check_step(rows, pieces, *(self.store.memory(part, stream) for part in "ab"))
        if closes:
            self.store.close()
            for row, piece in zip(rows, pieces, strict=True):
                self.rows[row] = self.rows[row].continued(piece)

    def check_step(self, rows: list[int], pieces: list[list[int]], first: Memory, second: Memory) -> None:
        new = torch.tensor([number for piece in pieces for number in piece]).view(-1, 1, 1)
        (keys,), (orders,) = first.append(key=new.double().expand(-1, 2, 3)), second.append(order=new)
        after = [self.rows[row].continued(piece) for row, piece in zip(rows, pieces, strict=True)]
        assert first.fresh.tolist() == [not self.rows[row].numbers for row in rows]
        places = first.places
        assert list(places.spans) == list(zip(places.begins.tolist(), places.ends.tolist(), strict=True))
        for run, (one, piece) in enumerate(zip(after, pieces, strict=True)):
            seen = min(len(one.numbers), len(piece) + (self.window or len(one.numbers) + 1) - 1)
            held = places.of(keys, run), places.of(orders, run)
            assert held[0].shape[1] >= seen
            assert torch.equal(held[0][:, held[0].shape[1] - seen :], one.keys[:, len(one.numbers) - seen :])
            assert held[1][0, held[1].shape[1] - seen :, 0].tolist() == one.numbers[len(one.numbers) - seen :]
        if self.window is None:
            sums, places = first.sum_up("sums", "key", summed)
            for run, one in enumerate(after):
                assert torch.equal(places.of(sums, run), one.sums)
        if self.pools:
            assert first.recall("total").tolist() == [list(self.rows[row].total) for row in rows]
            first.replace(total=torch.tensor([one.total for one in after], dtype=torch.float64))

    @rule(data=st.data())
    def truncate(self, data: st.DataObject) -> None:
        row = self.row(data)
        one, store = self.rows[row], self.store
        length, start = data.draw(st.integers(0, len(one.numbers)), "length"), len(one.numbers) - store.held(row)
        try:
            store.truncate(row, length)
        except ValueError:
            forgot = self.window is not None and start > max(0, length - self.window + 1)
            assert forgot or (self.pools and 0 < length < len(one.numbers))
            assert self.pools or one.held is None or length < one.held, "what comes after a hold can be returned to"
            return
        assert not self.pools or length in (0, len(one.numbers))
        one.total = one.total if length else (0, 0)
        del one.numbers[length:]
        self.saved = [saved for saved in self.saved if saved[0] != row or len(saved[2].numbers) <= length]

    @rule(data=st.data())
    def hold(self, data: st.DataObject) -> None:
        row = self.row(data)
        self.store.hold(row)
        self.rows[row].held = len(self.rows[row].numbers)

    @precondition(lambda self: len(self.rows) > 1)
    @rule(data=st.data())
    def copy(self, data: st.DataObject) -> None:
        source, *targets = data.draw(st.permutations(range(len(self.rows))), "source, targets")
        targets = targets[: data.draw(st.integers(1, 2), "how many")]
        self.store.copy([(source, target) for target in targets])
        for target in targets:
            self.rows[target] = self.rows[source].copy()
        self.saved = [saved for saved in self.saved if saved[0] not in targets]

    @rule(data=st.data())
    def clear(self, data: st.DataObject) -> None:
        row = self.row(data)
        self.store.clear(row)
        self.rows[row] = Plain()
        self.saved = [saved for saved in self.saved if saved[0] != row]

    @rule(data=st.data(), more=st.integers(0, 90))
    def reserve(self, data: st.DataObject, more: int) -> None:
        """Room that is asked for is there: appending moves nothing."""
        row = self.row(data)
        self.store.reserve({row: self.store.held(row) + more})
        reserved = self.store.reserved_bytes()
        self.store.begin()
        self.store.memory("a", stream_of([row], [more]))
        assert self.window is not None or self.store.reserved_bytes() == reserved

    @precondition(lambda self: len(self.rows) < 5)
    @rule()
    def extend(self) -> None:
        self.rows.append(Plain())
        self.store.extend(len(self.rows))

    @rule(data=st.data())
    def save(self, data: st.DataObject) -> None:
        row = self.row(data)
        self.saved.append((row, self.store.save(row), self.rows[row].copy()))

    @precondition(lambda self: self.saved)
    @rule(data=st.data())
    def load(self, data: st.DataObject) -> None:
        row, saved, one = data.draw(st.sampled_from(self.saved), "saved")
        self.store.load(row, saved, len(one.numbers))
        held = self.rows[row].held if saved is None else one.held
        self.rows[row] = replace(one.copy(), held=held)
        self.saved = [other for other in self.saved if other[0] != row or len(other[2].numbers) <= len(one.numbers)]

    @invariant()
    def every_row_is_its_list(self) -> None:
        for row, one in enumerate(self.rows if hasattr(self, "rows") else ()):
            self.check(row, one)

    def check(self, row: int, one: Plain) -> None:
        length, held = len(one.numbers), self.store.held(row)
        assert self.store.length(row) == length
        assert length >= held >= min(length, (self.window or length + 1) - 1)
        assert torch.equal(self.store.view("a", "key", row), one.keys[:, length - held :])
        assert self.store.view("b", "order", row).flatten().tolist() == one.numbers[length - held :]
        if self.window is None:
            assert torch.equal(self.store.view("a", "sums", row), one.sums)
            assert self.store.kept_before(row, 100) == sum(number < 100 for number in one.numbers)
        if self.pools:
            assert self.store.view("a", "total", row).tolist() == list(one.total)
        seen = min(length, self.window or length)
        counted = seen * (2 * 3 * 8 + 4) + (0 if self.window else one.sums.shape[1] * 2 * 3 * 8)
        assert self.store.used_bytes(row) == counted + (16 if self.pools and length else 0)
        assert self.store.reserved_bytes() >= self.store.reserved_bytes(row) >= self.store.used_bytes(row)


TestStoresAreLists = StoresAreLists.TestCase
TestStoresAreLists.settings = settings(max_examples=max(100, settings().max_examples), stateful_step_count=25)


def test_new_memory_is_poisoned():
    """The fixture of conftest.py works for the memory of states."""
    extents = extents_of(StateSpec({"key": KEY, "order": ORDER}))
    extents.reserve({0: 7})
    with stepping(extents, [4]) as memory:
        keys, orders = memory.append(key=torch.ones(4, 2, 3), order=torch.ones(4, 1, 1, dtype=torch.int32))
    assert keys.shape == (2, 7, 3)
    assert keys[:, :4].eq(1).all()
    assert keys[:, 4:].isnan().all()
    assert orders[:, 4:].eq(torch.iinfo(torch.int32).max).all()


@pytest.mark.parametrize("window", [1, 2, 5, 64, 100])
def test_a_window_neither_grows_nor_moves_often_over_a_long_decode(window: int):
    extents, moves, steps = extents_of(StateSpec({"key": KEY}, window)), 0, 1000
    for number in range(steps):
        start = number - extents.held(0)
        seen = appended(extents, entries(number, 1))
        moves += number + 1 - extents.held(0) > start
        visible = min(window, number + 1)
        assert torch.equal(seen[:, -visible:], held_as(number + 1 - visible, visible))
    assert extents.reserved_bytes() <= max(64, 3 * window) * 2 * 3 * 4
    assert 0 < moves <= steps / max(1, window // 2) + 2


@pytest.mark.parametrize("window", [1, 2, 5, 40])
def test_truncation_is_refused_exactly_where_a_visible_token_is_gone(window: int):
    extents = extents_of(StateSpec({"key": KEY}, window), rows=2)
    for number in range(200):
        appended(extents, entries(number, 1))
    start = 200 - extents.held(0)
    assert start > 0
    for length in range(201):
        extents.copy([(0, 1)])
        seen_next = range(max(0, length - window + 1), length)
        if all(place >= start for place in seen_next) and length >= start:
            extents.truncate(1, length)
            seen = appended(extents, entries(length, 1), row=1)
            assert torch.equal(seen[:, -len(seen_next) - 1 :], held_as(length - len(seen_next), len(seen_next) + 1))
        else:
            with pytest.raises(ValueError, match=f"length {length} cannot be returned to: a window of {window}"):
                extents.truncate(1, length)
            assert extents.length(1) == 200


@pytest.mark.parametrize("window", [1, 2, 5, 40])
def test_a_hold_can_be_returned_to_however_far_the_sequence_runs(window: int):
    extents = extents_of(StateSpec({"key": KEY}, window), rows=2)
    for number in range(0, 900, 30):
        if number == 300:
            extents.hold(0)
        appended(extents, entries(number, 30))
    assert 300 >= 900 - extents.held(0) > 300 - window - 64, "no more is kept than that takes"
    for length in (300, 317, 899):
        extents.copy([(0, 1)])
        extents.truncate(1, length)
        seen = appended(extents, entries(length, 1), row=1)
        assert torch.equal(seen[:, -window:], held_as(length + 1 - window, window))


def test_without_a_window_growth_copies_seldom():
    extents, reserved = extents_of(StateSpec({"key": KEY})), set()
    for number in range(5000):
        appended(extents, entries(number, 1))
        reserved.add(extents.reserved_bytes())
    assert len(reserved) < 15
    assert torch.equal(extents.view("part", "key", 0), held_as(0, 5000))


def test_sequences_that_grow_in_turn_seldom_move_each_other():
    """A store is laid out anew for all of its rows at once."""
    extents, reserved, rows = extents_of(StateSpec({"key": KEY}), rows=8), set(), range(8)
    for number in range(1000):
        for row in rows:
            appended(extents, entries(number, 1), row)
            reserved.add(extents.reserved_bytes())
    assert len(reserved) < 8 + 15  # each row once for its first token
    assert all(torch.equal(extents.view("part", "key", row), held_as(0, 1000)) for row in rows)


def test_entries_that_sum_up_tokens_are_the_same_in_any_pieces_and_after_a_cut():
    """Three tokens each, one every two; what a cut has made incomplete is made again, and later than its tokens too."""
    extents = extents_of(StateSpec({"key": KEY, "sums": SUMS}), rows=2, dtype=torch.float64)
    keys = torch.randn(60, 2, 3, dtype=torch.float64)
    draw, length = random.Random(0), 0
    for _ in range(200):
        if draw.random() < 0.2:
            length = draw.randint(0, length)
            extents.truncate(0, length)
        size, makes = draw.randint(0, min(9, 60 - length)), draw.random() < 0.7
        with stepping(extents, [size]) as memory:
            memory.append(key=keys[length : length + size])
            length += size
            count = max(0, (length - 3) // 2 + 1)
            assert SUMS.count(length) == count
            expected = summed(keys[:length].transpose(0, 1)) if count else keys[:0].transpose(0, 1)
            if makes:
                sums, places = memory.sum_up("sums", "key", summed)
                assert torch.equal(places.of(sums, 0), expected)
        if makes:
            extents.copy([(0, 1)])
            assert torch.equal(extents.view("part", "sums", 1), expected)
            assert extents.used_bytes(0) == (length + count) * 2 * 3 * 8


# --- bytes, and memory that is not written ----------------------------------------------------------------------------


@every_case
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_used_bytes_are_the_kept_tokens_times_the_declared_sizes(name: str, dtype: torch.dtype):
    model = decoder(CASES[name], dtype=dtype)
    runs, state = [tokens_from(0, 23), tokens_from(1, 3), tokens_from(2, 11)], model.state(3)
    step(model, state, runs)
    for slot in range(3):
        kept = {-1: state.seen[slot], **{r.index: len(state.places(r.index, slot)) for r in model.resamplers}}
        expected = 0
        for part, spec in state.specs.items():
            held = min(kept[spec.level], spec.window or 10**9)
            assert state.lengths(spec.level)[slot] == kept[spec.level]
            counts = {name: max(0, (held - e.width) // e.every + 1) for name, e in spec.per_token.items()}
            expected += sum(
                counts[n] * e.heads * e.size * (e.dtype or dtype).itemsize for n, e in spec.per_token.items()
            )
            arrays = [state.view(part, name, slot) for name in spec.per_sequence]
            assert all(array.dtype.itemsize >= 4 for array in arrays), "a recurrent state is never in low precision"
            expected += sum(array.nbytes for array in arrays) if held else 0
        assert state.used_bytes(slot) == expected
        assert state.reserved_bytes(slot) >= expected
    assert state.used_bytes() == sum(state.used_bytes(slot) for slot in range(3))


@every_case
def test_reserved_bytes_are_what_is_allocated(name: str):
    """Also after sequences have grown, been copied into rows of their own, and been let go."""
    model, state = model_of(name), model_of(name).state(2)
    step(model, state, [tokens_from(0, 70), tokens_from(1, 3)])
    assert state.reserved_bytes() == allocated(state)
    state.reorder([0, 0, 1, 0])
    step(model, state, [tokens_from(slot, 9) for slot in range(4)])
    assert state.reserved_bytes() == allocated(state)
    assert state.reserved_bytes() == sum(state.reserved_bytes(slot) for slot in range(4))


def test_the_places_of_a_level_are_those_of_the_tokens_it_keeps():
    model, state, kept = model_of("subllm around F"), model_of("subllm around F").state(2), {0: [], 1: []}

    def notes(level: Any, stream: Stream, selection: Any) -> None:
        order, first = stream.order[selection.rows], selection.runs.lengths[0]
        kept[level.index].append((order[:first].tolist(), order[first:].tolist()))

    with model.watching(notes):
        for size in (9, 1, 14):
            step(model, state, [tokens_from(size, size), tokens_from(size + 1, size)])
    for level in (0, 1):
        for slot in (0, 1):
            expected = [place for piece in kept[level] for place in piece[slot]]
            assert state.places(level, slot).tolist() == expected
            assert state.lengths(level)[slot] == len(expected)


def test_a_skipped_token_leaves_the_inner_state_as_it_was():
    model, state = model_of("subllm around F"), model_of("subllm around F").state()
    skipped = 0

    def remembered() -> dict[str, Tensor]:
        """What every part holds of the sequence."""
        return {part: state.view(part, next(iter(spec.per_token)), 0).clone() for part, spec in state.specs.items()}

    for token in tokens_from(3, 40):
        before = remembered()
        with rows_run(model) as rows:
            step(model, state, [[token]])
        after = remembered()
        for name, spec in state.specs.items():
            enters = spec.level < 0 or spec.level < len(rows)
            skipped += not enters
            assert after[name].shape[1] == before[name].shape[1] + enters
            assert torch.equal(after[name][:, : before[name].shape[1]], before[name])
    assert skipped


@every_case
def test_outputs_never_read_reserved_memory(name: str):
    model, tokens = model_of(name), tokens_from(5, 30)
    state = model.state(2)
    state.reserve(50)
    cuts = [7, 8, 9, 20]
    logits = in_pieces(model, tokens, cuts, state)
    for part, spec in state.specs.items():
        for array, entry in spec.per_token.items():
            held = state.view(part, array, 0)
            assert held.untyped_storage().nbytes() > held.nbytes
            # the second half is the other row's, or more than a window needs: poison, which would show
            room = torch.empty(0, dtype=held.dtype).set_(held.untyped_storage()).view(entry.heads, -1, entry.size)
            beyond = room[:, room.shape[1] // 2 :]
            assert entry.dtype is not None or beyond.isnan().all()
    assert distance(logits, by_itself(model, tokens, cuts)) <= CLOSE


def test_reserving_ahead_means_that_nothing_moves():
    model = model_of("subllm around F")
    state = model.state()
    state.reserve(40)
    before = state.reserved_bytes()
    in_pieces(model, tokens_from(0, 40), range(1, 40), state)
    assert state.reserved_bytes() == before


def test_a_window_model_goes_on_exactly_over_a_long_decode():
    model, tokens = model_of("block W"), tokens_from(7, 150)
    state = model.state()
    logits = in_pieces(model, tokens, range(1, 150), state)
    assert distance(logits, alone(model, tokens)) <= CLOSE
    assert state.used_bytes() == 3 * 2 * WINDOW * 2 * 8 * 8
    assert state.reserved_bytes() <= 3 * 2 * 64 * 2 * 8 * 8


FORGETFUL = [name for name in CASES if any(spec.window for spec in model_of(name).state().specs.values())]


@pytest.mark.parametrize("name", FORGETFUL)
def test_what_later_tokens_see_is_never_forgotten(name: str):
    """Over a decode so long that memory is moved several times; a window that is declared too small shows here."""
    model, tokens = model_of(name), tokens_from(9, 150)
    assert distance(in_pieces(model, tokens, range(1, 150)), alone(model, tokens)) <= CLOSE


# --- recurrent rows ---------------------------------------------------------------------------------------------------

RECURRENT = [name for name in CASES if any(spec.per_sequence for spec in model_of(name).state().specs.values())]


@pytest.mark.parametrize("name", RECURRENT)
@pytest.mark.parametrize("slots", [[0, 1, 2], [2, 0]], ids=["rows that follow each other", "others"])
def test_a_stored_recurrent_row_is_the_pools_and_a_snapshot_keeps_only_its_own(name: str, slots: list[int]):
    """Neither is a view of a batch's result, which would keep the memory of all sequences alive."""
    model, state = model_of(name), model_of(name).state(3)
    for size in (5, 1):
        step(model, state, [tokens_from(slot, size) for slot in slots], slots)
    arrays = [(part, array) for part, spec in state.specs.items() for array in spec.per_sequence]
    for part, array in arrays:
        row = state.view(part, array, 0)
        assert row.untyped_storage().nbytes() == 3 * row.nbytes
        assert row.untyped_storage().data_ptr() == state.view(part, array, 2).untyped_storage().data_ptr()
    copies = [copy for copy in state.snapshot(0).copies if copy is not None]
    kept = [array for copy in copies for array in copy.arrays.values()]
    assert len(kept) >= len(arrays)
    assert all(array.untyped_storage().nbytes() == array.nbytes for array in kept)


# --- steps that fail --------------------------------------------------------------------------------------------------


class Failed(Exception):
    pass


def fail(model: Decoder, state: State, pieces: list[list[int]], slots: list[int]) -> None:
    """Runs a step that fails once all layers have run, before it counts."""

    def stop(*given: Any) -> None:
        raise Failed

    hook = model.stack.layers[-1].register_forward_hook(stop)
    with pytest.raises(Failed):
        step(model, state, pieces, slots)
    hook.remove()


def shown(state: State, slot: int) -> list[Any]:
    """All that a state tells of a slot."""
    arrays = [(part, name) for part, spec in state.specs.items() for name in (*spec.per_token, *spec.per_sequence)]
    levels = sorted({spec.level for spec in state.specs.values()})
    lengths = [state.lengths(level)[slot] for level in levels]
    return [*lengths, state.used_bytes(slot), *(state.view(*array, slot).tolist() for array in arrays)]


@every_case
@settings(max_examples=4)
@given(data=st.data())
def test_a_step_that_fails_has_happened_nowhere(name: str, data: st.DataObject):
    """Lengths, places, summed-up entries and recurrent states are as before, and the sequences go on as if without it.

    Even where what was copied from it is not run again before.
    """
    model, state = model_of(name), model_of(name).state(2)
    tokens = [tokens_from(seed, 24) for seed in (0, 1)]
    step(model, state, [one[:11] for one in tokens])
    before = [shown(state, slot) for slot in (0, 1)]
    for _ in range(data.draw(st.integers(1, 2), "failures")):
        sizes = data.draw(st.lists(st.integers(0, 9), min_size=2, max_size=2), "sizes")
        slots = data.draw(st.permutations([0, 1]), "slots")
        fail(model, state, [tokens_from(size, size) for size in sizes], slots)
        assert [shown(state, slot) for slot in (0, 1)] == before
    state.reorder([1, 0, 1])
    assert [shown(state, slot) for slot in range(3)] == [before[1], before[0], before[1]]
    outputs = step(model, state, [tokens[1][11:], tokens[0][11:], tokens[1][11:]]).split(13)
    for one, logits in zip((1, 0, 1), outputs, strict=True):
        assert distance(logits, by_itself(model, tokens[one], [11])[11:]) <= CLOSE


# --- a store of one's own ---------------------------------------------------------------------------------------------


@contextmanager
def kept_in_lists(*kinds: type[Part]) -> Iterator[None]:
    """Parts of these kinds ask for another store."""
    with pytest.MonkeyPatch.context() as patch:
        for kind in kinds:
            declares = kind.state_spec
            asks = lambda self, declares=declares: replace(declares(self), store=ListStore)  # noqa: E731
            patch.setattr(kind, "state_spec", asks)
        yield


@pytest.mark.parametrize("check", [company, snapshots, truncation, reordering])
@settings(max_examples=8)
@given(data=st.data())
def test_the_laws_hold_in_a_store_of_ones_own(check: Any, data: st.DataObject):
    with kept_in_lists(FullAttention, Subllm):
        assert check(model_of("subllm around F"), data.draw) <= CLOSE


def test_a_store_of_ones_own_gives_the_same_outputs_beside_longwaves():
    """Each part is kept where it asks: here the levels in lists, and attention in extents."""
    model, tokens, cuts = model_of("subllm around F"), tokens_from(0, 30), [3, 4, 20]
    with kept_in_lists(Subllm):
        state = model.state()
    assert {type(store) for store in state._stores} == {Extents, ListStore}
    assert distance(in_pieces(model, tokens, cuts, state), alone(model, tokens)) <= CLOSE
    assert state.used_bytes() == sum(
        spec.bytes(state.lengths(spec.level)[0], state.dtype) for spec in state.specs.values()
    )


# --- refusals, and snapshots ------------------------------------------------------------------------------------------


def ran(name: str, count: int) -> tuple[Decoder, State]:
    model = model_of(name)
    state = model.state(2)
    step(model, state, [tokens_from(0, count)], [0])
    return model, state


def test_a_window_refuses_to_return_to_what_it_has_forgotten():
    model, state = ran("block W", 300)
    for token in tokens_from(1, 80):
        step(model, state, [[token]], [0])
    with pytest.raises(ValueError, match=f"a window of {WINDOW} has forgotten it; snapshot"):
        state.truncate(0, 200)
    assert state.seen == [380, 0]


@pytest.mark.parametrize("length", [-1, 21])
def test_truncating_to_a_length_that_never_was_is_refused(length: int):
    _, state = ran("block F", 20)
    with pytest.raises(ValueError, match=f"length {length} is outside the 20 tokens of slot 0"):
        state.truncate(0, length)


@pytest.mark.parametrize("name", ["subllm around F", "subllm around W"])
def test_a_snapshot_whose_sequence_was_cut_below_it_is_refused(name: str):
    model, state = ran(name, 10)
    snapshot = state.snapshot(0)
    earlier = model_of(name).state()
    step(model, earlier, [tokens_from(0, 4)])
    state.truncate(0, 4)
    step(model, state, [tokens_from(3, 16)], [0])
    with pytest.raises(ValueError, match="cut below token 10, where the snapshot stands"):
        state.restore(snapshot)
    assert state.seen[0] == 20


def test_restoring_an_earlier_snapshot_voids_a_later_one_but_not_the_reverse():
    model, state = ran("subllm around W", 5)
    early = state.snapshot(0)
    step(model, state, [tokens_from(1, 5)], [0])
    late = state.snapshot(0)
    step(model, state, [tokens_from(2, 5)], [0])
    state.restore(late)
    state.restore(early)
    step(model, state, [tokens_from(3, 9)], [0])
    with pytest.raises(ValueError, match="cut below token 10"):
        state.restore(late)


def test_a_snapshot_of_a_slot_that_is_gone_is_refused():
    _, state = ran("subllm around W", 5)
    snapshot = state.snapshot(0)
    state.release(0)
    with pytest.raises(ValueError, match="no longer in this state"):
        state.restore(snapshot)


def test_a_snapshot_follows_its_sequence_to_another_slot():
    model, state = ran("subllm around W", 5)
    snapshot = state.snapshot(0)
    step(model, state, [tokens_from(1, 30)], [0])
    state.reorder([1, 0])
    state.restore(snapshot)
    assert state.seen == [0, 5]


def test_a_sequence_named_twice_in_one_stream_is_refused():
    with pytest.raises(ValueError, match="name a sequence twice"):
        model_of("block F").state(2).stream([1, 1], [1, 1])


def test_a_place_past_32_bits_is_refused():
    state = model_of("block F").state()
    state._sequences[0].seen = (1 << 31) - 2  # as if so many tokens had been run
    state.stream([2])
    with pytest.raises(UserError, match="a sequence of 2,147,483,649 tokens: places are counted up to 2,147,483,647"):
        state.stream([3])


def test_a_state_made_under_autocast_continues_under_autocast():
    model, tokens = decoder(Case("F subllm(0.5: F) W"), dtype=torch.float32), torch.tensor(tokens_from(0, 9))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        state = model.state()
        pieces = [model(piece, state.stream([len(piece)]), state) for piece in tokens.split([4, 4, 1])]
        assert distance(torch.cat(pieces).float(), model(tokens, Stream.of([9])).float()) < 0.1
