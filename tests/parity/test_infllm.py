"""InfLLM-V2 as a layer: its regimes, what it keeps of a sequence, and what it refuses. The choice has its own tests."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from contract import SPARSE, Case, alone, declared, decoder, distance, in_pieces, step
from torch import Tensor

from longwave.config import ModelConfig, build
from longwave.errors import UserError
from longwave.laws import Law
from longwave.layers.mlp import MLPConfig
from longwave.mixers import AttentionConfig, InfllmAttention, InfllmConfig
from longwave.model import Decoder
from longwave.ops.block_sparse import compress
from longwave.streams import Stream

TINY = InfllmConfig(kernel_size=4, kernel_stride=2, block_size=8, window_size=16, topk=4, dense_len=64)
TOKENS = [(7 * place * place + 3 * place) % 61 for place in range(90)]
FIRST_CHOICE = (4 + 2) * 8  # places before this one see at most the 6 blocks that a query may choose


def one_layer(**changes: Any) -> Decoder:
    return decoder(Case("S", {"infllm": replace(TINY, **changes)}))


def mixer_of(model: Decoder) -> InfllmAttention:
    mixer = model.blocks[0].mixer
    assert isinstance(mixer, InfllmAttention)
    return mixer


# --- regimes ----------------------------------------------------------------------------------------------------------


def test_auto_is_dense_below_its_threshold_and_sparse_from_there():
    """The threshold counts the query itself: place 62 has a context of 63, the last that is shorter than 64."""
    auto, dense, sparse = (alone(one_layer(regime=regime), TOKENS) for regime in ("auto", "dense", "sparse"))
    assert distance(auto[:63], dense[:63]) <= 1e-12
    assert distance(auto[63:], sparse[63:]) <= 1e-12
    assert distance(dense[:FIRST_CHOICE], sparse[:FIRST_CHOICE]) <= 1e-12
    differ = [place for place in range(90) if distance(dense[place], sparse[place]) > 1e-6]
    assert len(differ) > 20
    assert min(differ) >= FIRST_CHOICE


@pytest.mark.parametrize("length", [63, 64])
def test_check_26_the_published_switch_goes_by_the_length_of_the_call(length: int):
    """63 tokens at once are dense, 64 are sparse, those before the 64th among them."""
    published = alone(one_layer(regime="auto_published"), TOKENS[:length])
    same, other = ("dense", "sparse") if length < 64 else ("sparse", "dense")
    assert distance(published, alone(one_layer(regime=same), TOKENS[:length])) <= 1e-12
    assert distance(published, alone(one_layer(regime=other), TOKENS[:length])) > 1e-6


def test_the_published_switch_denies_chunking_and_breaks_it():
    model = one_layer(regime="auto_published")
    assert Law.CHUNKING not in declared(model, training=False)
    assert distance(in_pieces(model, TOKENS, [60]), alone(model, TOKENS)) > 1e-6
    for regime in ("auto", "sparse", "dense"):
        kept = one_layer(regime=regime)
        assert Law.CHUNKING in declared(kept, training=False)
        assert distance(in_pieces(kept, TOKENS, [60]), alone(kept, TOKENS)) <= 1e-10


@pytest.mark.parametrize("regime", ["dense", "sparse"])
@pytest.mark.parametrize("cuts", [range(1, 90), [50], [7, 8, 39, 64, 80]], ids=["steps", "two", "ragged"])
def test_checks_26_and_27_pieces_in_single_precision(regime: str, cuts: list[int]):
    model = decoder(Case("S 2L S", {"infllm": replace(TINY, regime=regime)}), dtype=torch.float32)
    assert distance(in_pieces(model, TOKENS, cuts), alone(model, TOKENS)) <= 1e-4


def test_check_32_sequences_of_unequal_lengths_share_a_stream():
    model = decoder(Case("S 2L S", {"infllm": replace(TINY, regime="sparse")}))
    runs = [TOKENS[:80], TOKENS[5:12], TOKENS[:64][::-1]]
    state = model.state(3)
    outputs = step(model, state, runs).split([len(tokens) for tokens in runs])
    for tokens, logits in zip(runs, outputs, strict=True):
        assert distance(logits, alone(model, tokens)) <= 1e-10


def test_check_25_without_rotation_the_order_of_the_past_is_nothing_to_a_dense_layer():
    mixer, hidden = mixer_of(one_layer(regime="dense")), torch.randn(20, 32, dtype=torch.float64)
    order = torch.cat([torch.randperm(19, generator=torch.Generator().manual_seed(0)), torch.tensor([19])])
    last = [mixer(rows, Stream.of([20]), None)[-1] for rows in (hidden, hidden[order])]
    assert distance(*last) <= 1e-12


# --- settings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {"rotary": True},
        {"output_gate": False},
        {"logit_scaling": 20.0},
        {"denominator": "exact"},
        {"init_blocks": 0},
        {"topk": 3},
        {"window_size": 8},
        {"block_size": 16},
    ],
    ids=str,
)
def test_every_setting_changes_something(changes: dict[str, Any]):
    model = decoder(Case("3S", {"infllm": replace(TINY, regime="sparse")}))
    other = decoder(Case("3S", {"infllm": replace(TINY, regime="sparse", **changes)}))
    assert distance(alone(model, TOKENS), alone(other, TOKENS)) > 1e-6


def test_the_gate_is_a_sigmoid_of_the_input():
    gated, plain = (mixer_of(one_layer(output_gate=gate)) for gate in (True, False))
    plain.load_state_dict(gated.state_dict(), strict=False)
    hidden, seen = torch.randn(9, 32, dtype=torch.float64), list[Tensor]()
    for mixer in (gated, plain):
        mixer.o_proj.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
        mixer(hidden, Stream.of([9]), None)
    assert gated.o_gate is not None
    assert distance(seen[0], seen[1] * torch.sigmoid(hidden @ gated.o_gate.weight.T)) <= 1e-12


def test_check_42_queries_grow_with_the_logarithm_of_their_place():
    """s_t = log_a(t + a): 1 at the first token, and by the place in the sequence, in a piece or under PoSE as well."""
    plain, scaled = (mixer_of(one_layer(regime="dense", logit_scaling=base)) for base in (None, 500.0))
    hidden = torch.randn(2, 32, dtype=torch.float64)
    stream = replace(Stream.of([2]), order=torch.tensor([0, 262144]), positions=torch.tensor([0, 7]))
    query, key = plain.queries_and_keys(hidden, stream)
    grown, same = scaled.queries_and_keys(hidden, stream)
    assert torch.equal(key, same)
    assert torch.equal(grown[0], query[0])
    expected = math.log(262644) / math.log(500)  # 2.0078...
    assert distance(grown[1], expected * query[1]) <= 1e-12
    assert InfllmConfig().logit_scaling is None


# --- state ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 7, 16, 31, 64, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_check_23_windows_are_kept_as_keys_arrive(size: int, dtype: torch.dtype):
    """Equal to the bit to those of all keys at once, at the published sizes, for any pieces and after a cut."""
    model = decoder(Case("S", {"infllm": InfllmConfig()}), dtype=dtype)
    state, tokens = model.state(), [place % 61 for place in range(400)]
    part = "blocks.0.mixer"
    for start in range(0, 400, size):
        step(model, state, [tokens[start : start + size]])
        for name, sizes in (("fine", (32, 16)), ("coarse", (128, 64))):
            assert torch.equal(state.view(part, name, 0), compress(state.view(part, "key", 0), *sizes))
    state.truncate(0, 150)
    step(model, state, [tokens[:77]])
    assert torch.equal(state.view(part, "fine", 0), compress(state.view(part, "key", 0), 32, 16))


def test_check_33_bytes_are_the_published_formula():
    """8 sparse layers of 2 KV heads of 128 in bf16: 8 KiB of keys and values and 320 B of windows per token."""
    tables = {"attention": AttentionConfig(32, 2, head_size=128), "mlp": MLPConfig(64)}
    with torch.device("meta"):
        model = Decoder(ModelConfig(64, 64, "8S 24L", **tables))
    tokens = 1 << 20
    state = sum(cost.state_bytes for cost in model.costs(tokens, torch.bfloat16))
    edges = 8 * 2 * 128 * 2 * 2  # the last fine and the last coarse window of a layer are not complete
    assert state == tokens * (8192 + 320) + 48 * 2**20 - edges


def test_a_dense_layer_keeps_no_windows():
    assert set(mixer_of(one_layer(regime="dense")).state_spec().per_token) == {"key", "value"}
    assert set(mixer_of(one_layer(denominator="exact")).state_spec().per_token) == {"key", "value", "fine"}


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"kernel_size": 48}, "infllm.kernel_size = 48: twice kernel_stride, 32"),
        ({"block_size": 72, "window_size": 720}, "infllm.block_size = 72: a multiple of kernel_stride = 16"),
        ({"window_size": 100}, "infllm.window_size = 100: a multiple of block_size = 64"),
        (
            {"topk": 1},
            "topk = 1: with window_size / block_size it makes 33 blocks, fewer than the 34 forced ones; 2 or more",
        ),
        ({"regime": "sometimes"}, "infllm.regime = 'sometimes': input should be 'auto', 'sparse', 'dense'"),
        ({"logit_scaling": 1.0}, "infllm.logit_scaling = 1.0: more than 1, or left out"),
        ({"kernal_size": 32}, "unknown key infllm.kernal_size = 32; did you mean infllm.kernel_size"),
    ],
)
def test_what_cannot_be_is_refused(section: dict[str, Any], message: str):
    values = {"vocab_size": 64, "hidden_size": 32, "layout": "S", "attention": {"heads": 2}, "mlp": {"size": 8}}
    with pytest.raises(UserError) as refusal:
        build(ModelConfig, {**values, "infllm": section}, "recipe")
    assert message in str(refusal.value)


def test_a_recurrent_state_in_low_precision_is_refused():
    values = {"vocab_size": 64, "hidden_size": 32, "layout": "L", "attention": {"heads": 2}, "mlp": {"size": 8}}
    message = re.escape("lightning.state_dtype = 'bfloat16': input should be 'float32' or 'float64'")
    with pytest.raises(UserError, match=message):
        build(ModelConfig, {**values, "lightning": {"state_dtype": "bfloat16"}}, "recipe")


def test_a_section_without_a_block_is_refused():
    with pytest.raises(UserError, match="infllm has no effect: the layout has no S block"):
        Decoder(replace(Case("2F").config(), infllm=SPARSE))
