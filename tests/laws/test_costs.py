"""Costs are known before they are paid: the formulas against what a forward really does.

Matrix products are counted as they are dispatched. The `reference` form of attention multiplies visible pairs only, one
query at a time, so its count is the formula's, exactly. What the formulas leave out, and the counter with them, is
element-wise work: norms, rotation, softmax, SiLU, a resampler's scores and its mixing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import pytest
import torch
from contract import CASES, Case, decoder, step
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from longwave.costs import At, by_kind, total
from longwave.mixers import AttentionConfig, WindowConfig
from longwave.model import Decoder
from longwave.resamplers import Bracket
from longwave.streams import Stream

SHAPES = {
    **CASES,
    "one KV head of an odd size": Case(
        "F W", {"attention": AttentionConfig(4, 1, head_size=10), "window": WindowConfig(3)}
    ),
    "as many KV heads": Case("2F", {"attention": AttentionConfig(4)}),
    "levels of different ratios": Case("F subllm(0.7: W subllm(0.35: 2F) F) F"),
}
every_shape = pytest.mark.parametrize("name", SHAPES)


def keeping_as_expected(name: str) -> Decoder:
    """A model whose levels keep exactly ceil(N d) of any N tokens of a sequence, chosen by place, in eval mode."""
    model = decoder(SHAPES[name])
    if any(part.ops for part in model.parts):
        model.use_form("reference")
    for resampler in model.resamplers:
        ratio = resampler.retention
        resampler.score.register_forward_hook(
            lambda module, given, output, ratio=ratio: first_of_each(
                given[0].shape[0], -(-given[0].shape[0] * ratio // 1)
            )
        )
    return model


def first_of_each(tokens: int, kept: int) -> torch.Tensor:
    """Scores of which the first `kept` are positive."""
    return (torch.arange(tokens) < int(kept)).double() * 2 - 1


def counted(run) -> int:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


@every_shape
@pytest.mark.parametrize("tokens", [1, 2, 5, 24])
def test_prefill_flops_are_the_counted_ones(name: str, tokens: int):
    model, ids = keeping_as_expected(name), torch.arange(tokens)
    assert model.prefill_flops(tokens) == counted(lambda: model(ids, Stream.of([tokens]).last_rows()))


@every_shape
@pytest.mark.parametrize("tokens", [3, 17])
def test_training_flops_are_three_forwards_with_every_row_of_logits(name: str, tokens: int):
    model, ids = keeping_as_expected(name), torch.arange(tokens)
    unlearned = 2 * total(model.costs(tokens)).unlearned_flops
    assert model.training_flops(tokens) + unlearned == 3 * counted(lambda: model(ids, Stream.of([tokens])))


@pytest.mark.parametrize("name", [name for name in SHAPES if "subllm" not in SHAPES[name].layout])
def test_training_flops_are_the_counted_ones_of_forward_and_backward(name: str):
    """A matrix product has two in its backward pass; the embedding has none."""
    model, ids = keeping_as_expected(name), torch.arange(9)
    with FlopCounterMode(display=False) as counter:
        model(ids, Stream.of([9])).sum().backward()
    assert model.training_flops(9) == counter.get_total_flops()


@every_shape
@pytest.mark.parametrize("context", [0, 1, 4, 5, 6, 23])
def test_decode_flops_are_the_counted_ones(name: str, context: int):
    """At a retention of 1 the formula is one token's; below, it is the mean over tokens that are kept and dropped."""
    model = keeping_as_expected(name)
    state = model.state()
    if context:
        with torch.no_grad():
            model(torch.arange(context), state.stream([context]), state)
    snapshot = state.snapshot(0)

    def flops(decides) -> int:
        for resampler in model.resamplers:
            resampler.score._forward_hooks.clear()
            keep = decides(resampler.index)
            resampler.score.register_forward_hook(
                lambda m, g, out, keep=keep: torch.full_like(out, 1.0 if keep else -1.0)
            )
        spent = counted(lambda: step(model, state, [[7]]))
        state.restore(snapshot)
        return spent

    expected = weight = 0.0
    levels = len(model.resamplers)
    for outcome in range(2**levels):
        kept = [bool(outcome >> index & 1) for index in range(levels)]
        chance = 1.0
        for index, resampler in enumerate(model.resamplers):
            ratio = float(resampler.retention)
            chance *= ratio if kept[index] else 1 - ratio
        expected += chance * flops(kept.__getitem__)
        weight += chance
    assert weight == pytest.approx(1, abs=1e-12)
    assert model.decode_flops(context) == pytest.approx(expected, rel=1e-12)


