"""The laws of design.md, proven for every registered part in each mode: what is declared holds, what is denied fails.

Declared laws are proven in fp64 with drawn lengths, chunkings, companies and cuts (the checks of `contract.py`). Two
remarks on what "nothing changes" means here. Where as many rows run at every level, outputs are compared bit by bit;
where a change of tokens changes how many rows a level keeps, matrix products of another shape round differently in
their last bit, so the bound is 1e-12. And training knows no state, so the laws about states (CHUNKING, ROLLBACK) are
shown failing only for the selection that breaks them.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import hypothesis
import pytest
import torch
from contract import (
    AT_INFERENCE,
    CASES,
    CLOSE,
    LEAK,
    VOCABULARY,
    WINDOW,
    Check,
    alone,
    causality,
    chunking,
    company,
    company_without_a_state,
    declared,
    decoder,
    distance,
    in_pieces,
    model_of,
    reordering,
    rows_run,
    sequences,
    snapshots,
    step,
    together,
    truncation,
)
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from longwave.blocks import BLOCKS, PARTS
from longwave.laws import ALL, Law
from longwave.model import Decoder
from longwave.resamplers import BRACKETS
from longwave.streams import Stream, Windows

FEWER = settings(max_examples=max(min(8, settings().max_examples), settings().max_examples // 3))
SEARCH = settings(max_examples=1000, phases=[Phase.generate], derandomize=True, database=None)

every_case = pytest.mark.parametrize("name", CASES)


def by_law(law: Law, holds: bool = True, training: bool = False) -> pytest.MarkDecorator:
    """For every case that declares a law in a mode, or that denies it."""
    names = [name for name in CASES if (law in declared(model_of(name, training), training)) == holds]
    assert names
    return pytest.mark.parametrize("name", names)


def tokens_from(seed: int, count: int) -> list[int]:
    """Token ids that a seed gives."""
    return random.Random(seed).choices(range(VOCABULARY), k=count)


def breaks(check: Check, model: Decoder) -> bool:
    """Whether there is a counter-example that no rounding explains."""
    try:
        hypothesis.find(st.data(), lambda data: check(model, data.draw) > LEAK, settings=SEARCH)
    except hypothesis.errors.NoSuchExample:
        return False
    return True


# --- the cases themselves, and what is declared -----------------------------------------------------------------------

TRAINING, NONE = frozenset({Law.COMPANY, Law.CAUSALITY}), frozenset[Law]()
DECLARED = {  # in training, where no state is known, and at inference
    "block F": (TRAINING, ALL),
    "block W": (TRAINING, ALL),
    "block L": (TRAINING, ALL),
    "block S": (TRAINING, ALL),
    "sparse by the length of the call": (TRAINING, ALL - {Law.CHUNKING}),
    "bracket subllm": (NONE, ALL),
    "subllm by document": ({Law.COMPANY}, ALL),
    "subllm causal": (TRAINING, ALL),
}


def test_every_registered_part_is_in_a_case():
    letters = {letter for case in CASES.values() for letter in case.layout if letter in BLOCKS}
    assert letters == set(BLOCKS)
    assert all(any(f"{name}(" in case.layout for case in CASES.values()) for name in BRACKETS)
    assert {part for kind in BLOCKS.values() for part in kind.parts} == set(PARTS)


@pytest.mark.parametrize("name", DECLARED)
def test_what_the_parts_declare(name: str):
    training, inference = DECLARED[name]
    assert declared(model_of(name, training=True), training=True) == training
    assert declared(model_of(name), training=False) == inference


def test_every_registered_part_has_its_declaration_pinned():
    pinned = {type(part) for name in DECLARED for part in model_of(name).parts}
    assert pinned >= {*PARTS.values(), *BRACKETS.values()}


@every_case
def test_every_level_keeps_some_tokens_and_drops_some(name: str):
    """Otherwise the laws below would say nothing about the levels."""
    model = model_of(name)
    with rows_run(model) as rows:
        alone(model, tokens_from(0, 200))
    entering = {resampler.site.level: 200 for resampler in model.resamplers if resampler.site.level < 0}
    for resampler, kept in zip(model.resamplers, rows, strict=True):
        assert 5 < kept < entering[resampler.site.level] - 5
        entering[resampler.index] = kept


# --- at inference -----------------------------------------------------------------------------------------------------


@by_law(Law.CHUNKING)
@FEWER
@given(data=st.data())
def test_chunking_gives_the_same_output(name: str, data: st.DataObject):
    assert chunking(model_of(name), data.draw) <= CLOSE


@by_law(Law.CHUNKING)
def test_token_by_token_gives_the_same_output(name: str):
    model, tokens = model_of(name), tokens_from(1, 3 * WINDOW + 20)
    assert distance(in_pieces(model, tokens, range(1, len(tokens))), alone(model, tokens)) <= CLOSE


@by_law(Law.CHUNKING)
@FEWER
@given(data=st.data())
def test_chunking_in_single_precision(name: str, data: st.DataObject):
    assert chunking(model_of(name, dtype=torch.float32), data.draw) <= 1e-5


@by_law(Law.COMPANY)
@FEWER
@given(data=st.data())
def test_company_changes_nothing(name: str, data: st.DataObject):
    assert company(model_of(name), data.draw) <= CLOSE


@by_law(Law.COMPANY)
@FEWER
@given(data=st.data())
def test_company_without_a_state(name: str, data: st.DataObject):
    assert company_without_a_state(model_of(name), data.draw) <= CLOSE


@by_law(Law.CAUSALITY)
@FEWER
@given(data=st.data())
def test_the_future_changes_nothing(name: str, data: st.DataObject):
    assert causality(model_of(name), data.draw) <= CLOSE


@by_law(Law.ROLLBACK)
@FEWER
@given(data=st.data())
def test_a_snapshot_is_returned_to(name: str, data: st.DataObject):
    assert snapshots(model_of(name), data.draw) <= CLOSE


@by_law(Law.ROLLBACK)
@FEWER
@given(data=st.data())
def test_truncation_is_a_fresh_run_or_is_refused(name: str, data: st.DataObject):
    """Only what a window or a recurrence has forgotten may be refused, and a refusal changes nothing."""
    assert truncation(model_of(name), data.draw) <= CLOSE


@every_case
@FEWER
@given(data=st.data())
def test_reordered_slots_go_on_by_themselves(name: str, data: st.DataObject):
    assert reordering(model_of(name), data.draw) <= CLOSE


@every_case
def test_a_released_slot_starts_afresh(name: str):
    model, first, second = model_of(name), tokens_from(0, 20), tokens_from(1, 9)
    state = model.state(2)
    step(model, state, [first, first])
    before = state.used_bytes(1)
    state.release(0)
    assert (state.seen, state.used_bytes(0), state.used_bytes(1)) == ([0, 20], 0, before)
    assert distance(step(model, state, [second, second], [0, 1])[:9], alone(model, second)) <= CLOSE


DENIED = [(name, law) for name in CASES for law in Law if law not in declared(model_of(name), training=False)]


@pytest.mark.parametrize(("name", "law"), DENIED)
def test_a_law_that_is_denied_at_inference_fails(name: str, law: Law):
    """Otherwise it could be declared."""
    assert any(breaks(check, model_of(name)) for check in AT_INFERENCE[law])


# --- in training ------------------------------------------------------------------------------------------------------


def test_chunking_fails_for_a_selection_that_ranks():
    """Top-k over what is at hand depends on what is at hand."""
    model = model_of("bracket subllm", training=True)
    assert Law.CHUNKING not in declared(model, training=True)
    assert breaks(chunking, model)


@by_law(Law.COMPANY, training=True)
@FEWER
@given(runs=st.lists(sequences(14), min_size=2, max_size=5), data=st.data())
def test_company_changes_nothing_in_training(name: str, runs: list[list[int]], data: st.DataObject):
    """Documents in drawn windows; a document is known by the sample of its window, wherever the window stands."""
    model = model_of(name, training=True)
    groups = grouped(runs, data.draw(st.integers(1, len(runs))))
    samples = data.draw(st.permutations(range(100, 100 + len(groups))))
    windows = Windows(tuple(sum(map(len, group)) for group in groups), tuple(samples))
    outputs = together(model, runs, windows)
    keys = [sample for group, sample in zip(groups, samples, strict=True) for _ in group]
    for tokens, sample, logits in zip(runs, keys, outputs, strict=True):
        assert distance(logits, alone(model, tokens, sample)) <= CLOSE


def test_documents_of_several_windows_draw_by_their_own_window():
    """At the inner level too, where a document's share of its window is no longer the window's ratio."""
    model = model_of("subllm by document", training=True)
    for seed in range(10):
        runs = [tokens_from(10 * seed + n, n) for n in (21, 27, 16, 28, 12, 33, 22)]
        outputs = together(model, runs, Windows((64, 40, 55), (5, 9, 7)))
        for tokens, sample, logits in zip(runs, (5, 5, 5, 9, 9, 7, 7), outputs, strict=True):
            assert distance(logits, alone(model, tokens, sample)) <= CLOSE


def grouped(runs: list[list[int]], size: int) -> list[list[list[int]]]:
    return [runs[start : start + size] for start in range(0, len(runs), size)]


def company_in_one_window(model: Decoder, draw: Callable[..., Any]) -> float:
    """The first of two documents of a training window, and the same as a window of its own."""
    mine, other = draw(sequences(12, 12)), draw(sequences(12, 12))
    return distance(together(model, [mine, other], Windows((24,), (0,)))[0], alone(model, mine))


@by_law(Law.COMPANY, holds=False, training=True)
def test_company_fails_in_training_where_it_is_denied(name: str):
    """Documents of one window compete for their places."""
    assert breaks(company_in_one_window, model_of(name, training=True))


@every_case
@FEWER
@given(runs=st.lists(sequences(14), min_size=2, max_size=4), data=st.data())
def test_a_window_in_training_is_the_same_wherever_it_stands(name: str, runs: list[list[int]], data: st.DataObject):
    """Draws are keyed by seed, step and sample: splitting a batch or reordering it changes no window's result."""
    model = model_of(name, training=True)
    samples = data.draw(st.permutations(range(len(runs))))
    outputs = together(model, [runs[i] for i in samples], Windows(tuple(len(runs[i]) for i in samples), tuple(samples)))
    for i, logits in zip(samples, outputs, strict=True):
        assert distance(logits, alone(model, runs[i], i)) <= CLOSE


