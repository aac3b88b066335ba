"""The engine: every request as if it were alone, whoever else is there; limits, ends and figures."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cache
from random import Random

import numpy as np
import pytest
import runs
import torch
from engines import WARM, alone, finish, prompt_of, request_of, tiny, tokens
from hypothesis import given, settings
from hypothesis import strategies as st

from longwave.engine import Engine, EngineOptions, Event, QueueFull, Request, Sampling
from longwave.engine.choosing import Chooser
from longwave.engine.scheduler import Scheduler
from longwave.engine.scheduler import Sequence as Running
from longwave.errors import UserError
from longwave.streams import Stream

every_model = pytest.mark.parametrize("kind", runs.MODELS)


@cache
def alone_of(kind: str, place: int) -> list[Event]:
    """The same for a request of MIXED."""
    return alone(kind, MIXED[place])


PENALISED = Sampling(presence_penalty=0.5, frequency_penalty=0.5, repetition_penalty=1.3)
MIXED = [
    request_of(9),
    request_of(1, 1, sampling=WARM, sequence=1),
    request_of(30, 2, max_new_tokens=3),
    request_of(17, 3, sampling=Sampling(temperature=0.7, top_k=20, top_p=0.9, min_p=0.01, seed=2), logprobs=3),
    request_of(
        5, 4, sampling=Sampling(presence_penalty=0.5, frequency_penalty=0.5, repetition_penalty=1.3), logprobs=0
    ),
    request_of(40, 5, sampling=Sampling(logit_bias={7: 4.0, 8: -100.0})),
]


# --- company ----------------------------------------------------------------------------------------------------------


@every_model
@pytest.mark.parametrize("options", [(2, 3), (3, 7), (16, 512)])
def test_a_request_gets_the_same_in_any_company(kind: str, options: tuple[int, int]):
    engine = Engine(tiny(kind), EngineOptions(*options))
    numbers = [engine.submit(one) for one in MIXED]
    found = finish(engine)
    for place, number in enumerate(numbers):
        expected = alone_of(kind, place)
        assert tokens(found[number]) == tokens(expected)
        assert [event.ended for event in found[number]] == [event.ended for event in expected]
        for one, other in zip(found[number], expected, strict=True):
            assert one.logprob == pytest.approx(other.logprob, abs=1e-9)
            assert [token for token, _ in one.likeliest] == [token for token, _ in other.likeliest]


@pytest.mark.parametrize("seed", range(12))
def test_requests_that_come_and_go_at_any_time_change_nothing(seed: int):
    """Requests are submitted between steps, and some are cancelled; the others get what they would get alone."""
    draw, kind = Random(seed), list(runs.MODELS)[seed % len(runs.MODELS)]
    engine = Engine(tiny(kind), EngineOptions(running=draw.randint(1, 4), step_tokens=draw.randint(5, 40)))
    left, asked, found = draw.sample(range(len(MIXED)), len(MIXED)), dict[int, int](), dict[int, list[int]]()
    cancelled = set[int]()
    while left or not engine.idle:
        if left and draw.random() < 0.5:
            place = left.pop()
            asked[engine.submit(MIXED[place])] = place
        elif asked and draw.random() < 0.1:
            cancelled.add(number := draw.choice(sorted(asked)))
            engine.cancel(number)
        for event in engine.step():
            assert event.request not in cancelled
            found.setdefault(event.request, []).extend(tokens([event]))
    for number, place in asked.items():
        got, expected = found.get(number, []), tokens(alone_of(kind, place))
        assert got == expected[: len(got)]
        assert number in cancelled or got == expected
    assert engine.metrics.state_bytes == 0


# --- scheduling -------------------------------------------------------------------------------------------------------


@settings(max_examples=200)
@given(
    prompts=st.lists(st.integers(1, 300), min_size=1, max_size=30),
    running=st.integers(1, 8),
    more=st.integers(1, 60),
)
def test_no_request_waits_longer_than_is_said(prompts: list[int], running: int, more: int):
    """The budget is kept and used; who is being continued always runs, and of the others the oldest has a quarter."""
    scheduler = Scheduler(list(range(running)), running + more)
    for number, length in enumerate(prompts):
        scheduler.waiting.append(Running(number, Request(prompt=(1,) * length, max_new_tokens=3), 3, "max_new_tokens"))
    steps = 0
    while scheduler.waiting or scheduler.running:
        while scheduler.waiting and scheduler.slots:
            scheduler.admit()
        continued = [one for one in scheduler.running if one.new_tokens]
        read = [one for one in scheduler.running if not one.new_tokens]
        pieces = {piece.sequence: piece.length for piece in scheduler.plan()}
        assert sum(pieces.values()) <= scheduler.tokens
        assert all(length > 0 for length in pieces.values())
        assert all(pieces[one] == 1 for one in continued)
        if read:
            assert pieces[read[0]] >= min(read[0].pending, max(1, (scheduler.tokens - len(continued)) // 4))
        assert sum(pieces.values()) == min(scheduler.tokens, sum(one.pending for one in scheduler.running))
        for one, length in pieces.items():
            one.seen += length
            if one.pending == 0:
                one.tokens.append(1)
                one.left -= 1
                if one.left == 0:
                    scheduler.leave(one)
        steps += 1
    assert steps <= 3 * len(prompts) + sum(prompts)
    assert sorted(scheduler.slots) == list(range(running))


def test_a_short_prompt_does_not_wait_for_a_long_one():
    engine = Engine(tiny("llama"), EngineOptions(running=2, step_tokens=8))
    long, short = engine.submit(request_of(50)), engine.submit(request_of(5, 1))
    first = next(event.request for _ in iter(int, 1) for event in engine.step())
    assert first == short
    assert len(tokens(finish(engine)[long])) == 12


# --- limits and ends --------------------------------------------------------------------------------------------------


def test_more_waiting_requests_than_may_are_refused():
    engine = Engine(tiny("llama"), EngineOptions(running=1, waiting=2))
    for _ in range(2):
        engine.submit(request_of())
    with pytest.raises(QueueFull, match="2 requests are waiting already"):
        engine.submit(request_of())
    engine.step()
    engine.submit(request_of())


def test_a_request_ends_when_its_time_is_over():
    now = [0.0]
    engine = Engine(tiny("llama"), EngineOptions(running=1), clock=lambda: now[0])
    first, second = engine.submit(request_of(timeout=5.0)), engine.submit(request_of(timeout=5.0))
    for _ in range(3):
        assert [event.request for event in engine.step()] == [first]
    now[0] = 5.0
    assert engine.step() == [Event(first, None, "timeout"), Event(second, None, "timeout")]
    assert engine.idle


def test_no_stop_token_comes_before_the_least_number_of_tokens():
    [event] = alone("llama", request_of(max_new_tokens=1))
    whole = alone("llama", request_of())
    ends = frozenset({event.token})
    assert [one.ended for one in alone("llama", request_of(stop_tokens=ends))] == ["end_token"]
    later = alone("llama", request_of(stop_tokens=ends, min_new_tokens=4))
    assert not ends & set(tokens(later)[:4])
    assert tokens(later) != tokens(whole)


class Alternating:
    """A grammar of even and odd tokens in turn, of a given length."""

    def __init__(self, length: int) -> None:
        self.accepted, self.length = list[int](), length

    @property
    def finished(self) -> bool:
        return len(self.accepted) == self.length

    def allowed(self) -> np.ndarray:
        return np.arange(runs.VOCABULARY) % 2 == len(self.accepted) % 2

    def accept(self, token: int) -> None:
        self.accepted.append(token)


@pytest.mark.parametrize("sampling", [Sampling(), WARM])
def test_a_grammar_says_what_may_come_and_when_it_ends(sampling: Sampling):
    grammar = Alternating(5)
    found = alone("llama", request_of(sampling=sampling, constraint=grammar))
    assert [token % 2 for token in tokens(found)] == [0, 1, 0, 1, 0]
    assert grammar.accepted == tokens(found)
    assert found[-1].ended == "stop"


def test_a_diverged_request_fails_and_its_neighbours_do_not(monkeypatch: pytest.MonkeyPatch):
    engine = Engine(tiny("llama"), EngineOptions(running=2))
    numbers = [engine.submit(request_of()), engine.submit(request_of(seed=1))]
    run = engine._run

    def broken(pieces):
        logits = run(pieces)
        logits[0, 3] = math.nan
        return logits

    monkeypatch.setattr(engine, "_run", broken)
    events = engine.step()
    assert (events[0].ended, events[1].ended) == ("failed", None)
    assert "largest logit" in str(events[0].error)
    monkeypatch.undo()
    assert tokens([events[1], *finish(engine)[numbers[1]]]) == tokens(alone("llama", request_of(seed=1)))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"prompt": ()}, "prompt is empty"),
        ({"prompt": (1,) * (runs.WINDOW + 1)}, f"prompt has {runs.WINDOW + 1} tokens"),
        ({"prompt": (runs.VOCABULARY,)}, "prompt has a token outside"),
        ({"prompt": (-1,)}, "prompt has a token outside"),
        ({"sampling": Sampling(logit_bias={runs.VOCABULARY: 1.0})}, "logit_bias names token"),
        ({"max_new_tokens": 0}, "max_new_tokens = 0"),
        ({"max_new_tokens": 3, "min_new_tokens": 4}, "min_new_tokens = 4: at most max_new_tokens = 3"),
        ({"min_new_tokens": -1}, "min_new_tokens = -1"),
        ({"logprobs": 21}, "logprobs = 21"),
        ({"timeout": 0.0}, "timeout = 0.0"),
    ],
)
def test_a_request_that_cannot_run_is_refused(values: Mapping[str, object], message: str):
    engine = Engine(tiny("llama"))
    with pytest.raises(UserError, match=message):
        engine.submit(request_of(**values))
    assert engine.idle


@pytest.mark.parametrize("options", [(0, 5, 1), (3, 3, 1), (1, 2, 0)])
def test_limits_without_sense_are_refused(options: tuple[int, int, int]):
    with pytest.raises(UserError):
        EngineOptions(*options)


# --- the choice -------------------------------------------------------------------------------------------------------


def test_penalties_are_the_formulas():
    """Against a plain loop over the tokens so far: repetition by prompt and text, the others by the text alone."""
    sampling = Sampling(presence_penalty=0.3, frequency_penalty=0.2, repetition_penalty=1.5)
    chooser = Chooser(request_of(4, sampling=sampling), runs.VOCABULARY, torch.device("cpu"))
    said = [5, 9, 5]
    for token in said:
        chooser.accept(token)
    logits = torch.randn(runs.VOCABULARY, dtype=torch.float64)
    expected = logits.tolist()
    for token in {*prompt_of(4), *said}:
        expected[token] = expected[token] / 1.5 if expected[token] > 0 else expected[token] * 1.5
    for token in set(said):
        expected[token] -= 0.3 + 0.2 * said.count(token)
    assert torch.allclose(chooser.left(logits, 7), torch.tensor(expected, dtype=torch.float64), atol=1e-12)


def test_log_probabilities_are_those_of_the_model():
    request = request_of(9, logprobs=4)
    so_far = list(request.prompt)
    for event in alone("llama", request):
        with torch.no_grad():
            told = tiny("llama")(torch.tensor(so_far), Stream.of([len(so_far)]))[-1].log_softmax(-1)
        assert event.logprob == pytest.approx(float(told.max()), abs=1e-9)
        assert [token for token, _ in event.likeliest] == told.topk(4).indices.tolist()
        assert event.token is not None
        so_far.append(event.token)


def test_figures_count_what_was_done():
    engine = Engine(tiny("llama"), EngineOptions(running=2))
    for seed in range(3):
        engine.submit(request_of(seed=seed, max_new_tokens=4))
    assert engine.metrics.waiting == 3
    finish(engine)
    done = engine.metrics
    assert (done.waiting, done.running, done.steps) == (0, 0, 8)
    assert (done.prompt_tokens, done.new_tokens, done.run_tokens) == (27, 12, 27 + 3 * 3)
