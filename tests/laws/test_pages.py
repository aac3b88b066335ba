"""Pages: what sequences share stays the other's, a branch can be continued from, and nothing is lost."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from contract import (
    CASES,
    CLOSE,
    SPARSE,
    VOCABULARY,
    Case,
    by_itself,
    company,
    decoder,
    distance,
    in_pieces,
    model_of,
    reordering,
    snapshots,
    step,
    truncation,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from test_steps import WIDE

from longwave.errors import UserError
from longwave.model import Decoder
from longwave.states import OutOfPages, PageOptions, State
from longwave.states.pages import Stock

every_case = pytest.mark.parametrize("name", CASES)
SIZE = 4  # tokens of a page: the models of the contract sum up no more


def tokens_from(seed: int, count: int) -> list[int]:
    return random.Random(seed).choices(range(VOCABULARY), k=count)


def pages_for(tokens: int, size: int = SIZE) -> PageOptions:
    return PageOptions(tokens, size)


class Shuffled(Stock):
    """Hands out pages in any order, so that no sequence's follow each other for long."""

    def take(self, count: int, after: int | None = None) -> np.ndarray:
        self.require(count)
        draw = np.random.default_rng(int(self.holders.sum()))
        numbers = draw.permutation(np.flatnonzero(self.holders == 0))[:count].astype(np.int32)
        self.hold(numbers)
        return numbers


