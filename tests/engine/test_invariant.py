"""The batch-invariant mode: the same bits alone and in company, at once and in pieces, in fp32 and bf16."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import torch
from engines import finish, request_of

from longwave.config import ModelConfig, build
from longwave.engine import Engine, EngineOptions, Sampling
from longwave.engine.memory import page_options
from longwave.engine.speculation import PromptLookup
from longwave.errors import UserError
from longwave.model import Decoder
from longwave.ops import compiled
from longwave.ops.forms import INVARIANT

LAYOUTS = ["3F", "W F W", "F 2L", "S L F", "F subllm(0.64: F subllm(0.6: F) F)", "S subllm(0.7: L F)"]
DTYPES = [torch.float32, torch.bfloat16]
PACKED = torch.int8  # weights of products, all else in bf16
needs_kernels = pytest.mark.skipif(not compiled.is_available(), reason="no C compiler here")


@cache
def small(layout: str, dtype: torch.dtype, invariant: bool) -> Decoder:
    """Random weights with opinions, heads of 32, an odd size here and there."""
    values = {
        "vocab_size": 301,
        "hidden_size": 96,
        "layout": layout,
        "context_window": 512,
        "attention": {"heads": 3, "kv_heads": 1, "head_size": 32},
        "mlp": {"size": 130},
    }
    if "W" in layout:
        values["window"] = {"size": 24}
    if "S" in layout:
        small_blocks = {"kernel_size": 4, "kernel_stride": 2, "block_size": 8, "window_size": 16, "topk": 3}
        values["infllm"] = {**small_blocks, "dense_len": 40, "output_gate": True}
    if "subllm" in layout:
        values["subllm"] = {"selection": "causal"}
    model = Decoder(build(ModelConfig, values, "tests"), seed=3).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.mul_(3)
    model = model.to(torch.bfloat16).pack() if dtype == PACKED else model.to(dtype)
    for level in model.resamplers:
        level.force(torch.linspace(-0.3, 0.3, 64))
    if invariant:
        model.use_form(INVARIANT)
    return model


def logits_in(model: Decoder, ids: list[int], pieces: list[int], company: int) -> torch.Tensor:
    """Logits of a sequence that runs in pieces, each beside one of other sequences."""
    state, found, start = model.state(1 + company), list[torch.Tensor](), 0
    others = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for number, length in enumerate(pieces):
            beside = [1 + (number + other) % 5 for other in range(company)]
            stream = state.stream([*beside, length], [*range(1, 1 + company), 0])
            noise = torch.randint(0, 301, (sum(beside),), generator=others)
            logits = model(torch.cat([noise, torch.tensor(ids[start : start + length])]), stream, state)
            found.append(logits[sum(beside) :])
            start += length
    return torch.cat(found)


PIECES = [[96], [1] * 96, [7, 40, 1, 1, 47], [95, 1]]


@needs_kernels
@pytest.mark.parametrize("dtype", [*DTYPES, PACKED])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_neither_company_nor_pieces_change_a_bit(layout: str, dtype: torch.dtype):
    model = small(layout, dtype, True)
    ids = torch.randint(0, 301, (96,), generator=torch.Generator().manual_seed(0)).tolist()
    whole = logits_in(model, ids, [96], 0)
    assert whole.isfinite().all()
    for pieces in PIECES:
        for company in (0, 5):
            assert torch.equal(logits_in(model, ids, pieces, company), whole), (pieces, company)


@needs_kernels
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_mode_computes_what_the_others_do(layout: str):
    ids = torch.randint(0, 301, (150,), generator=torch.Generator().manual_seed(0)).tolist()
    exact = logits_in(small(layout, torch.float32, False), ids, [150], 0)
    assert torch.allclose(logits_in(small(layout, torch.float32, True), ids, [150], 0), exact, atol=2e-3)


def test_without_the_mode_some_bit_does_change():
    """Otherwise the tests above would say nothing."""
    model = small("3F", torch.float32, False)
    ids = torch.randint(0, 301, (150,), generator=torch.Generator().manual_seed(0)).tolist()
    assert not torch.equal(logits_in(model, ids, [7, 64, 1, 1, 77], 5), logits_in(model, ids, [150], 0))


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_batching_prefixes_preemption_and_drafts_change_no_token_and_no_probability(layout: str, dtype: torch.dtype):
    model = small(layout, dtype, True)
    warm = Sampling(temperature=1.0, seed=3)
    base = request_of(70, 1).prompt
    requests = [
        *(request_of(prompt=(*base[:cut], cut), logprobs=2, max_new_tokens=12) for cut in (70, 69, 30, 70)),
        *(request_of(20, seed, sampling=warm, logprobs=2, max_new_tokens=12) for seed in range(3)),
        request_of(prompt=base * 2, logprobs=2, max_new_tokens=12),
    ]
    alone = [answer(model, [one], EngineOptions(running=1, prefixes=False, invariant=True))[0] for one in requests]
    options = EngineOptions(running=4, step_tokens=48, page_size=8, invariant=True)
    assert answer(model, requests, options) == alone
    assert answer(model, requests, options, PromptLookup(2, 1)) == alone
    tight = replace(options, memory=bytes_for(model, 176), prefixes=False)  # for the longest request, not for four
    assert answer(model, requests, tight, put_back=True) == alone


def bytes_for(model: Decoder, count: int) -> int:
    """Memory for so many tokens, by the engine's own rate."""
    tokens = page_options(model, 1 << 30, model.config.context_window, 1 << 30, 8).tokens
    assert not isinstance(tokens, int)
    return (1 << 30) * count // tokens[-1]


def answer(model, requests, options, proposer=None, put_back=False) -> list[list[tuple]]:
    engine = Engine(model, options, proposer=proposer)
    numbers = [engine.submit(one) for one in requests]
    found = finish(engine)
    assert (engine.metrics.preemptions > 0) == put_back
    return [[(event.token, event.logprob, event.likeliest) for event in found[number]] for number in numbers]


def test_where_there_is_no_such_form_the_mode_is_refused():
    model = small("3F", torch.float32, False)
    with pytest.raises(UserError, match="invariant"):
        Engine(Decoder(model.config).double(), EngineOptions(invariant=True))
