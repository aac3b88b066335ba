"""Speculative decoding: the very same tokens with drafts as without, whoever drafts, and all memory free at the end."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

import pytest
import runs
import torch
from engines import WARM, alone, finish, prompt_of, request_of, tiny, tokens

from longwave.engine import Engine, EngineOptions, Request, Sampling
from longwave.engine.drafts import Drafts
from longwave.engine.speculation import Begun, DraftModel, PromptLookup, Proposer, expected_tokens
from longwave.errors import UserError
from longwave.streams import Stream

every_model = pytest.mark.parametrize("kind", runs.MODELS)
LOOKUP = PromptLookup(longest=2, shortest=1)


class Knowing:
    """Drafts what will be chosen, with some tokens wrong and sometimes nothing at all."""

    def __init__(self, answers: dict[tuple[int, ...], list[int]], wrong: float) -> None:
        self.answers, self.wrong, self.draw, self.forgotten = answers, wrong, Random(0), set[int]()

    def propose(self, texts: Sequence[Begun]) -> list[Drafts]:
        return [Drafts.of(self._drafts(text) if self.draw.random() < 0.8 else []) for text in texts]

    def _drafts(self, text: Begun) -> list[int]:
        assert text.most > 0
        [(prompt, answer)] = [
            (prompt, answer) for prompt, answer in self.answers.items() if tuple(text.tokens[: len(prompt)]) == prompt
        ]
        rest = answer[len(text.tokens) - len(prompt) :][: self.draw.randint(1, text.most)]
        return [5 if self.draw.random() < self.wrong else token for token in rest]

    def forget(self, number: int) -> None:
        self.forgotten.add(number)


REQUESTS = [
    request_of(9, max_new_tokens=20),
    request_of(1, 1, sampling=WARM, sequence=1, max_new_tokens=20, logprobs=2),
    request_of(30, 2, max_new_tokens=1),
    request_of(17, 3, sampling=Sampling(temperature=0.7, top_k=20, seed=2), max_new_tokens=15),
    request_of(5, 4, sampling=Sampling(presence_penalty=0.5, repetition_penalty=1.3), max_new_tokens=10),
    request_of(runs.WINDOW - 6, 5, max_new_tokens=40),
]


def answered(engine: Engine, requests: Sequence[Request]) -> list[list[int]]:
    numbers = [engine.submit(one) for one in requests]
    found = finish(engine)
    return [tokens(found[number]) for number in numbers]


@every_model
@pytest.mark.parametrize("wrong", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("prefixes", [False, True])
def test_drafts_change_no_token(kind: str, wrong: float, prefixes: bool):
    expected = [tokens(alone(kind, one)) for one in REQUESTS]
    answers = {one.prompt: answer for one, answer in zip(REQUESTS, expected, strict=True)}
    proposer = Knowing(answers, wrong)
    options = EngineOptions(running=3, step_tokens=40, page_size=8, prefixes=prefixes)
    engine = Engine(tiny(kind), options, proposer=proposer)
    assert answered(engine, REQUESTS) == expected
    assert answered(engine, REQUESTS) == expected
    done = engine.metrics
    assert done.drafted_tokens > 20
    assert (done.accepted_tokens == done.drafted_tokens) == (wrong == 0)
    assert done.accepted_tokens == 0 or wrong < 1
    assert proposer.forgotten == set(range(2 * len(REQUESTS)))
    engine.forget()
    assert engine.metrics.free_pages == engine.metrics.pages


@every_model
@pytest.mark.parametrize("drafter", ["lookup", "itself", "another", "early exit"])
def test_whoever_drafts_the_text_is_the_same(kind: str, drafter: str):
    model = tiny(kind)
    proposers: dict[str, Proposer] = {
        "lookup": LOOKUP,
        "itself": DraftModel(model, 3),
        "another": DraftModel(tiny("causal"), 2),
        "early exit": DraftModel(model.beginning(1), 3),
    }
    engine = Engine(model, EngineOptions(running=3, step_tokens=40, page_size=8), proposer=proposers[drafter])
    requests = [one for one in REQUESTS if not one.sampling.penalises]
    assert answered(engine, requests) == [tokens(alone(kind, one)) for one in requests]
    done = engine.metrics
    assert done.drafted_tokens > 0
    assert drafter != "itself" or done.accepted_tokens == done.drafted_tokens
    if isinstance(proposer := proposers[drafter], DraftModel):
        assert not proposer._known
        assert all(one.free == one.pages for one in proposer._state.usage())


def test_a_prompt_in_pieces_is_drafted_behind_its_last_one():
    """A text that repeats itself is continued by looking it up, from the step on in which its prompt ends."""
    prompt = prompt_of(6) * 5
    engine = Engine(tiny("llama"), EngineOptions(running=1, step_tokens=10), proposer=LOOKUP)
    drafted = list[int]()
    number = engine.submit(request_of(prompt=prompt))
    while not engine.idle:
        engine.step()
        drafted.append(engine.metrics.drafted_tokens)
    assert drafted[:3] == [0, 0, 4]  # thirty tokens in steps of ten
    assert number == 0


def test_an_end_token_among_the_drafts_ends_the_text():
    whole = tokens(alone("llama", REQUESTS[0]))
    place = next(i for i, token in enumerate(whole) if i > 2 and token not in whole[:i])
    request = request_of(9, max_new_tokens=20, stop_tokens=frozenset({whole[place]}))
    engine = Engine(tiny("llama"), EngineOptions(running=1), proposer=Knowing({request.prompt: whole}, 0.0))
    engine.submit(request)
    [events] = finish(engine).values()
    assert tokens(events) == whole[: place + 1]
    assert events[-1].ended == "end_token"


@pytest.mark.parametrize(
    ("tokens", "most", "drafts"),
    [
        ([1, 2, 3, 4, 1, 2], 3, [3, 4, 1]),
        ([1, 2, 3, 1, 2, 9, 1, 2], 1, [9]),  # where they came last
        ([1, 2, 3, 4], 3, []),
        ([7, 7, 7], 2, [7]),
        ([1], 2, []),
    ],
)
def test_lookup_drafts_what_followed(tokens: list[int], most: int, drafts: list[int]):
    assert PromptLookup().propose([Begun(0, tokens, most, Sampling(), 0)]) == [Drafts.of(drafts)]


def test_an_early_exit_is_the_first_layers_with_norm_and_head():
    model, stream, ids = tiny("llama"), Stream.of([7]), torch.tensor(prompt_of(7))
    with torch.no_grad():
        hidden = model.embed(ids)
        layer = model.stack.layers[0]
        hidden = layer(hidden, stream.carrying(**model.passengers(stream)), None)
        assert torch.equal(model.beginning(1)(ids, stream), model.logits(model.norm(hidden)))
    assert model.beginning(1).head_weight is model.head_weight
    assert len(model.stack.layers) == len(tiny("llama").stack.layers) > 1
    with pytest.raises(UserError, match=r"layers = 0: from 1 to"):
        model.beginning(0)


def test_expected_tokens_are_the_sum_of_the_chances():
    for acceptance in (0.0, 0.3, 0.9, 1.0):
        assert expected_tokens(acceptance, 4) == pytest.approx(sum(acceptance**i for i in range(5)))


def test_drafts_have_to_fit_into_a_step():
    with pytest.raises(UserError, match="step_tokens = 30: more than 36, for 4 drafts"):
        Engine(tiny("llama"), EngineOptions(running=4, step_tokens=30), proposer=LOOKUP)