@contextmanager
def shuffled() -> Iterator[None]:
    """States made meanwhile have their pages anywhere."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("longwave.states.pages.Stock", Shuffled)
        yield


@contextmanager
def kept_in_pages(tokens: int = 2000) -> Iterator[None]:
    """Models make their states in pages."""
    plain = Decoder.state
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Decoder, "state", lambda self, slots=1: plain(self, slots, pages=pages_for(tokens)))
        yield


def free(state: State) -> list[int]:
    return [usage.free for usage in state.usage()]


def assert_all_free(state: State) -> None:
    """Nobody holds a page once every slot is empty."""
    for slot in range(state.slots):
        state.release(slot)
    assert free(state) == [usage.pages for usage in state.usage()]


# --- the laws ---------------------------------------------------------------------------------------------------------


@every_case
@pytest.mark.parametrize("check", [company, snapshots, truncation, reordering])
@settings(max_examples=2)
@given(data=st.data())
def test_the_laws_hold_in_pages_that_lie_anywhere(name: str, check: Any, data: st.DataObject):
    """`company` among them, whose sequences run in any pieces."""
    with shuffled(), kept_in_pages():
        assert check(model_of(name), data.draw) <= CLOSE


# --- branches ---------------------------------------------------------------------------------------------------------


def forgets(state: State) -> bool:
    return any(spec.forgets for spec in state.specs.values())


@every_case
@settings(max_examples=2)
@given(data=st.data())
def test_a_branch_is_continued_as_if_it_were_the_sequence(name: str, data: st.DataObject):
    """At any token; by several slots at once, after its sequence went on and was released, until it is dropped."""
    model, tokens, other = model_of(name), tokens_from(0, 40), tokens_from(1, 17)
    cut, place = data.draw(st.integers(0, 20), "cut"), data.draw(st.integers(0, 30), "place")
    state = model.state(3, pages=pages_for(400))
    cuts = [cut] if cut < place else []
    in_pieces(model, tokens[:place], cuts, state)
    branch = state.branch(0)
    step(model, state, [tokens_from(2, data.draw(st.integers(0, 9), "on"))], [0])
    if data.draw(st.booleans(), "released"):
        state.release(0)
    for slot in (1, 2):
        state.continue_from(slot, branch)
    branch.drop()
    assert state.seen[1:] == [place, place]
    found = step(model, state, [tokens[place:], other], [1, 2]).split([40 - place, 17])
    for rest, logits in zip((tokens[place:], other), found, strict=True):
        assert distance(logits, by_itself(model, tokens[:place] + rest, [*cuts, place])[place:]) <= CLOSE
    assert_all_free(state)


@every_case
@settings(max_examples=2)
@given(data=st.data())
def test_a_branch_reaches_earlier_tokens_where_nothing_is_forgotten(name: str, data: st.DataObject):
    model, tokens, other = model_of(name), tokens_from(0, 30), tokens_from(1, 9)
    state = model.state(2, pages=pages_for(200))
    length = data.draw(st.integers(0, 29), "length")
    in_pieces(model, tokens, [length], state)
    branch = state.branch(0)
    assert [place for place in (-1, 30, 31) if branch.reaches(place)] == [30]
    assert branch.reaches(length) == (not forgets(state))
    if branch.reaches(length):
        state.continue_from(1, branch, length)
        assert state.seen == [30, length]
        logits = step(model, state, [other], [1])
        assert distance(logits, by_itself(model, tokens[:length] + other, [length])[length:]) <= CLOSE
    else:
        with pytest.raises(ValueError, match=f"the branch at 30 tokens does not reach length {length}"):
            state.continue_from(1, branch, length)
        assert state.seen == [30, 0]
    branch.drop()
    assert_all_free(state)


EXACT = {
    "full": Case("2F", {"attention": WIDE}),
    "window": Case("F W", {"attention": WIDE}),
    "sparse": Case("2S", {"attention": WIDE, "infllm": SPARSE}),
    "levels": Case("F subllm(0.6: W subllm(0.6: F) F) F", {"attention": WIDE}),
    "hybrid": Case("L subllm(0.6: L F) S", {"attention": WIDE, "infllm": SPARSE}),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", EXACT)
def test_pages_change_no_bit_of_decoding(name: str, dtype: torch.dtype):
    """Wherever they lie, and whether a sequence was continued from a branch, beside it in one step."""
    model, tokens = decoder(EXACT[name], dtype=dtype), tokens_from(0, 70)
    plain = model.state(1)
    with shuffled():
        state = model.state(2, pages=pages_for(300))
    for one in (plain, state):
        step(model, one, [tokens[:27]], [0])
    plain.reorder([0, 0])
    state.continue_from(1, state.branch(0))
    for token in tokens[27:]:
        assert torch.equal(step(model, state, [[token], [token]]), step(model, plain, [[token], [token]]))


def test_a_branch_shares_keys_and_copies_what_recurs():
    model = model_of("subllm around a hybrid")
    state = model.state(2, pages=pages_for(400))
    step(model, state, [tokens_from(0, 41)], [0])
    before = free(state)
    branch = state.branch(0)
    state.continue_from(1, branch)
    assert free(state) == before
    fixed = [entry for spec in state.specs.values() for entry in spec.per_sequence.values()]
    assert branch.nbytes == sum(entry.bytes(state.dtype) for entry in fixed) > 0


def test_a_branch_that_nobody_has_any_more_lets_go():
    state = model_of("subllm around W").state(1, pages=pages_for(100))
    step(model_of("subllm around W"), state, [tokens_from(0, 30)])
    branch = state.branch(0)
    state.release(0)
    assert free(state) != [usage.pages for usage in state.usage()]
    del branch
    assert_all_free(state)


def test_branches_that_cannot_be_continued_are_refused():
    model = model_of("block F")
    state, other = (model.state(2, pages=pages_for(100)) for _ in range(2))
    step(model, state, [tokens_from(0, 9)], [0])
    branch = state.branch(0)
    with pytest.raises(ValueError, match="slot 0 has 9 tokens; release it first"):
        state.continue_from(0, branch)
    with pytest.raises(ValueError, match="the branch is not of this state, or was dropped"):
        other.continue_from(0, branch)
    branch.drop()
    branch.drop()
    with pytest.raises(ValueError, match="the branch is not of this state, or was dropped"):
        state.continue_from(1, branch)
    with pytest.raises(UserError, match=r"not in pages; make it by model.state\(slots, pages=PageOptions"):
        model.state().branch(0)


# --- too few pages ----------------------------------------------------------------------------------------------------


GROWING = [
    name
    for name in CASES
    if any(one.per_token and one.window is None and one.level < 0 for one in model_of(name).state().specs.values())
]


@pytest.mark.parametrize("name", GROWING)
def test_a_step_without_enough_pages_has_happened_nowhere(name: str):
    """At no level; its pages are free again, and it runs once another sequence is gone."""
    model, tokens = model_of(name), tokens_from(0, 40)
    state = model.state(2, pages=pages_for(48))
    in_pieces(model, tokens[:25], [], state)
    step(model, state, [tokens_from(1, 16)], [1])
    before, lengths = free(state), state.lengths(-1)
    for _ in range(2):
        with pytest.raises(OutOfPages, match="pages needed of level -1"):
            step(model, state, [tokens[25:], [1]])
        state.stream([])
        assert (free(state), state.lengths(-1)) == (before, lengths)
    state.release(1)
    logits = step(model, state, [tokens[25:]], [0])
    assert distance(logits, by_itself(model, tokens, [25])[25:]) <= CLOSE
    assert_all_free(state)


def test_a_level_that_runs_out_of_pages_undoes_the_levels_around_it():
    model, tokens = model_of("subllm around F"), tokens_from(0, 60)
    state = model.state(1, pages=PageOptions({-1: 100, 0: 100, 1: 8}, SIZE))
    in_pieces(model, tokens[:8], [], state)
    before, lengths = free(state), [state.lengths(level) for level in (-1, 0, 1)]
    with pytest.raises(OutOfPages, match=r"pages needed of level 1, \d free of 2"):
        step(model, state, [tokens[8:]])
    state.stream([])
    assert (free(state), [state.lengths(level) for level in (-1, 0, 1)]) == (before, lengths)
    logits = step(model, state, [tokens[8:10]])
    assert distance(logits, by_itself(model, tokens[:10], [8])[8:]) <= CLOSE


@pytest.mark.parametrize("size", [3, 6])
def test_a_page_holds_whole_entries(size: int):
    with pytest.raises(UserError, match=f"pages.size = {size}: a multiple of 4, as entries sum up tokens"):
        model_of("block S").state(pages=PageOptions(100, size))


# --- where pages lie --------------------------------------------------------------------------------------------------


def test_the_pages_of_a_sequence_follow_each_other_while_there_is_room():
    """Sequences that grow in turn, as when many are decoded together."""
    model = model_of("block F")
    state = model.state(8, pages=pages_for(8 * 100))
    for number in range(30):
        stream = state.stream([1] * 8)
        model(torch.zeros(8, dtype=torch.int64), stream, state)
        assert state.part("blocks.0.mixer", stream).places.tables is None, number


def test_a_window_holds_no_more_pages_than_it_sees():
    model = model_of("block W")
    state = model.state(1, pages=pages_for(40))
    for token in tokens_from(0, 80):
        step(model, state, [[token]])
        assert all(usage.pages - usage.free <= 3 for usage in state.usage())


def test_what_a_window_holds_for_a_return_stays_in_its_pages():
    model, tokens = model_of("block W"), tokens_from(0, 40)
    state = model.state(1, pages=pages_for(60))
    step(model, state, [tokens[:20]])
    state.hold(0)
    in_pieces(model, tokens_from(1, 30), range(1, 30), state)
    state.truncate(0, 20)
    assert distance(step(model, state, [tokens[20:]]), by_itself(model, tokens, [20])[20:]) <= CLOSE
    assert_all_free(state)
