"""Medusa's drafts: the very same tokens as without, in trees and in rows, and as many at once as heads are right."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from itertools import product
from random import Random

import pytest
import runs
import torch
from engines import WARM, alone, finish, request_of, tiny, tokens

from longwave.config import ModelConfig, build
from longwave.engine import Engine, EngineOptions, Sampling
from longwave.engine.drafts import Drafts
from longwave.engine.medusa import MedusaDrafts, expected_tokens_of, likeliest_places
from longwave.engine.sampling import choose_token, first_tokens
from longwave.engine.speculation import Begun, expected_tokens
from longwave.medusa import Medusa, MedusaConfig
from longwave.model import Decoder
from longwave.trees import chain, depths

every_model = pytest.mark.parametrize("kind", runs.MODELS)
ACCURACIES = ((0.5, 0.2, 0.1), (0.4, 0.2, 0.1), (0.3, 0.1, 0.05))
REQUESTS = [
    request_of(9, max_new_tokens=20),
    request_of(1, 1, sampling=WARM, sequence=1, max_new_tokens=20, logprobs=2),
    request_of(30, 2, max_new_tokens=1),
    request_of(17, 3, sampling=Sampling(temperature=0.7, top_k=20, seed=2), max_new_tokens=15),
    request_of(5, 4, sampling=Sampling(presence_penalty=0.5, repetition_penalty=1.3), max_new_tokens=10),
    request_of(runs.WINDOW - 6, 5, max_new_tokens=40),
]


def random_heads(kind: str, projection: str = "own", accuracies=ACCURACIES) -> MedusaDrafts:
    """Heads that have learned nothing, whose guesses are taken to be good."""
    heads = Medusa(tiny(kind), MedusaConfig(heads=3, projection=projection))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for head in heads.heads:
            head.residual.weight.copy_(torch.randn(32, 32, generator=generator) * 0.3)
    heads.accuracies = accuracies
    return MedusaDrafts(heads)


@cache
def expected(kind: str) -> list[list[int]]:
    return [tokens(alone(kind, one)) for one in REQUESTS]


def answered(engine: Engine) -> list[list[int]]:
    numbers = [engine.submit(one) for one in REQUESTS]
    found = finish(engine)
    return [tokens(found[number]) for number in numbers]


@every_model
@pytest.mark.parametrize(
    ("projection", "accuracies", "prefixes"),
    [("own", ACCURACIES, True), ("shared", ACCURACIES, False), ("own", (), False)],
)
def test_random_heads_change_no_token(kind: str, projection: str, accuracies: tuple, prefixes: bool):
    options = EngineOptions(running=3, step_tokens=90, drafts=12, page_size=8, prefixes=prefixes)
    engine = Engine(tiny(kind), options, proposer=random_heads(kind, projection, accuracies))
    for _ in range(1 + prefixes):
        assert answered(engine) == expected(kind)
    done = engine.metrics
    assert done.drafted_tokens > 100
    assert done.accepted_tokens < done.drafted_tokens
    engine.forget()
    assert engine.metrics.free_pages == engine.metrics.pages


class KnowingTree:
    """Drafts a tree, somewhere in which stands what will be chosen, to a depth that is drawn."""

    def __init__(self, answers: dict[tuple[int, ...], list[int]]) -> None:
        self.answers, self.draw, self.right = answers, Random(0), list[int]()
        self.branched = False

    def propose(self, texts: Sequence[Begun]) -> list[Drafts]:
        return [self._drafts(text) for text in texts]

    def _drafts(self, text: Begun) -> Drafts:
        [(prompt, answer)] = [one for one in self.answers.items() if tuple(text.tokens[: len(one[0])]) == one[0]]
        rest = answer[len(text.tokens) - len(prompt) :]
        deep = self.draw.randint(1, max(1, min(3, text.most // 3)))
        assert text.hidden is not None or len(text.tokens) == len(prompt)
        if not text.branches:
            self.right.append(min(deep, text.most, len(rest)))
            return Drafts.of(rest[: min(deep, text.most)])
        found, parents, on = list[int](), list[int](), -1
        for token in rest[:deep]:
            if len(found) + 2 > text.most:
                break
            wrong = (token + 1) % runs.VOCABULARY  # stands before the right one, so that the path is not the first rows
            found += [wrong, token]
            parents += [on, on]
            on = len(found) - 1
        self.right.append(len(found) // 2)
        self.branched |= bool(found)
        return Drafts(tuple(found), tuple(parents))

    def forget(self, number: int) -> None:
        return


@every_model
def test_one_path_of_a_tree_is_taken_wherever_it_stands(kind: str):
    answers = {one.prompt: answer for one, answer in zip(REQUESTS, expected(kind), strict=True)}
    proposer = KnowingTree(answers)
    options = EngineOptions(running=3, step_tokens=90, drafts=9, page_size=8)
    engine = Engine(tiny(kind), options, proposer=proposer)
    assert answered(engine) == expected(kind)
    assert engine.metrics.accepted_tokens == sum(proposer.right) > 20
    assert proposer.branched == tiny(kind).reads_trees == (kind != "around a hybrid")


def test_where_no_bit_may_change_drafts_follow_each_other():
    seen = list[bool]()

    class Watching(MedusaDrafts):
        def propose(self, texts: Sequence[Begun]) -> list[Drafts]:
            seen.extend(text.branches for text in texts)
            return super().propose(texts)

    shape = {"vocab_size": runs.VOCABULARY, "hidden_size": 64, "context_window": 64, "layout": "2F"}
    values = {**shape, "attention": {"heads": 2}, "mlp": {"size": 48}}
    model, told = Decoder(build(ModelConfig, values, "tests"), seed=3).eval(), list[list[int]]()
    heads = Medusa(model, MedusaConfig(heads=3))
    heads.accuracies = ACCURACIES
    for invariant in (False, True):
        engine = Engine(model, EngineOptions(running=1, invariant=invariant), proposer=Watching(heads))
        engine.submit(request_of(9))
        told += [tokens(events) for events in finish(engine).values()]
        assert seen
        assert all(one != invariant for one in seen)
        seen.clear()
    assert told[0] == told[1]


def test_a_tree_without_drafts_is_plain_decoding():
    engine = Engine(tiny("llama"), EngineOptions(running=1), proposer=random_heads("llama", accuracies=((),) * 3))
    assert likeliest_places(((),) * 3, 9) == likeliest_places(ACCURACIES, 0) == []
    engine.submit(request_of(9, max_new_tokens=1))
    finish(engine)
    assert engine.metrics.drafted_tokens == 0
    assert expected_tokens_of([]) == 1


@pytest.mark.parametrize("count", [1, 2, 3, 5, 8, 13, 40])
def test_the_tree_has_the_likeliest_places(count: int):
    """Against all places there are, sorted: a place is never likelier than the one before it or its elder sibling."""
    every = sorted(
        ((chance_of(path), path) for depth in (1, 2, 3) for path in product(range(3), repeat=depth)),
        reverse=True,
    )
    found = likeliest_places(ACCURACIES, count)
    assert len(found) == min(count, 39)
    assert [one.chance for one in found] == pytest.approx([chance for chance, _ in every[:count]])
    parents = tuple(one.parent for one in found)
    assert all(parent < number for number, parent in enumerate(parents))
    assert [one.head + 1 for one in found] == depths(parents)
    for one in found:
        before = 1.0 if one.parent < 0 else found[one.parent].chance
        assert one.chance == pytest.approx(before * ACCURACIES[one.head][one.rank])


def chance_of(path: tuple[int, ...]) -> float:
    chance = 1.0
    for head, rank in enumerate(path):
        chance *= ACCURACIES[head][rank]
    return chance


@pytest.mark.parametrize("sampling", [Sampling(), WARM, Sampling(temperature=0.7, top_k=5, seed=2)])
def test_first_tokens_begin_with_the_one_that_is_chosen(sampling: Sampling):
    for place in range(20):
        logits = torch.randn(30, generator=torch.Generator().manual_seed(place))
        found = first_tokens(logits, sampling, 1, place, 5)
        assert found[0] == choose_token(logits, sampling, 1, place)
        for number, taken in enumerate(found[:4]):  # without it, the next one would be chosen
            logits[taken] = -1e9
            if sampling.top_k is None:
                assert choose_token(logits, sampling, 1, place) == found[number + 1]
        assert len(set(found)) == 5


def test_expected_tokens_of_a_chain_are_the_formula():
    for accuracy in (0.0, 0.3, 0.8):
        places = likeliest_places(((accuracy,),) * 4, 4)
        assert tuple(one.parent for one in places) == chain(4)
        assert expected_tokens_of(places) == pytest.approx(expected_tokens(accuracy, 4))


def test_expected_tokens_of_a_tree_are_what_independent_guesses_give():
    places, draw = likeliest_places(ACCURACIES, 9), Random(0)
    drafts = Drafts(tuple(one.rank for one in places), tuple(one.parent for one in places))
    total, rounds = 0, 20_000
    for _ in range(rounds):
        at: int | None = -1
        for row in ACCURACIES:
            right = draw.choices([0, 1, 2, 3], [*row, 1 - sum(row)])[0]
            at = None if at is None else drafts.after(at, right)
            total += at is not None
    assert 1 + total / rounds == pytest.approx(expected_tokens_of(places), abs=0.02)


class Sure(Medusa):
    """Heads that all guess token 7."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        found = torch.zeros(3, len(hidden), runs.VOCABULARY, dtype=hidden.dtype)
        found[..., 7] = 1
        return found


@every_model
@pytest.mark.parametrize("accuracies", [ACCURACIES, ()])
def test_heads_that_are_right_are_followed_to_their_end(kind: str, accuracies: tuple):
    """Of 21 tokens the first is chosen behind the prompt alone, then four in a step; in the end less."""
    heads = Sure(tiny(kind), MedusaConfig(heads=3))
    heads.accuracies = accuracies
    engine = Engine(tiny(kind), EngineOptions(running=1, drafts=12, prefixes=False), proposer=MedusaDrafts(heads))
    engine.submit(request_of(9, max_new_tokens=21, sampling=Sampling(logit_bias={7: 1e6})))
    [events] = finish(engine).values()
    assert tokens(events) == [7] * 21
    fewer = 1 if accuracies and tiny(kind).reads_trees else 0
    assert engine.metrics.steps == 1 + 20 // 4 + fewer
    assert engine.metrics.accepted_tokens == 20 // 4 * 3 - fewer
