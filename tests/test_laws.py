"""The laws of design.md, proven for every registered part in each mode: what is declared holds, what is denied fails.

Declared laws are proven in fp64 with drawn lengths, chunkings, companies and cuts. Two remarks on what "nothing
changes" means here. Where as many rows run at every level, outputs are compared bit by bit; where a change of tokens
changes how many rows a level keeps, matrix products of another shape round differently in their last bit, so the bound
is 1e-12. And training knows no state, so the laws about states (CHUNKING, ROLLBACK) are shown failing only for the
selection that breaks them.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from contract import (
    CASES,
    VOCABULARY,
    WINDOW,
    Case,
    alone,
    cuts_of,
    declared,
    decoder,
    distance,
    in_pieces,
    model_of,
    rows_run,
    sequences,
    step,
    together,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from longwave.blocks import BLOCKS, PARTS
from longwave.errors import UserError
from longwave.laws import ALL, Law
from longwave.model import Decoder
from longwave.resamplers import BRACKETS
from longwave.states import Extents, PerToken, State, StateSpec
from longwave.stream import Stream, Windows

EXACT, CLOSE, LEAK = 1e-12, 1e-10, 1e-6
FEWER = settings(max_examples=max(8, settings().max_examples // 3))

every_case = pytest.mark.parametrize("name", CASES)


# --- the cases themselves ---------------------------------------------------------------------------------------------


def test_every_registered_part_is_in_a_case():
    letters = {letter for case in CASES.values() for letter in case.layout if letter in BLOCKS}
    assert letters == set(BLOCKS)
    assert all(any(f"{name}(" in case.layout for case in CASES.values()) for name in BRACKETS)
    assert {part for kind in BLOCKS.values() for part in kind.parts} == set(PARTS)


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


@every_case
def test_at_inference_every_part_declares_every_law(name: str):
    assert declared(model_of(name), training=False) == ALL


# --- chunking ---------------------------------------------------------------------------------------------------------


@every_case
@FEWER
@given(tokens=sequences(), data=st.data())
def test_chunking_gives_the_same_output(name: str, tokens: list[int], data: st.DataObject):
    model = model_of(name)
    pieces = cuts_of(data.draw, len(tokens))
    assert distance(in_pieces(model, tokens, pieces), alone(model, tokens)) <= CLOSE


@every_case
def test_token_by_token_gives_the_same_output(name: str):
    model, tokens = model_of(name), tokens_from(1, 3 * WINDOW + 20)
    assert distance(in_pieces(model, tokens, range(1, len(tokens))), alone(model, tokens)) <= CLOSE


@every_case
@FEWER
@given(tokens=sequences(), data=st.data())
def test_chunking_in_single_precision(name: str, tokens: list[int], data: st.DataObject):
    model = model_of(name, dtype=torch.float32)
    pieces = cuts_of(data.draw, len(tokens))
    assert distance(in_pieces(model, tokens, pieces), alone(model, tokens)) <= 1e-5


def test_chunking_fails_for_a_selection_that_ranks():
    """Top-k over what is at hand depends on what is at hand."""
    name = "resampler subllm"
    assert Law.CHUNKING not in declared(model_of(name, training=True), training=True)
    model = model_of(name, training=True)
    assert finds(
        lambda seed: distance(in_pieces(model, tokens_from(seed, 16), [8]), alone(model, tokens_from(seed, 16)))
    )


# --- company ----------------------------------------------------------------------------------------------------------


@every_case
@FEWER
@given(data=st.data())
def test_company_changes_nothing(name: str, data: st.DataObject):
    """Sequences of drawn lengths, each cut into drawn pieces, served in a drawn order."""
    model = model_of(name)
    runs = data.draw(st.lists(sequences(14), min_size=2, max_size=4))
    served = interleaved(model, runs, data.draw)
    for tokens, logits in zip(runs, served, strict=True):
        assert distance(logits, alone(model, tokens)) <= CLOSE


def interleaved(model: Decoder, runs: list[list[int]], draw: Callable[..., Any]) -> list[Tensor]:
    """Logits of sequences that progress piece by piece, some in each call, empty pieces among them."""
    state, done = model.state(len(runs)), [0] * len(runs)
    logits: list[list[Tensor]] = [[] for _ in runs]
    while any(at < len(run) for at, run in zip(done, runs, strict=True)):
        slots = draw(st.permutations(range(len(runs))))[: draw(st.integers(1, len(runs)))]
        sizes = [draw(st.integers(0, len(runs[slot]) - done[slot])) for slot in slots]
        if not any(sizes):
            slots = [next(slot for slot, run in enumerate(runs) if done[slot] < len(run))]
            sizes = [len(runs[slots[0]]) - done[slots[0]]]
        pieces = [runs[slot][done[slot] : done[slot] + size] for slot, size in zip(slots, sizes, strict=True)]
        outputs = step(model, state, pieces, slots).split(sizes)
        for slot, size, output in zip(slots, sizes, outputs, strict=True):
            logits[slot].append(output)
            done[slot] += size
    assert state.seen == [len(run) for run in runs]
    return [torch.cat(pieces) for pieces in logits]


@every_case
@FEWER
@given(runs=st.lists(sequences(14), min_size=2, max_size=5), order=st.randoms(use_true_random=False))
def test_company_without_a_state(name: str, runs: list[list[int]], order: random.Random):
    model = model_of(name)
    order.shuffle(runs)
    for tokens, logits in zip(runs, together(model, runs), strict=True):
        assert distance(logits, alone(model, tokens)) <= CLOSE


def by_law(law: Law, holds: bool) -> list[str]:
    return [name for name in CASES if (law in declared(model_of(name, training=True), training=True)) == holds]


@pytest.mark.parametrize("name", by_law(Law.COMPANY, True))
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


@pytest.mark.parametrize("name", by_law(Law.COMPANY, False))
def test_company_fails_in_training_where_it_is_denied(name: str):
    """Documents of one window compete for their places."""
    model = model_of(name, training=True)

    def difference(seed: int) -> float:
        mine, other = tokens_from(seed, 12), tokens_from(seed + 100, 12)
        return distance(together(model, [mine, other], Windows((24,), (0,)))[0], alone(model, mine))

    assert finds(difference)


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


# --- causality --------------------------------------------------------------------------------------------------------


def change_before(model: Decoder, tokens: list[int], place: int, others: list[int]) -> tuple[float, bool]:
    """How much the outputs before `place` change with the tokens from there on, and whether as many rows ran."""
    with rows_run(model) as rows:
        first = alone(model, tokens)
        half = len(rows)
        second = alone(model, tokens[:place] + others)
    return distance(first[:place], second[:place]), rows[:half] == rows[half:]


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
@every_case
@FEWER
@given(tokens=sequences(), data=st.data())
def test_the_future_changes_nothing(name: str, training: bool, tokens: list[int], data: st.DataObject):
    model = model_of(name, training)
    if Law.CAUSALITY not in declared(model, training):
        return
    place = data.draw(st.integers(0, len(tokens) - 1))
    others = data.draw(sequences(len(tokens) - place, len(tokens) - place))
    change, same_shapes = change_before(model, tokens, place, others)
    assert change <= (0 if same_shapes else EXACT)


@pytest.mark.parametrize("name", by_law(Law.CAUSALITY, False))
def test_the_future_leaks_in_training_where_causality_is_denied(name: str):
    """Top-k over the window: whether a token is kept depends on how later ones rank."""
    model = model_of(name, training=True)

    def difference(seed: int) -> float:
        return change_before(model, tokens_from(seed, 24), 12, tokens_from(seed + 100, 12))[0]

    assert finds(difference)


def tokens_from(seed: int, count: int) -> list[int]:
    return random.Random(seed).choices(range(VOCABULARY), k=count)


def finds(difference: Callable[[int], float]) -> bool:
    """Whether one of twenty seeds is a counter-example that no rounding explains."""
    return any(difference(seed) > LEAK for seed in range(20))


# --- rollback ---------------------------------------------------------------------------------------------------------


@every_case
@FEWER
@given(tokens=sequences(), junk=sequences(20), data=st.data())
def test_a_snapshot_is_returned_to(name: str, tokens: list[int], junk: list[int], data: st.DataObject):
    """Twice, after different continuations, and the rest of the sequence then runs as if nothing had happened."""
    model, state = model_of(name), model_of(name).state()
    place = data.draw(st.integers(0, len(tokens)))
    whole = alone(model, tokens)
    in_pieces(model, tokens[:place], cuts_of(data.draw, place, 3), state)
    used = state.used_bytes()
    snapshot = state.snapshot(0)
    for _ in range(2):
        in_pieces(model, junk, cuts_of(data.draw, len(junk), 3), state)
        state.restore(snapshot)
        assert (state.seen, state.used_bytes()) == ([place], used)
    assert distance(in_pieces(model, tokens[place:], [], state), whole[place:]) <= CLOSE


@every_case
@FEWER
@given(tokens=sequences(), junk=sequences(20), data=st.data())
def test_truncation_is_a_fresh_run_or_is_refused(name: str, tokens: list[int], junk: list[int], data: st.DataObject):
    """Only what a window or a recurrence has forgotten may be refused, and a refusal changes nothing."""
    model, state = model_of(name), model_of(name).state()
    place = data.draw(st.integers(0, len(tokens)))
    ran = tokens[:place] + junk
    in_pieces(model, ran, cuts_of(data.draw, len(ran)), state)
    used = state.used_bytes()
    if refusal := refusal_of(state, place):
        assert "has forgotten" in refusal
        assert any(spec.forgets for spec in state.specs.values())
        assert (state.seen, state.used_bytes()) == ([len(ran)], used)
        assert distance(in_pieces(model, tokens, [], state), alone(model, ran + tokens)[len(ran) :]) <= CLOSE
        return
    fresh = model.state()
    in_pieces(model, tokens[:place], [], fresh)
    assert (state.seen, state.used_bytes()) == (fresh.seen, fresh.used_bytes())
    assert distance(in_pieces(model, tokens[place:], [], state), alone(model, tokens)[place:]) <= CLOSE


def refusal_of(state: State, length: int) -> str:
    """What truncating slot 0 is refused with, or nothing."""
    try:
        state.truncate(0, length)
    except ValueError as refusal:
        return str(refusal)
    return ""


@every_case
@FEWER
@given(runs=st.lists(sequences(10), min_size=3, max_size=3), data=st.data())
def test_reordered_slots_go_on_by_themselves(name: str, runs: list[list[int]], data: st.DataObject):
    """Beam search: slots are copied, dropped and swapped, and each copy then goes its own way."""
    model = model_of(name)
    state = model.state(3)
    step(model, state, runs, [0, 1, 2])
    sources = data.draw(st.lists(st.integers(0, 2), min_size=1, max_size=4))
    state.reorder(sources)
    assert state.slots == len(sources)
    endings = [data.draw(sequences(5)) for _ in sources]
    outputs = step(model, state, endings).split([len(ending) for ending in endings])
    for source, ending, logits in zip(sources, endings, outputs, strict=True):
        assert distance(logits, alone(model, runs[source] + ending)[len(runs[source]) :]) <= CLOSE


@every_case
def test_a_released_slot_starts_afresh(name: str):
    model, first, second = model_of(name), tokens_from(0, 20), tokens_from(1, 9)
    state = model.state(2)
    step(model, state, [first, first])
    before = state.used_bytes(1)
    state.release(0)
    assert (state.seen, state.used_bytes(0), state.used_bytes(1)) == ([0, 20], 0, before)
    assert distance(step(model, state, [second, second], [0, 1])[:9], alone(model, second)) <= CLOSE


# --- states: bytes, poison, refusals ----------------------------------------------------------------------------------


def kept_places(model: Decoder, state: State, slot: int) -> dict[int, list[int]]:
    """The place of every token that each level keeps; level -1 keeps all."""
    orders = {r.index: state.of(r.site.name, slot).view("order").flatten().tolist() for r in model.resamplers}
    return {-1: list(range(state.seen[slot])), **orders}


@every_case
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_used_bytes_are_the_kept_tokens_times_the_declared_sizes(name: str, dtype: torch.dtype):
    model = decoder(CASES[name], dtype=dtype)
    runs, state = [tokens_from(0, 23), tokens_from(1, 3), tokens_from(2, 11)], model.state(3)
    step(model, state, runs)
    for slot in range(3):
        places = kept_places(model, state, slot)
        expected = 0
        for part, spec in state.specs.items():
            held = min(len(places[spec.level]), spec.window or 10**9)
            assert state.of(part, slot).length == len(places[spec.level])
            counts = {name: max(0, (held - e.width) // e.every + 1) for name, e in spec.per_token.items()}
            expected += sum(
                counts[n] * e.heads * e.size * (e.dtype or dtype).itemsize for n, e in spec.per_token.items()
            )
            arrays = [state.of(part, slot).recall(name) for name in spec.per_sequence]
            assert all(array.dtype.itemsize >= 4 for array in arrays), "a recurrent state is never in low precision"
            expected += sum(array.nbytes for array in arrays) if held else 0
        assert state.used_bytes(slot) == expected
        assert state.reserved_bytes(slot) >= expected
    assert state.used_bytes() == sum(state.used_bytes(slot) for slot in range(3))


def test_a_skipped_token_leaves_the_inner_state_as_it_was():
    model, state = model_of("subllm around F"), model_of("subllm around F").state()
    skipped = 0
    for token in tokens_from(3, 40):
        before = {name: part.length for name, part in state._sequences[0].parts.items()}
        with rows_run(model) as rows:
            step(model, state, [[token]])
        after = {name: part.length for name, part in state._sequences[0].parts.items()}
        for name, spec in state.specs.items():
            enters = spec.level < 0 or spec.level < len(rows)
            skipped += not enters
            assert after[name] == before[name] + enters
    assert skipped


def test_new_memory_is_poisoned_and_never_read():
    """The fixture of conftest.py works for the memory of states, and no output ever depends on it."""
    spec = StateSpec({"key": PerToken(2, 3), "order": PerToken(1, 1, torch.int32)})
    extents = Extents(spec, torch.float32, torch.device("cpu"))
    extents.reserve(7)
    extents.append(key=torch.ones(2, 4, 3), order=torch.ones(1, 4, 1, dtype=torch.int32))
    assert extents.capacity == 7
    assert extents._arrays["key"][:, :4].eq(1).all()
    assert extents._arrays["key"][:, 4:].isnan().all()
    assert extents._arrays["order"][:, 4:].eq(torch.iinfo(torch.int32).max).all()


@every_case
def test_outputs_never_read_reserved_memory(name: str):
    model, tokens = model_of(name), tokens_from(5, 30)
    state = model.state()
    state.reserve(50)
    logits = in_pieces(model, tokens, [7, 8, 9, 20], state)
    for part, spec in state.specs.items():
        extents = state.of(part, 0)
        for array, entry in spec.per_token.items():
            beyond = extents._arrays[array][:, entry.count(extents.held) :]
            assert beyond.numel()
            assert entry.dtype is not None or spec.window is not None or beyond.isnan().all()
    assert distance(logits, alone(model, tokens)) <= CLOSE


def test_reserving_ahead_means_that_nothing_moves():
    model = model_of("subllm around F")
    state = model.state()
    state.reserve(40)
    before = state.reserved_bytes()
    in_pieces(model, tokens_from(0, 40), range(1, 40), state)
    assert state.reserved_bytes() == before


def entries(first: int, count: int) -> Tensor:
    """(2, n, 3) entries that tell their own number."""
    return torch.arange(first, first + count, dtype=torch.float32).view(1, -1, 1).expand(2, count, 3)


@given(
    window=st.none() | st.integers(1, 9),
    operations=st.lists(
        st.tuples(st.sampled_from(["append"] * 6 + ["truncate", "copy", "reserve", "hold"]), st.integers(0, 90)),
        max_size=30,
    ),
)
def test_extents_are_a_list_whose_oldest_entries_a_window_forgets(window: int | None, operations):
    extents = Extents(StateSpec({"key": PerToken(2, 3)}, window), torch.float32, torch.device("cpu"))
    plain, held = 0, None  # entries are their own numbers, so the length says all
    for operation, size in operations:
        if operation == "append":
            seen = extents.append(key=entries(plain, size))[0]
            plain += size
            visible = min(plain, size + (window or plain + 1) - 1)
            assert torch.equal(seen[:, seen.shape[1] - visible :], entries(plain - visible, visible))
        elif operation == "truncate":
            length = max(0, plain - size % 12)
            try:
                extents.truncate(length)
                plain = length
            except ValueError:
                assert window is not None
                assert extents.start > length - window + 1
                assert held is None or length < held, "whatever comes after a hold can be returned to"
        elif operation == "copy":
            extents = extents.copy()
        elif operation == "hold":
            extents.hold()
            held = plain
        else:
            extents.reserve(size)
        assert extents.length == plain
        assert extents.held >= min(plain, (window or plain + 1) - 1)
        assert torch.equal(extents.view("key"), entries(extents.start, extents.held))
        assert extents.used_bytes == min(plain, window or plain) * 2 * 3 * 4


@pytest.mark.parametrize("window", [1, 2, 5, 64, 100])
def test_a_window_neither_grows_nor_moves_often_over_a_long_decode(window: int, monkeypatch: pytest.MonkeyPatch):
    moves: list[int] = []
    forget = Extents._forget
    monkeypatch.setattr(Extents, "_forget", lambda self, count: (moves.append(count), forget(self, count))[1])
    extents = Extents(StateSpec({"key": PerToken(2, 3)}, window), torch.float32, torch.device("cpu"))
    steps = 1000
    for number in range(steps):
        seen = extents.append(key=entries(number, 1))[0]
        visible = min(window, number + 1)
        assert torch.equal(seen[:, -visible:], entries(number + 1 - visible, visible))
    assert extents.reserved_bytes <= max(64, 3 * window) * 2 * 3 * 4
    assert len(moves) <= steps / max(1, window // 2) + 2


@pytest.mark.parametrize("window", [1, 2, 5, 40])
def test_truncation_is_refused_exactly_where_a_visible_token_is_gone(window: int):
    extents = Extents(StateSpec({"key": PerToken(2, 3)}, window), torch.float32, torch.device("cpu"))
    for number in range(200):
        extents.append(key=entries(number, 1))
    assert extents.start > 0
    for length in range(201):
        seen_next = range(max(0, length - window + 1), length)
        cut = extents.copy()
        if all(place >= extents.start for place in seen_next) and length >= extents.start:
            cut.truncate(length)
            seen = cut.append(key=entries(length, 1))[0]
            assert torch.equal(seen[:, -len(seen_next) - 1 :], entries(length - len(seen_next), len(seen_next) + 1))
        else:
            with pytest.raises(ValueError, match=f"length {length} cannot be returned to: a window of {window}"):
                cut.truncate(length)
            assert cut.length == 200


def test_without_a_window_growth_copies_seldom():
    extents = Extents(StateSpec({"key": PerToken(2, 3)}), torch.float32, torch.device("cpu"))
    capacities = set()
    for number in range(5000):
        extents.append(key=entries(number, 1))
        capacities.add(extents.capacity)
    assert len(capacities) < 15
    assert torch.equal(extents.view("key"), entries(0, 5000))


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
    state._sequences[0].seen = (1 << 31) - 2
    state.stream([2])
    with pytest.raises(UserError, match="a sequence of 2,147,483,649 tokens: places are counted up to 2,147,483,647"):
        state.stream([3])


def test_entries_that_sum_up_tokens_are_the_same_in_any_pieces_and_after_a_cut():
    """Three tokens each, one every two; what a cut has made incomplete is made again."""
    spec = StateSpec({"key": PerToken(2, 3), "sums": PerToken(2, 3, width=3, every=2)})

    def summed(keys: Tensor) -> Tensor:
        return keys.unfold(1, 3, 2).sum(-1)

    extents, keys = Extents(spec, torch.float64, torch.device("cpu")), torch.randn(2, 60, 3, dtype=torch.float64)
    draw, length = random.Random(0), 0
    for _ in range(200):
        if draw.random() < 0.2:
            length = draw.randint(0, length)
            extents.truncate(length)
        size = draw.randint(0, min(9, 60 - length))
        extents.append(key=keys[:, length : length + size])
        length += size
        count = max(0, (length - 3) // 2 + 1)
        assert spec.per_token["sums"].count(length) == count
        if draw.random() < 0.7:
            expected = summed(keys[:, :length]) if count else keys[:, :0]
            assert torch.equal(extents.sum_up("sums", "key", summed), expected)
            assert torch.equal(extents.copy().view("sums"), expected)
            assert extents.used_bytes == (length + count) * 2 * 3 * 8


# --- what training and sharding rely on -------------------------------------------------------------------------------


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


@pytest.mark.parametrize("name", ["block F", "block W", "subllm causal", "resampler subllm", "subllm by document"])
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


def test_a_state_made_under_autocast_continues_under_autocast():
    model, tokens = decoder(Case("F subllm(0.5: F) W"), dtype=torch.float32), torch.tensor(tokens_from(0, 9))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        state = model.state()
        pieces = [model(piece, state.stream([len(piece)]), state) for piece in tokens.split([4, 4, 1])]
        assert distance(torch.cat(pieces).float(), model(tokens, Stream.of([9])).float()) < 0.1