@every_shape
@pytest.mark.parametrize("tokens", [0, 1, 5, 6, 40])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_state_bytes_are_the_counted_ones(name: str, tokens: int, dtype: torch.dtype):
    model = keeping_as_expected(name).to(dtype)
    state = model.state()
    step(model, state, [list(range(tokens))])
    assert total(model.costs(tokens)).state_bytes == state.used_bytes(0)
    elements = 0
    for part, spec in state.specs.items():
        for array in spec.per_token:
            held = state.view(part, array, 0)
            elements += held[:, -min(held.shape[1], spec.window or held.shape[1]) :].nbytes
        if state.lengths(spec.level)[0]:
            elements += sum(state.view(part, array, 0).nbytes for array in spec.per_sequence)
    assert elements == state.used_bytes(0)
    assert state.reserved_bytes(0) >= state.used_bytes(0)


@every_shape
def test_parameters_are_the_counted_ones_by_part(name: str):
    model = decoder(SHAPES[name])
    costs, expected = model.costs(10), Counter[str]()
    for module, kind in kinds_of(model):
        inside = {id(weight) for weight in module.body.parameters()} if isinstance(module, Bracket) else set()
        expected[kind] += sum(weight.numel() for weight in module.parameters() if id(weight) not in inside)
    assert {cost.kind: cost.parameters for cost in by_kind(costs)} == dict(expected)
    assert total(costs).parameters == sum(p.numel() for p in model.parameters())
    for name, value in vars(total(costs)).items():
        assert vars(total(by_kind(costs)))[name] == (
            value if isinstance(value, str) else pytest.approx(value, rel=1e-12)
        )


def kinds_of(model: Decoder) -> Iterator[tuple[nn.Module, str]]:
    """Every module that holds weights of its own, and the kind that its costs are added up under."""
    yield model.embed, "embedding"
    yield nn.ModuleList([model.norm, model.head]), "norm and head"
    for block in model.blocks:
        yield block, block.letter + (f" in level {block.site.level + 1}" if block.site.level >= 0 else "")
    for resampler in model.resamplers:
        yield resampler, f"subllm {resampler.arguments[0]}"


def test_decoding_reads_every_weight_once_and_the_state():
    """Of a dense model: all weights but the embedding, of which it reads a row, and keys and values."""
    model = decoder(Case("2F W"))
    expected = sum(p.numel() for p in model.parameters()) - model.embed.weight.numel() + 32
    assert total(model.costs(20)).decode_bytes == 8 * expected + total(model.costs(20)).state_bytes


def test_costs_follow_the_retention_that_was_measured():
    model, dense = decoder(Case("F subllm(0.5: F) F")), decoder(Case("3F"))

    def spent(model: Decoder, kept: dict[int, float] | None = None) -> tuple[int, float]:
        return model.prefill_flops(1000, kept), total(model.costs(1000, kept=kept)).decode_flops

    nominal, measured, whole = spent(model), spent(model, {0: 0.75}), spent(dense)
    assert all(one < other < all_ for one, other, all_ in zip(nominal, measured, whole, strict=True))
    assert spent(model, {0: 0.5}) == nominal
    assert spent(model, {0: 1.0}) == whole
    inner = model.blocks[1].costs(At(750, torch.float64, 0.75))[0]
    assert inner in model.costs(1000, kept={0: 0.75}), (
        "the body runs on 750 of 1000 tokens, and on three in four new ones"
    )


def test_costs_are_known_on_the_meta_device():
    with torch.device("meta"):
        model = Decoder(Case("F subllm(0.5: F) F").config())
    assert model.prefill_flops(100) == decoder(Case("F subllm(0.5: F) F")).prefill_flops(100)