@by_law(Law.CAUSALITY, training=True)
@FEWER
@given(data=st.data())
def test_the_future_changes_nothing_in_training(name: str, data: st.DataObject):
    assert causality(model_of(name, training=True), data.draw) <= CLOSE


@by_law(Law.CAUSALITY, holds=False, training=True)
def test_the_future_leaks_in_training_where_causality_is_denied(name: str):
    """Top-k over the window: whether a token is kept depends on how later ones rank."""
    assert breaks(causality, model_of(name, training=True))


@every_case
def test_recomputing_blocks_changes_no_gradient(name: str):
    """Activation checkpointing replays blocks, never a draw."""
    tokens = torch.tensor(tokens_from(4, 30))
    stream = Stream.of([12, 18], windows=Windows((30,), (8,)))
    gradients = []
    for recompute in (False, True):
        model = decoder(CASES[name]).train()
        model.set_step(0, seed=2)
        model.checkpoint_blocks(recompute)
        loss = model.loss(tokens, tokens.roll(-1), stream)
        loss.backward()
        gradients.append([loss.detach(), *(p.grad for p in model.parameters())])
    for kept, recomputed in zip(*gradients, strict=True):
        assert torch.equal(kept, recomputed)


@pytest.mark.parametrize("name", ["block F", "block W", "subllm causal", "bracket subllm", "subllm by document"])
@pytest.mark.parametrize("lengths", [[0], [0, 0], [7]])
def test_an_empty_body_gives_every_parameter_a_gradient(name: str, lengths: list[int]):
    """A rank whose levels are empty takes part in every reduction."""
    model = decoder(CASES[name]).train()
    model.set_step(0)
    for resampler in model.resamplers:
        resampler.threshold.low.fill_(1e9)
    tokens = torch.zeros(sum(lengths), dtype=torch.int64)
    model.loss(tokens, tokens, Stream.of(lengths)).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
