"""Lightning attention as a layer: its slopes, the order of what it does, its relatives, and its memory."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from contract import CASES, Case, alone, decoder, distance, in_pieces, model_of, step
from torch import Tensor

from longwave.config import ModelConfig
from longwave.errors import UserError
from longwave.layers.rotary import Rotation, angles
from longwave.mixers import LightningAttention, LightningConfig
from longwave.mixers.lightning import slopes
from longwave.model import Decoder
from longwave.streams import Stream

TOKENS = [3, 17, 5, 41, 8, 22, 60, 1, 13, 29, 2, 2]


def lightning_of(model: Decoder) -> LightningAttention:
    mixer = model.blocks[0].mixer
    assert isinstance(mixer, LightningAttention)
    return mixer


def config_of(**fields: Any) -> ModelConfig:
    return replace(Case("3L").config(), lightning=LightningConfig(**fields))


# --- slopes: check 5 and the relatives --------------------------------------------------------------------------------


def test_check_5_slopes_of_32_heads_are_the_published_ones():
    published = {1: 0.840896, 2: 0.707107, 3: 0.594604, 4: 0.5, 8: 0.25, 12: 0.125, 16: 0.0625, 20: 0.03125}
    published |= {24: 0.015625, 28: 0.0078125, 32: 0.00390625}
    found = slopes("alibi", 32, depth=0, layers=32)
    for head, slope in published.items():
        assert found[head - 1] == pytest.approx(slope, abs=1e-6)
    gammas = {1: 0.431324, 16: 0.939413, 32: 0.996101}
    assert {head: pytest.approx(math.exp(-found[head - 1]), abs=1e-6) for head in gammas} == gammas


def test_check_5_slopes_of_other_numbers_of_heads():
    assert slopes("alibi", 16, 0, 1) == pytest.approx([2 ** (-head / 2) for head in range(1, 17)])
    sixteen = slopes("alibi", 16, 0, 1)
    assert slopes("alibi", 12, 0, 1) == pytest.approx([*slopes("alibi", 8, 0, 1), *sixteen[0:8:2]])
    assert slopes("alibi", 1, 0, 1) == (2**-8,)


def test_every_layer_has_the_same_slopes_but_for_the_relatives():
    layers = range(4)
    assert len({slopes("alibi", 8, layer, 4) for layer in layers}) == 1
    minimax = [slopes("minimax", 8, layer, 4) for layer in layers]
    for layer, found in enumerate(minimax):
        expected = [2**-head * (1 - layer / 3 + 1e-5) for head in range(1, 9)]
        assert found == pytest.approx(expected)
    transnormer = [slopes("transnormer", 8, layer, 4) for layer in layers]
    assert transnormer[1] == pytest.approx([head * 0.75 for head in range(8)])
    for layer, block in enumerate(model_of("linear layers of MiniMax").blocks):
        assert (-block.mixer.log_decay.value).tolist() == pytest.approx(slopes("minimax", 4, layer, 3), rel=1e-15)  # pyright: ignore[reportAttributeAccessIssue]


# --- the order of things ----------------------------------------------------------------------------------------------


def test_the_layer_is_its_formulas():
    """Norm per head, rotation, S = gamma S + k v^T, scaled reading, norm over all channels, gate, projection."""
    model = decoder(Case("L"))
    mixer, hidden = lightning_of(model), torch.randn(9, 32, dtype=torch.float64)
    with torch.no_grad():
        for norm in (mixer.q_norm, mixer.k_norm, mixer.o_norm):
            assert norm is not None
            norm.weight.uniform_(0.5, 1.5)
    stream = Stream.of([9])
    stream = stream.carrying(**Rotation(8, precise=True).passengers(model.config, stream.positions, torch.float64))
    expected = torch.stack(by_hand(mixer, hidden, model.config))
    assert distance(mixer(hidden, stream, None), expected) <= 1e-6  # angles are made in fp32


def by_hand(mixer: LightningAttention, hidden: Tensor, config: ModelConfig) -> list[Tensor]:
    """The layer's output at every token, from its weights."""
    heads, size, eps = 4, 8, config.norm_eps
    memory, outputs = torch.zeros(heads, size, size, dtype=torch.float64), []
    turned = angles(config.rotary, torch.arange(len(hidden)), size).double()

    def normed(vector: Tensor, weight: Tensor) -> Tensor:
        return vector / ((vector**2).mean(-1, keepdim=True) + eps).sqrt() * weight

    def rotated(vector: Tensor, angle: Tensor) -> Tensor:
        first, second = vector[:, : size // 2], vector[:, size // 2 :]
        cos, sin = angle.cos(), angle.sin()
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=1)

    for x, angle in zip(hidden, turned, strict=True):
        q, k, v = ((proj.weight @ x).view(heads, size) for proj in (mixer.q_proj, mixer.k_proj, mixer.v_proj))
        q = rotated(normed(q, mixer.q_norm.weight), angle)  # pyright: ignore[reportOptionalMemberAccess]
        k = rotated(normed(k, mixer.k_norm.weight), angle)  # pyright: ignore[reportOptionalMemberAccess]
        for head in range(heads):
            memory[head] = math.exp(-(2 ** (-8 * (head + 1) / heads))) * memory[head] + torch.outer(k[head], v[head])
        read = torch.cat([q[head] @ memory[head] for head in range(heads)]) / math.sqrt(size)
        gate = torch.sigmoid(mixer.z_proj.weight @ x)  # pyright: ignore[reportOptionalMemberAccess]
        outputs.append(mixer.o_proj.weight @ (normed(read, mixer.o_norm.weight) * gate))  # pyright: ignore[reportOptionalMemberAccess]
    return outputs


