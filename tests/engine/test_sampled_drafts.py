"""Sampled texts with drafts have the model's own distribution: every continuation of two tokens, counted."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from longwave.config import ModelConfig, build
from longwave.engine import Engine, EngineOptions, Request, Sampling
from longwave.engine.sampling import choose_token
from longwave.engine.speculation import DraftModel, PromptLookup, Proposer
from longwave.model import Decoder
from longwave.streams import Stream

VOCABULARY, PROMPT, DRAWS = 5, (1, 4, 1, 4, 1), 1500
CRITICAL = 51.2  # of the chi-square distribution with 24 degrees of freedom: 1 in 1,000 lies above


def model_of(seed: int) -> Decoder:
    values = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "layout": "F L",
        "context_window": 32,
        "attention": {"heads": 1},
        "mlp": {"size": 32},
    }
    return Decoder(build(ModelConfig, values, "tests"), seed=seed).double().eval()


@torch.no_grad()
def chances(model: Decoder) -> dict[tuple[int, int], float]:
    """The probability of every two tokens behind the prompt, by the model's own forward."""
    found = dict[tuple[int, int], float]()
    first = model(torch.tensor(PROMPT), Stream.of([len(PROMPT)]))[-1].softmax(-1)
    for token in range(VOCABULARY):
        both = (*PROMPT, token)
        second = model(torch.tensor(both), Stream.of([len(both)]))[-1].softmax(-1)
        found |= {(token, other): float(first[token] * second[other]) for other in range(VOCABULARY)}
    return found


def drawn(model: Decoder, proposer: Proposer | None) -> tuple[Counter[tuple[int, ...]], int]:
    """How often each continuation was drawn, and how many drafts counted."""
    engine = Engine(model, EngineOptions(running=32, waiting=DRAWS, drafts=2, prefixes=False), proposer=proposer)
    texts: dict[int, list[int]] = {
        engine.submit(Request(prompt=PROMPT, max_new_tokens=2, sampling=Sampling(temperature=1.0, seed=seed))): []
        for seed in range(DRAWS)
    }
    while not engine.idle:
        for event in engine.step():
            if event.token is not None:
                texts[event.request].append(event.token)
    return Counter(map(tuple, texts.values())), engine.metrics.accepted_tokens


def chi_square(counts: Counter[tuple[int, ...]], right: dict[tuple[int, int], float]) -> float:
    return sum((counts[pair] - DRAWS * chance) ** 2 / (DRAWS * chance) for pair, chance in right.items())


@pytest.mark.parametrize("by", ["nobody", "another model", "the first layer", "lookup"])
def test_two_tokens_are_drawn_as_often_as_the_model_says(by: str):
    model = model_of(1)
    makers = {
        "nobody": lambda: None,
        "another model": lambda: DraftModel(model_of(2)),
        "the first layer": lambda: DraftModel(model.beginning(1)),
        "lookup": lambda: PromptLookup(2, 1),
    }
    counts, accepted = drawn(model, makers[by]())
    right = chances(model)
    assert min(right.values()) * DRAWS > 5  # below, the statistic has another distribution
    assert chi_square(counts, right) < CRITICAL
    assert accepted > 0 or by == "nobody"


def test_two_models_draw_the_same_token_about_as_often_as_they_can():
    """The rule of Daliri et al. promises (1 - d) / (1 + d) of the draws, d being the total variation distance."""
    with torch.no_grad():
        one, other = (model_of(seed)(torch.tensor(PROMPT), Stream.of([len(PROMPT)]))[-1] for seed in (1, 2))
    distance = float((one.softmax(-1) - other.softmax(-1)).abs().sum()) / 2
    assert one.argsort().tolist() != other.argsort().tolist()
    draws = [Sampling(temperature=1.0, seed=seed) for seed in range(2000)]
    same = sum(choose_token(one, draw, 0, 5) == choose_token(other, draw, 0, 5) for draw in draws) / len(draws)
    assert (1 - distance) / (1 + distance) - 0.03 < same <= 1 - distance + 0.03


def test_another_distribution_is_noticed():
    counts, _ = drawn(model_of(2), None)
    assert chi_square(counts, chances(model_of(1))) > CRITICAL
