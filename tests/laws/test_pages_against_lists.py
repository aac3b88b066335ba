"""A state in pages against plain Python lists: appended, branched, cut, released and out of pages in any order.

Every token has a number of its own, ascending, and every part stores it, so an entry of another sequence or of an
earlier time shows. At the end every page is free.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from torch import Tensor

from longwave.states import Branch, Memory, OutOfPages, PageOptions, PerSequence, PerToken, State, StateSpec
from longwave.streams import Runs

Pick = Callable[[int, int], int]  # an integer from the first up to the second
SIZE, TOKENS, MOST = 4, 72, 14  # of a page; that fit into the pages of a level; of a run
KEY, SUMS = PerToken(2, 3), PerToken(2, 3, width=3, every=2)


@dataclass
class Plain:
    """One sequence as a list. numbers: of its tokens. held: its length when `hold` was called, if it was."""

    numbers: list[int] = field(default_factory=list)
    held: int | None = None

    def copy(self) -> Plain:
        return replace(self, numbers=list(self.numbers))

    @property
    def places(self) -> list[int]:
        """Of the tokens that reach the level."""
        return [place for place, number in enumerate(self.numbers) if reaches_level(number)]


def reaches_level(number: int) -> bool:
    return number % 3 > 0


def entries(numbers: Sequence[int]) -> Tensor:
    """(2, n, 3)"""
    return torch.tensor(numbers, dtype=torch.float64).view(1, -1, 1).expand(2, -1, 3)


def sums(numbers: Sequence[int]) -> Tensor:
    return entries([sum(numbers[first : first + 3]) for first in range(0, len(numbers) - 2, 2)])


def summed(keys: Tensor) -> Tensor:
    return keys.unfold(1, 3, 2).sum(-1)


class Play:
    """A state, the lists that it should equal, and what can be done to both."""

    def __init__(self, window: int | None, recurs: bool, slots: int) -> None:
        self.window, self.recurs, self.next, self.refused = window, recurs, 0, 0
        specs = {
            "outer": StateSpec({"key": KEY, "sums": SUMS}),
            "level": StateSpec({"order": PerToken(1, 1, torch.int32), "key": KEY}, level=0, places="order"),
        }
        if window:
            specs["window"] = StateSpec({"key": KEY}, window)
        if recurs:
            specs["total"] = StateSpec(per_sequence={"total": PerSequence((2,))})
        self.state = State(specs, slots, dtype=torch.float64, pages=PageOptions(TOKENS, SIZE))
        self.slots = [Plain() for _ in range(slots)]
        self.branches: list[tuple[Branch, Plain]] = []

    def slot(self, pick: Pick) -> int:
        return pick(0, len(self.slots) - 1)

    def run(self, pick: Pick) -> None:
        """A step of some slots; it may find no pages or be given up, and has not happened then."""
        order = sorted(range(len(self.slots)), key=lambda slot: (pick(0, 3), slot))[: pick(1, len(self.slots))]
        sizes = [pick(0, MOST if pick(0, 2) else 1) for _ in order]
        pieces = [self.numbered(size) for size in sizes]
        after = [[*self.slots[slot].numbers, *piece] for slot, piece in zip(order, pieces, strict=True)]
        stream, new = self.state.stream(sizes, order), [number for piece in pieces for number in piece]
        try:
            for part in ("outer", "window") if self.window else ("outer",):
                self.check_seen(self.state.part(part, stream), new, after)
            if self.recurs:
                memory = self.state.part("total", stream)
                self.check_total(memory, [self.slots[slot].numbers for slot in order])
                memory.replace(total=torch.tensor([[sum(one), len(one)] for one in after], dtype=torch.float64))
            rows = torch.tensor([row for row, number in enumerate(new) if reaches_level(number)], dtype=torch.int64)
            inner = stream.gather(rows, Runs.of([sum(map(reaches_level, piece)) for piece in pieces]))
            memory = self.state.part("level", inner)
            memory.append(order=inner.order.view(-1, 1, 1))
            level = [[number for number in one if reaches_level(number)] for one in after]
            self.check_seen(memory, [new[row] for row in rows.tolist()], level)
        except OutOfPages:
            enough = sum(-(-size // SIZE) + 2 for size in sizes)
            assert min(usage.free for usage in self.state.usage() if usage.pages) < enough, "there were pages"
            self.refused += 1
            return
        if pick(0, 5):
            self.state.advance(stream)
            for slot, numbers in zip(order, after, strict=True):
                self.slots[slot].numbers = numbers

    def numbered(self, size: int) -> list[int]:
        self.next += size
        return list(range(self.next - size, self.next))

    def check_seen(self, memory: Memory, new: list[int], after: list[list[int]]) -> None:
        """A part sees its own tokens and no others."""
        (keys,) = memory.append(key=entries(new).transpose(0, 1))
        for run, numbers in enumerate(after):
            seen = memory.places.of(keys, run)
            assert torch.equal(seen, entries(numbers[len(numbers) - seen.shape[1] :]))
        with suppress(KeyError):  # of parts that sum nothing up
            array, places = memory.sum_up("sums", "key", summed)
            assert all(torch.equal(places.of(array, run), sums(numbers)) for run, numbers in enumerate(after))

    def check_total(self, memory: Memory, before: list[list[int]]) -> None:
        found = memory.recall("total")
        assert found is not None
        assert found.tolist() == [[sum(one), len(one)] for one in before]

    def truncate(self, pick: Pick) -> None:
        slot = self.slot(pick)
        one = self.slots[slot]
        length = pick(0, len(one.numbers))
        try:
            self.state.truncate(slot, length)
        except ValueError:
            assert self.window or self.recurs
            assert self.recurs or one.held is None or length < one.held, "what follows a hold can be returned to"
        else:
            assert not self.recurs or length in (0, len(one.numbers))
            del one.numbers[length:]

    def hold(self, pick: Pick) -> None:
        slot = self.slot(pick)
        self.state.hold(slot)
        self.slots[slot].held = len(self.slots[slot].numbers)

    def release(self, pick: Pick) -> None:
        slot = self.slot(pick)
        self.state.release(slot)
        self.slots[slot] = Plain()

    def reorder(self, pick: Pick) -> None:
        sources = [self.slot(pick) for _ in range(pick(1, 4))]
        self.state.reorder(sources)
        self.slots = [self.slots[source].copy() for source in sources]

    def branch(self, pick: Pick) -> None:
        slot = self.slot(pick)
        self.branches.append((self.state.branch(slot), self.slots[slot].copy()))

    def continue_from(self, pick: Pick) -> None:
        """An empty slot takes up a branch, at fewer tokens of it where that can be."""
        if not self.branches:
            return
        branch, one = self.branches[pick(0, len(self.branches) - 1)]
        slot, length = self.slot(pick), pick(0, len(one.numbers)) if pick(0, 1) else len(one.numbers)
        if self.slots[slot].numbers:
            self.release(lambda *_: slot)
        if not branch.reaches(length):
            assert self.window or self.recurs
            length = len(one.numbers)
        self.state.continue_from(slot, branch, length)
        self.slots[slot] = Plain(one.numbers[:length], one.held)

    def drop(self, pick: Pick) -> None:
        if self.branches:
            branch, _ = self.branches.pop(pick(0, len(self.branches) - 1))
            branch.drop()

    def check(self) -> None:
        """Every slot is its list, and pages are held as often as somebody has them."""
        assert self.state.seen == [len(one.numbers) for one in self.slots]
        for slot, one in enumerate(self.slots):
            assert torch.equal(self.state.view("outer", "key", slot), entries(one.numbers))
            assert torch.equal(self.state.view("outer", "sums", slot), sums(one.numbers))
            level = self.state.view("level", "key", slot)
            assert torch.equal(level, entries([one.numbers[place] for place in one.places]))
            assert self.state.places(0, slot).tolist() == one.places
            if self.window:
                held = self.state.view("window", "key", slot)
                assert held.shape[1] >= min(len(one.numbers), self.window - 1)
                assert torch.equal(held, entries(one.numbers[len(one.numbers) - held.shape[1] :]))
            if self.recurs:
                assert self.state.view("total", "total", slot).tolist() == [sum(one.numbers), len(one.numbers)]

    def end(self) -> None:
        """Nothing is left once everything was let go, branches that nobody dropped among it."""
        self.branches.clear()
        for slot in range(len(self.slots)):
            self.state.release(slot)
        assert all(usage.free == usage.pages for usage in self.state.usage())


ACTS = [Play.run] * 5 + [Play.branch, Play.continue_from] * 2 + [Play.truncate, Play.hold, Play.release, Play.reorder]
ACTS += [Play.drop] * 2


class StatesAreLists(RuleBasedStateMachine):
    """Drawn acts, one after the other."""

    @initialize(window=st.none() | st.integers(1, 9), recurs=st.booleans(), slots=st.integers(1, 4))
    def begin(self, window: int | None, recurs: bool, slots: int) -> None:
        self.play = Play(window, recurs, slots)

    @rule(act=st.sampled_from(ACTS), data=st.data())
    def act(self, act: Callable[[Play, Pick], None], data: st.DataObject) -> None:
        act(self.play, lambda low, high: data.draw(st.integers(low, high)))

    @invariant()
    def check(self) -> None:
        if hasattr(self, "play"):
            self.play.check()

    def teardown(self) -> None:
        if hasattr(self, "play"):
            self.play.end()


TestStatesAreLists = StatesAreLists.TestCase
TestStatesAreLists.settings = settings(max_examples=max(40, settings().max_examples), stateful_step_count=25)


def played(steps: int, seed: int) -> int:
    """Drawn acts of one state; how many steps found no pages."""
    draw = random.Random(seed)
    play = Play(draw.choice([None, 1, 5, 9]), draw.random() < 0.5, draw.randint(1, 4))
    for _ in range(steps):
        draw.choice(ACTS)(play, draw.randint)
        if len(play.branches) > 6:
            play.drop(draw.randint)
        play.check()
    play.end()
    return play.refused


def test_long_lives_leave_nothing_behind():
    assert sum(played(200, seed) for seed in range(3)) > 0, "no step has met too few pages"


@pytest.mark.slow
@pytest.mark.parametrize("part", range(20))
def test_a_hundred_thousand_steps_leave_nothing_behind(part: int):
    assert sum(map(partial(played, 1000), range(5 * part + 1000, 5 * part + 1005))) > 100
