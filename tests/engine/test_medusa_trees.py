"""Trees of drafts: every part that says it reads them gives each draft what it gets alone on its path."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from longwave.blocks import PARTS
from longwave.config import ModelConfig, build
from longwave.model import Decoder
from longwave.resamplers import BRACKETS
from longwave.states import PageOptions, State
from longwave.streams import Stream
from longwave.trees import chain, depths, paths

SHAPE = {"vocab_size": 97, "hidden_size": 32, "context_window": 256, "attention": {"heads": 4, "kv_heads": 2}}
INFLLM = {"kernel_size": 4, "kernel_stride": 2, "block_size": 4, "window_size": 8, "topk": 2, "regime": "sparse"}
MODELS: dict[str, dict[str, Any]] = {
    "full": {"layout": "3F"},
    "window": {"layout": "W F W", "window": {"size": 5}},
    "window of one": {"layout": "2W", "window": {"size": 1}},
    "linear": {"layout": "3L"},
    "linear without rotation": {"layout": "2L", "lightning": {"rotary": False, "kv_heads": 2, "silu": "qk"}},
    "hybrid": {"layout": "L F W L", "window": {"size": 7}},
    "levels": {"layout": "F subllm(0.64: F subllm(0.64: F) F) F", "subllm": {"selection": "causal"}},
    "linear in levels": {"layout": "L subllm(0.64: L subllm(0.64: L W) F) L", "window": {"size": 4}},
    "kept distances": {"layout": "L subllm(0.5: 2L) L", "lightning": {"distance": "kept"}},
}
TREES: dict[str, tuple[int, ...]] = {
    "two roots": (-1, -1),
    "sparse": (-1, 0, -1, 1, 0, 2, 3, 4, 2, 5),
    "wide": (-1,) * 6,
    "chain": chain(4),
    "largest": tuple((number - 1) // 2 if number else -1 for number in range(63)),
}


def model_of(kind: str, dtype: torch.dtype = torch.float64) -> Decoder:
    values = {"mlp": {"size": 48}, **SHAPE, **MODELS[kind]}
    model = Decoder(build(ModelConfig, values, "tests"), seed=1).to(dtype).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.mul_(4)
    return model


def some(length: int, seed: int) -> list[int]:
    return torch.randint(0, 97, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


@torch.no_grad()
def run(model: Decoder, state: State, tokens: list[list[int]], parents: list[tuple[int, ...]] | None = None) -> Tensor:
    stream = state.stream([len(one) for one in tokens])
    stream = stream if parents is None else stream.branching(parents)
    return model(torch.tensor([token for one in tokens for token in one]), stream, state)


def led(number: int, parents: tuple[int, ...]) -> list[int]:
    """The numbers of the drafts that lead to one, itself the last."""
    return [*(led(parents[number], parents) if parents[number] >= 0 else []), number]


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("tree", TREES)
@pytest.mark.parametrize("paged", [False, True])
def test_a_draft_gets_what_its_path_gets_alone(kind: str, tree: str, paged: bool):
    """Beside other trees, a chain and the piece of a prompt, which keep what they get, and are remembered."""
    model, parents = model_of(kind), TREES[tree]
    pages = PageOptions(tokens=1024, size=8) if paged else None
    past = [some(length, seed) for seed, length in enumerate((11, 3, 20, 0))]
    text, drafts = [some(3, 4), some(1, 5), some(9, 6), some(2, 7)], some(len(parents), 8)
    ends = [parents, (-1, 0, 0), (), (-1,)]
    state = model.state(4, pages=pages)
    run(model, state, past)
    pieces = [[*one, *(drafts * 2)[: len(its)]] for one, its in zip(text, ends, strict=True)]
    with state.postponed():
        found = run(model, state, pieces, ends).split([len(one) for one in pieces])
    state.settle(undone=(0, 1))

    alone = [
        logits_alone(model, [*past[0], *text[0], *(drafts[one] for one in led(last, parents))], 0)
        for last in range(len(parents))
    ]
    assert torch.allclose(found[0][len(text[0]) :], torch.stack(alone), atol=1e-9, rtol=1e-9)
    for number in range(4):
        whole = logits_alone(model, [*past[number], *text[number]], None)[len(past[number]) :]
        assert torch.allclose(found[number][: len(text[number])], whole, atol=1e-9, rtol=1e-9)
    assert state.seen == [11, 3, 29, 3]
    again = run(model, state, [some(4, 9), some(4, 9), some(4, 9), some(4, 9)]).split(4)
    rest = [[], [], text[2], [*text[3], (drafts * 2)[0]]]
    for number in range(4):
        whole = logits_alone(model, [*past[number], *rest[number], *some(4, 9)], None)[-4:]
        assert torch.allclose(again[number], whole, atol=1e-9, rtol=1e-9)


@torch.no_grad()
def logits_alone(model: Decoder, tokens: list[int], last: int | None) -> Tensor:
    """Of one sequence by itself: of all rows, or of the last one."""
    found = model(torch.tensor(tokens), Stream.of([len(tokens)]))
    return found if last is None else found[-1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["hybrid", "linear in levels"])
def test_trees_in_the_types_of_serving(kind: str, dtype: torch.dtype):
    exact, model, parents = model_of(kind), model_of(kind, dtype), TREES["sparse"]
    with torch.no_grad():
        for ours, theirs in zip(exact.parameters(), model.parameters(), strict=True):
            ours.copy_(theirs)
    logits = list[Tensor]()
    for one in (exact, model):
        state = one.state(1)
        run(one, state, [some(11, 0)])
        logits.append(run(one, state, [[*some(1, 1), *some(10, 2)]], [parents]).double())
    scale = float(logits[0].std())
    assert float((logits[0] - logits[1]).abs().median()) < (1e-4 if dtype == torch.float32 else 0.05) * scale


def test_every_part_that_says_it_reads_trees_is_shown_to():
    """Those that do stand in the models above; in models with others drafts follow each other."""
    shown = {type(part) for kind in MODELS for part in model_of(kind).parts}
    assert shown == {part for part in (*PARTS.values(), *BRACKETS.values()) if part.reads_trees}
    assert all(model_of(kind).reads_trees for kind in MODELS)
    blocked = build(ModelConfig, {"mlp": {"size": 48}, **SHAPE, "layout": "F S", "infllm": INFLLM}, "tests")
    assert not Decoder(blocked).reads_trees


def test_depths_and_paths_follow_the_parents():
    parents = TREES["sparse"]
    assert depths(parents) == [len(led(number, parents)) for number in range(len(parents))]
    assert paths(parents) == [sum(1 << one for one in led(number, parents)) for number in range(len(parents))]