@pytest.mark.parametrize(("place", "bound"), [(0, 1e-6), (1, 1e-6), (8191, 1e-3), (524287, 0.03)])
def test_check_10_rotation_against_double_precision(place: int, bound: float):
    """On unit vectors; the published model has the same angles in fp32."""
    heads = torch.nn.functional.normalize(
        torch.randn(1, 64, 128, generator=torch.Generator().manual_seed(place)), dim=-1
    )
    config = replace(Case("L").config(), context_window=1 << 20)
    stream = Stream.of([1], starts=[place])
    rotation = Rotation(128, precise=True)
    got = rotation(heads, stream.carrying(**rotation.passengers(config, stream.positions, torch.float32)))
    exact = place * 10000.0 ** (-torch.arange(0, 128, 2, dtype=torch.float64) / 128)
    first, second = heads.double().chunk(2, dim=-1)
    expected = torch.cat([first * exact.cos() - second * exact.sin(), second * exact.cos() + first * exact.sin()], -1)
    assert distance(got.double(), expected) <= bound


def test_check_10_only_distances_matter_to_a_linear_layer():
    model = decoder(Case("L"))
    tokens = torch.tensor(TOKENS)
    here, there = Stream.of([12]), Stream.of([12], starts=[1000])
    with torch.no_grad():
        assert distance(model(tokens, here), model(tokens, there)) <= 1e-4  # angles of places near 1000, in fp32
        assert distance(model(tokens, here), model(tokens, Stream.of([12], starts=[3]))) <= 1e-6


def test_check_11_the_norm_comes_before_the_rotation():
    """With weights that are not all alike, the other order is another layer."""
    mixer, stream = lightning_of(decoder(Case("L"))), Stream.of([6])
    stream = stream.carrying(
        **Rotation(8, precise=True).passengers(Case("L").config(), stream.positions, torch.float64)
    )
    hidden = torch.randn(6, 32, dtype=torch.float64)
    assert mixer.q_norm is not None
    assert mixer.rotation is not None
    with torch.no_grad():
        mixer.q_norm.weight.copy_(torch.linspace(0.5, 2, 8))
        query = mixer.queries_keys_and_values(hidden, stream)[0]
        projected = mixer.q_proj(hidden).unflatten(-1, (4, 8))
        assert distance(query, mixer.rotation(mixer.q_norm(projected), stream)) <= 1e-12
        assert distance(query, mixer.q_norm(mixer.rotation(projected, stream))) > 0.1


def test_a_wrong_scale_hides_behind_the_output_norm_and_shows_without_it():
    for norm, hides in ((True, True), (False, False)):
        models = [
            decoder(Case("L", {"lightning": LightningConfig(scale=scale, output_norm=norm), "norm_eps": 0.0}))
            for scale in ("1/sqrt(d)", "1")
        ]
        assert (distance(alone(models[0], TOKENS), alone(models[1], TOKENS)) <= 1e-10) == hides


@pytest.mark.parametrize(
    "changes",
    [
        *({name: False} for name in ("qk_norm", "rotary", "output_norm", "output_gate")),
        *({"silu": "qk"}, {"silu": "qkv"}, {"slopes": "minimax"}, {"slopes": "transnormer"}),
        {"output_norm": False, "scale": "1/d"},
    ],
    ids=str,
)
def test_every_setting_changes_something(changes: dict[str, Any]):
    base = LightningConfig(output_norm=changes.get("output_norm", True) or "scale" not in changes)
    plain, changed = (decoder(Case("3L", {"lightning": one})) for one in (base, replace(base, **changes)))
    assert distance(alone(plain, TOKENS), alone(changed, TOKENS)) > 1e-6


