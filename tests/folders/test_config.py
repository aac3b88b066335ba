"""Configs refuse what they cannot mean, and say which key it was and what would do."""

from __future__ import annotations

import re
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from longwave.config import ModelConfig, build
from longwave.errors import UserError
from longwave.layers.mlp import MLPConfig
from longwave.mixers import AttentionConfig, WindowConfig
from longwave.model import Decoder
from longwave.resamplers import SubllmConfig
from longwave.resamplers.subllm import retention_of

PLAIN: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 32,
    "layout": "F subllm(0.64: W) F",
    "attention": {"heads": 4},
    "window": {"size": 5},
    "mlp": {"size": 40},
}


def changed(path: str, value: Any) -> dict[str, Any]:
    """The plain values with one key set, at any depth."""
    *parents, last = path.split(".")
    values = {key: dict(one) if isinstance(one, dict) else one for key, one in PLAIN.items()}
    inner = values
    for parent in parents:
        inner = inner.setdefault(parent, {})
    inner[last] = value
    return values


def test_plain_values_make_a_config_and_a_config_makes_plain_values():
    config = build(ModelConfig, PLAIN, "recipe.toml")
    tables = {"attention": AttentionConfig(4), "window": WindowConfig(5), "mlp": MLPConfig(40)}
    assert (
        config == ModelConfig(61, 32, PLAIN["layout"], **tables) == ModelConfig(61, 32, PLAIN["layout"], tables=tables)
    )
    assert (config.attention.size_in(config.hidden_size), config.attention.groups) == (8, 4)
    full = build(ModelConfig, changed("subllm.selection", "causal"), "recipe.toml")
    assert build(ModelConfig, full.to_dict(), "again") == full
    assert full.subllm == SubllmConfig(selection="causal")


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("vocab_sise", 3, "unknown key vocab_sise = 3; did you mean vocab_size?"),
        ("attention.head", 3, "unknown key attention.head = 3; did you mean attention.heads?"),
        ("attention.kv_head", 3, "unknown key attention.kv_head = 3; did you mean attention.kv_heads?"),
        ("subllm.balancer_step", 3, "unknown key subllm.balancer_step = 3; did you mean subllm.balancer_steps?"),
        ("hidden_sizes", 3, "unknown key hidden_sizes = 3; did you mean hidden_size?"),
        ("heads", 3, "unknown key heads = 3; did you mean attention.heads?"),
        ("attention.window", 3, "unknown key attention.window = 3; it is now window.size"),
        ("blocks.V.partz", ["mlp"], "unknown key blocks.V.partz = ['mlp']; did you mean blocks.V.parts?"),
        ("blocks.V.heads", 3, "unknown key blocks.V.heads = 3; did you mean attention.heads?"),
        ("blocks.V.parts", "mlp", "blocks.V.parts = 'mlp': a list"),
        ("rotary.scaling", {"kind": "ntk"}, "rotary.scaling.kind = 'ntk': use one of linear, llama3, yarn, longrope"),
        ("rotary.scaling", {"factor": 2}, "rotary.scaling.kind is missing"),
        ("rotary.scaling", {"kind": "yarn"}, "rotary.scaling.factor is missing"),
        ("attention", 3, "attention = 3: a table"),
        ("rotary.scaling", 3, "rotary.scaling = 3: a table"),
        ("blocks", [], "blocks = []: a table"),
        ("zzz", 3, "unknown key zzz = 3; known: vocab_size, hidden_size, layout, context_window, rotary"),
        ("vocab_size", 0, "vocab_size = 0: 1 or more"),
        ("hidden_size", -32, "hidden_size = -32: 1 or more"),
        ("context_window", 0, "context_window = 0: 1 or more"),
        ("hidden_size", "wide", "hidden_size = 'wide': input should be a valid integer"),
        ("hidden_size", 32.5, "hidden_size = 32.5: input should be a valid integer"),
        ("attention.heads", 0, "attention.heads = 0: 1 or more"),
        ("attention.kv_heads", 3, "attention.kv_heads = 3: a divisor of attention.heads = 4"),
        ("attention.kv_heads", 8, "attention.kv_heads = 8: a divisor of attention.heads = 4"),
        ("attention.head_size", 7, "attention.head_size = 7: an even number, for rotation"),
        ("window.size", 0, "window.size = 0: 1 or more tokens"),
        ("mlp.size", 0, "mlp.size = 0: 1 or more"),
        ("rotary.base", 1.0, "rotary.base = 1.0: more than 1"),
        ("init.std", 0, "init.std = 0.0: more than 0"),
        ("subllm.selection", "best", "subllm.selection = 'best': input should be 'published' or 'causal'"),
        ("subllm.bypass_probability", 1.5, "subllm.bypass_probability = 1.5: between 0 and 1"),
        ("subllm.balancer_steps", 0, "subllm.balancer_steps = 0: 1 or more optimizer steps"),
        ("subllm.threshold_memory", 0.5, "subllm.threshold_memory has no effect with selection = 'published'"),
        ("subllm.threshold_ramp", 0.2, "subllm.threshold_ramp has no effect with selection = 'published'"),
        ("subllm.threshold_ramp", 0, "subllm.threshold_ramp = 0.0: more than 0, at most 1"),
        ("subllm.retention_steps", -1, "subllm.retention_steps = -1: 0 or more"),
        ("subllm.retention_start", 1.1, "subllm.retention_start = 1.1: more than 0, at most 1"),
        ("subllm.retention_start", 0.8, "subllm.retention_start has no effect without subllm.retention_steps"),
    ],
)
def test_a_bad_value_is_named_with_what_would_do(path: str, value: Any, message: str):
    with pytest.raises(UserError, match=re.escape(f"recipe.toml: {message}")) as caught:
        build(ModelConfig, changed(path, value), "recipe.toml")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["discard_sampling", "ranking", "balancer", "exact_gaussian"])
