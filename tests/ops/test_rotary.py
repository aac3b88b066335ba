"""Rotary positions: equal to `transformers`' to the bit for every kind of scaling, and functions of positions alone."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from longwave.config import ModelConfig, RotaryConfig, build
from longwave.errors import UserError
from longwave.layers.rotary import angles, attention_factor, cosines_and_sines, frequencies
from longwave.model import Decoder

SIZE, WINDOW = 16, 512
SHORT, LONG = [1.0 + i / 10 for i in range(8)], [2.0 + i for i in range(8)]
OURS: dict[str, dict[str, Any] | None] = {
    "default": None,
    "linear": {"kind": "linear", "factor": 4.0},
    "llama3": {"kind": "llama3", "factor": 8.0, "original_window": 64},
    "yarn": {"kind": "yarn", "factor": 4.0, "original_window": 128},
    "yarn, whole ramp": {"kind": "yarn", "factor": 40.0, "original_window": 4096, "truncate": False, "beta_fast": 16.0},
    "yarn, given": {"kind": "yarn", "factor": 4.0, "original_window": 128, "attention_factor": 0.7},
    "longrope": {"kind": "longrope", "short_factors": SHORT, "long_factors": LONG, "original_window": 128},
}
OURS["longrope"] |= {"attention_factor": math.sqrt(1 + math.log(4) / math.log(128))}  # pyright: ignore
OURS["longrope, short"] = {**OURS["longrope"], "original_window": WINDOW, "attention_factor": 1.0}  # pyright: ignore


def config(scaling: dict[str, Any] | None, base: float = 1e4) -> ModelConfig:
    shape = {"vocab_size": 9, "hidden_size": 32, "layout": "F", "attention": {"heads": 2}, "mlp": {"size": 8}}
    rotary = {"base": base, "scaling": scaling}
    return build(ModelConfig, {**shape, "context_window": WINDOW, "rotary": rotary}, "test")


def theirs(scaling: dict[str, Any] | None, base: float) -> LlamaRotaryEmbedding:
    names = {"original_window": "original_max_position_embeddings", "kind": "rope_type"}
    names |= {"short_factors": "short_factor", "long_factors": "long_factor"}
    values = {names.get(name, name): value for name, value in (scaling or {"kind": "default"}).items()}
    if values["rope_type"] == "llama3":
        values |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    shape = {"hidden_size": 32, "num_attention_heads": 2, "max_position_embeddings": WINDOW}
    return LlamaRotaryEmbedding(LlamaConfig(**shape, rope_parameters={**values, "rope_theta": base}))


@pytest.mark.parametrize("base", [1e4, 5e5, 1e6])
@pytest.mark.parametrize("scaling", OURS.values(), ids=OURS)
def test_turns_are_those_of_transformers_to_the_bit(scaling: dict[str, Any] | None, base: float):
    """At the end of the window, where every published form has settled on its factors, and far beyond."""
    positions = torch.tensor([WINDOW - 1, WINDOW, 10**6]) if "short_factors" not in (scaling or {}) else None
    positions = torch.arange(WINDOW) if positions is None else positions
    cos, sin = theirs(scaling, base)(torch.empty(1), positions[None])
    got = cosines_and_sines(config(scaling, base), positions, SIZE)
    assert torch.equal(got[0], cos[0, :, : SIZE // 2])
    assert torch.equal(got[1], sin[0, :, : SIZE // 2])


def test_every_kind_stretches_and_by_its_own_measure():
    found = {name: tuple(frequencies(config(one).rotary, SIZE, WINDOW).tolist()) for name, one in OURS.items()}
    assert found["yarn"] == found["yarn, given"]
    assert len(set(found.values())) == len(OURS) - 1
    default = found["default"]
    for name in ("linear", "llama3", "yarn"):
        ratios = [one / other for one, other in zip(default, found[name], strict=True)]
        assert ratios[-1] == pytest.approx(OURS[name]["factor"]), "the slowest channel is stretched by the factor"
        assert ratios == sorted(ratios)
        assert (ratios[0] == 1) == (name != "linear")


def test_longrope_goes_by_the_context_window_and_never_by_the_length():
    rotary = config(OURS["longrope"]).rotary
    positions = torch.arange(600)
    long, short = angles(rotary, positions, SIZE, 129), angles(rotary, positions, SIZE, 128)
    torch.testing.assert_close(long * torch.tensor(LONG), short * torch.tensor(SHORT))
    assert torch.equal(angles(rotary, positions[7:9], SIZE, 129), long[7:9])


@given(st.sampled_from(sorted(OURS)), st.lists(st.integers(0, 10**6), min_size=1, max_size=6))
def test_an_angle_is_a_function_of_its_position(name: str, places: list[int]):
    """Law 1: any piece of a sequence is rotated as in the whole."""
    shape = config(OURS[name])
    together = cosines_and_sines(shape, torch.tensor(places), SIZE)
    for at, place in enumerate(places):
        alone = cosines_and_sines(shape, torch.tensor([place]), SIZE)
        assert torch.equal(alone[0][0], together[0][at])
        assert torch.equal(alone[1][0], together[1][at])


def test_attention_factor_of_yarn():
    assert attention_factor(config(OURS["yarn"]).rotary.scaling) == pytest.approx(0.1 * math.log(4) + 1)
    assert attention_factor(config(OURS["yarn, given"]).rotary.scaling) == 0.7
    assert attention_factor(None) == attention_factor(config(OURS["linear"]).rotary.scaling) == 1


@pytest.mark.parametrize("scaling", OURS.values(), ids=OURS)
def test_scaling_comes_back_from_its_plain_values(scaling: dict[str, Any] | None):
    made = config(scaling)
    assert build(ModelConfig, made.to_dict(), "again") == made
    assert hash(made.rotary) == hash(build(RotaryConfig, made.to_dict()["rotary"], "again"))


@pytest.mark.parametrize(
    ("scaling", "message"),
    [
        ({"kind": "dynamic", "factor": 2.0}, "rotary.scaling"),
        ({"kind": "linear"}, "rotary.scaling.factor is missing"),
        ({"kind": "linear", "factor": 0.0}, "rotary.scaling.factor = 0.0: a number above 0"),
        ({"kind": "linear", "factor": math.inf}, "rotary.scaling.factor = inf: a number above 0"),
        ({"kind": "linear", "factor": 2.0, "fast": 1}, "unknown key rotary.scaling.fast = 1"),
        ({**(OURS["llama3"] or {}), "low_freq_factor": 4.0}, "rotary.scaling.high_freq_factor = 4.0: more than low"),
        ({**(OURS["llama3"] or {}), "original_window": 0}, "rotary.scaling.original_window = 0: a number above 0"),
        ({**(OURS["yarn"] or {}), "beta_slow": 40.0}, "rotary.scaling.beta_fast = 32.0: more than beta_slow = 40.0"),
        ({**(OURS["longrope"] or {}), "long_factors": [1.0]}, "long_factors has 1 factors; heads of 16 need 8"),
        ({**(OURS["longrope"] or {}), "short_factors": [-1.0] * 8}, "short_factors: every factor is a number above 0"),
    ],
)
def test_a_scaling_that_means_nothing_is_named(scaling: dict[str, Any], message: str):
    with pytest.raises(UserError, match=re.escape(message)):
        Decoder(config(scaling))  # whether the factors fit its heads is known once a model is made