def test_a_head_size_of_its_own():
    model = decoder(Case("L F", {"lightning": LightningConfig(heads=3, head_size=10)}))
    assert lightning_of(model).q_proj.weight.shape == (30, 32)
    assert distance(in_pieces(model, TOKENS, [4, 5, 9]), alone(model, TOKENS)) <= 1e-10


# --- inside a resampler -----------------------------------------------------------------------------------------------


def test_distances_are_those_of_the_kept_tokens_or_of_the_sequence():
    """With every second token kept, a head forgets twice as much by the sequence's distance, or half of its slope."""
    slow = decoder(Case("F subllm(0.5: L) F", {"lightning": LightningConfig(distance="original")}))
    fast = decoder(Case("F subllm(0.5: L) F", {"lightning": LightningConfig(distance="kept")}))
    for model in (slow, fast):
        model.resamplers[0].score.register_forward_hook(
            lambda m, given, out: torch.where(torch.arange(len(out)) % 2 == 0, 1.0, -1.0)
        )
    mixer = next(block.mixer for block in fast.blocks if block.letter == "L")
    assert isinstance(mixer, LightningAttention)
    assert distance(alone(slow, TOKENS), alone(fast, TOKENS)) > 1e-4
    mixer.log_decay.value.mul_(2)
    assert distance(alone(slow, TOKENS), alone(fast, TOKENS)) <= 1e-12


def test_outside_of_a_resampler_the_two_distances_are_one():
    models = [decoder(Case("2L", {"lightning": LightningConfig(distance=kind)})) for kind in ("kept", "original")]  # pyright: ignore[reportArgumentType]
    assert torch.equal(alone(models[0], TOKENS), alone(models[1], TOKENS))
    assert models[0].state().specs == models[1].state().specs


# --- memory -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_memory_is_one_wide_matrix_per_head_however_long_the_sequence(dtype: torch.dtype):
    model = decoder(CASES["block L"], dtype=dtype)
    state = model.state()
    assert state.used_bytes() == 0
    for _ in range(3):
        step(model, state, [TOKENS])
        assert state.used_bytes() == 3 * 4 * 8 * 8 * max(4, dtype.itemsize)


def test_a_memory_in_double_precision_on_request():
    config = LightningConfig(state_dtype="float64")
    model = decoder(Case("3L", {"lightning": config}), dtype=torch.float32)
    state = model.state()
    step(model, state, [TOKENS])
    assert state.view("blocks.0.mixer", "memory", 0).dtype == torch.float64
    assert distance(in_pieces(model, TOKENS, [5]), alone(model, TOKENS)) <= 1e-5


def test_a_snapshot_is_a_copy_of_the_memory():
    """The next token writes into the same row of the pool, and the snapshot pins no more than its own row."""
    model = decoder(CASES["block L"])
    state = model.state(2)
    step(model, state, [TOKENS, TOKENS[::-1]])
    before = state.view("blocks.0.mixer", "memory", 0).clone()
    snapshot = state.snapshot(0)
    (copies,) = snapshot.copies
    assert sum(one.untyped_storage().nbytes() for one in copies.arrays.values()) == state.used_bytes(0)
    step(model, state, [[7]])
    assert distance(state.view("blocks.0.mixer", "memory", 0), before) > 1e-6
    state.restore(snapshot)
    assert torch.equal(state.view("blocks.0.mixer", "memory", 0), before)


def test_a_recurrent_state_refuses_to_be_cut():
    model = decoder(CASES["block L"])
    state = model.state()
    step(model, state, [TOKENS])
    with pytest.raises(ValueError, match="length 5 cannot be returned to: a recurrent state has forgotten it"):
        state.truncate(0, 5)
    assert state.seen == [12]
    state.truncate(0, 0)
    assert distance(step(model, state, [TOKENS]), alone(model, TOKENS)) <= 1e-12


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kv_heads": 3}, "lightning.kv_heads = 3: a divisor of lightning.heads = 4"),
        ({"heads": 0}, "lightning.heads = 0: 1 or more"),
        ({"head_size": 7}, "lightning.head_size = 7: an even number, for rotation"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(fields: dict[str, int], message: str):
    with pytest.raises(UserError, match=message):
        Decoder(config_of(**fields))


def test_a_section_without_a_block_is_refused():
    with pytest.raises(UserError, match="lightning has no effect: the layout has no L block"):
        Decoder(replace(Case("2F").config(), lightning=LightningConfig()))