def test_a_published_setting_has_no_effect_on_the_causal_selection(name: str):
    other = {"discard_sampling": "none", "ranking": "document", "balancer": False, "exact_gaussian": True}
    with pytest.raises(UserError, match=f"subllm.{name} has no effect with selection = 'causal'"):
        SubllmConfig(selection="causal", **{name: other[name]})


@pytest.mark.parametrize("heads", [3, 32])
def test_heads_that_do_not_divide_the_width_are_refused(heads: int):
    message = f"^hidden_size = 32: an even multiple of attention.heads = {heads}, or give attention.head_size$"
    with pytest.raises(UserError, match=message):
        Decoder(build(ModelConfig, changed("attention.heads", heads), "recipe.toml"))


@pytest.mark.parametrize("key", ["vocab_size", "hidden_size", "layout"])
def test_a_missing_key_is_named(key: str):
    with pytest.raises(UserError, match=f"^recipe.toml: {key} is missing$"):
        build(ModelConfig, {name: value for name, value in PLAIN.items() if name != key}, "recipe.toml")


@pytest.mark.parametrize("table", ["attention", "mlp", "window"])
def test_a_missing_table_is_named_by_the_part_that_needs_it(table: str):
    config = build(ModelConfig, {name: value for name, value in PLAIN.items() if name != table}, "recipe.toml")
    assert getattr(config, table) is None
    with pytest.raises(UserError, match=f"^{table} is missing; a part in the layout needs it: give {table}."):
        Decoder(config)


def test_a_missing_key_of_a_component_is_named():
    with pytest.raises(UserError, match=r"attention\.heads is missing"):
        build(ModelConfig, {**PLAIN, "attention": {}}, "recipe.toml")


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        ("subllm(0: F)", "retention 0 is outside (0, 1]"),
        ("subllm(1.01: F)", "retention 1.01 is outside (0, 1]"),
        ("subllm(-0.5: F)", "retention -0.5 is outside (0, 1]"),
        ("subllm(half: F)", "retention 'half' is not a number in (0, 1]"),
        ("subllm(nan: F)", "retention 'nan' is not a number in (0, 1]"),
        ("subllm(inf: F)", "retention inf is outside (0, 1]"),
        ("subllm(0.5, 0.6: F)", "subllm takes one argument, its retention, not 2"),
        ("2X", "no block kind 'X'"),
        ("2F other(0.5: F)", "no bracket 'other'"),
        ("2F (", "expected a block letter"),
    ],
)
def test_a_layout_that_means_nothing_is_refused(layout: str, message: str):
    with pytest.raises(UserError, match=re.escape(message)):
        Decoder(build(ModelConfig, {**PLAIN, "layout": layout}, "recipe.toml"))


def test_a_subllm_section_without_a_subllm_is_refused():
    config = build(ModelConfig, {**changed("subllm.balancer", False), "layout": "2W"}, "recipe.toml")
    with pytest.raises(UserError, match=r"subllm has no effect: the layout has no subllm\(\.\.\.\)"):
        Decoder(config)


@pytest.mark.parametrize(
    ("layout", "table", "block"), [("F", "window", "W"), ("2W", "infllm", "S"), ("2W", "lightning", "L")]
)
def test_a_table_that_no_part_reads_is_refused(layout: str, table: str, block: str):
    values = {**PLAIN, "layout": layout, table: {"size": 5} if table == "window" else {}}
    with pytest.raises(UserError, match=f"^{table} has no effect: the layout has no {block} block$"):
        Decoder(build(ModelConfig, values, "recipe.toml"))


@given(st.integers(1, 10**6))
def test_a_retention_is_the_exact_decimal(millionths: int):
    assert retention_of(f"{millionths / 10**6:.6f}") == Fraction(millionths, 10**6)
    assert retention_of(f"{millionths}e-6") == Fraction(millionths, 10**6)
