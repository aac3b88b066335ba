"""A pretrained model with a longer window: what a recipe need not say, what it may not, and what comes of the run."""

from __future__ import annotations

import functools
import re
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import runs
import torch
from runs import CrashAt, contents, differing, losses, trained

import longwave as lw
from longwave.checkpoints import load_config
from longwave.cli import main
from longwave.config import ModelConfig, RotaryConfig, build
from longwave.errors import UserError
from longwave.extension import extend, extended, original_window
from longwave.streams import Stream
from longwave.training.loop import Trainer
from longwave.training.recipe import Recipe, read_recipe, start_notes

_KEPT = tempfile.TemporaryDirectory(prefix="longwave-tests-")
PLAIN = {"vocab_size": 31, "hidden_size": 32, "layout": "2F", "context_window": 64, "attention": {"heads": 2}}
PLAIN |= {"mlp": {"size": 48}, "init": {"std": 0.5}}  # large, so that attention looks at something
LINEAR = {"kind": "linear", "factor": 2.0}
YARN = {"kind": "yarn", "factor": 2.0, "original_window": 32}
LLAMA3 = {"kind": "llama3", "factor": 4.0, "original_window": 8}
SHORT = {"kind": "longrope", "original_window": 16, "short_factors": [1.0] * 8, "long_factors": [2.0] * 8}


def config(scaling: dict[str, Any] | None = None, **values: Any) -> ModelConfig:
    return build(ModelConfig, {**PLAIN, "rotary": {"scaling": scaling} if scaling else {}, **values}, "test")


def grown(start: ModelConfig, scaling: dict[str, Any] | None = None, window: int | None = None) -> ModelConfig:
    over: dict[str, Any] = {} if scaling is None else {"rotary": {"scaling": scaling}}
    over |= {} if window is None else {"context_window": window}
    return build(ModelConfig, extended(start, over), "test")


# --- what is filled in ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["linear", "llama3", "yarn"])
@pytest.mark.parametrize(
    ("before", "original"), [(None, 64), (LINEAR, 32), (YARN, 32), (LLAMA3, 8), (SHORT, 16)], ids=str
)
@pytest.mark.parametrize("window", [64, 128, 200])
def test_the_factor_follows_from_the_windows(kind: str, before: dict[str, Any] | None, original: int, window: int):
    found = grown(config(before), {"kind": kind}, window)
    assert found.rotary.scaling.kind == kind
    assert found.rotary.scaling.factor == window / original
    assert getattr(found.rotary.scaling, "original_window", original) == original
    assert (found.context_window, original_window(found)) == (window, original)


@pytest.mark.parametrize(
    ("before", "scaling", "window"),
    [
        (None, {"kind": "linear", "factor": 3}, 192),
        (None, {"kind": "yarn", "factor": 2.5}, 160),
        (None, {"kind": "yarn", "factor": 4, "original_window": 32}, 128),
        (YARN, {"kind": "yarn", "factor": 8}, 256),
        (YARN, {"factor": 8}, 256),
        (LINEAR, {"kind": "yarn", "factor": 8}, 256),
        (LLAMA3, {"kind": "llama3", "factor": 2}, 64),  # published ones reach further than their factor says
        (None, SHORT, 64),
    ],
    ids=str,
)
def test_the_window_follows_from_the_factor(before: dict[str, Any] | None, scaling: dict[str, Any], window: int):
    assert grown(config(before), scaling).context_window == window


@pytest.mark.parametrize("before", [None, LINEAR, YARN, LLAMA3, SHORT], ids=str)
def test_a_start_that_is_repeated_stays_as_it_is(before: dict[str, Any] | None):
    start = config(before, context_window=60)
    assert grown(start) == grown(start, before) == start


def test_what_belongs_to_another_kind_or_factor_is_not_kept():
    start = config(YARN | {"attention_factor": 1.5, "beta_fast": 16.0})
    assert grown(start, {"kind": "yarn"}).rotary.scaling == start.rotary.scaling
    longer = grown(start, {"kind": "yarn"}, 256).rotary.scaling
    assert (longer.factor, longer.attention_factor, longer.beta_fast) == (8.0, None, 16.0)
    assert grown(start, {"kind": "yarn", "attention_factor": 1.25}, 256).rotary.scaling.attention_factor == 1.25
    assert grown(start, {"kind": "llama3"}, 256).rotary.scaling.kind == "llama3"


# --- from Python ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["linear", "llama3", "yarn"])
def test_an_extended_model_shares_the_weights_and_turns_by_the_new_angles(kind: str):
    model = lw.Decoder(config(), seed=1).eval()
    longer = extend(model, 256, kind=kind)
    assert longer.config == grown(config(), {"kind": kind}, 256)
    assert all(
        one.data_ptr() == other.data_ptr() for one, other in zip(model.parameters(), longer.parameters(), strict=True)
    )
    again = lw.Decoder(longer.config, seed=1).eval()
    tokens = torch.arange(100) % 31
    with torch.no_grad():
        found = [one(tokens, Stream.of([100])) for one in (model, longer, again)]
    assert torch.equal(found[1], found[2])
    assert not torch.allclose(found[0], found[1], atol=1e-3)
    assert not longer.training
    assert extend(longer, base=5e4).config.rotary == replace(longer.config.rotary, base=5e4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"context_window": 32}, "model.context_window = 32: the model has 64; give more, or leave it out"),
        ({"base": 500.0}, "model.rotary.base = 500.0: the model has 10000.0; give more, or leave it out"),
        ({"context_window": 128, "kind": "ntk"}, "extend: rotary.scaling.kind = 'ntk': use one of linear, llama3"),
        ({"context_window": 128, "factor": 2}, "extend: rotary.scaling.kind is missing"),
        ({"context_window": 128, "kind": "yarn", "beta": 2}, "unknown key rotary.scaling.beta"),
        ({"context_window": 128, "kind": "longrope"}, "extend: rotary.scaling.short_factors is missing"),
        ({"kind": "linear"}, "extend: rotary.scaling.factor is missing"),
        ({"kind": "linear", "factor": 0}, "rotary.scaling.factor = 0"),
        ({"kind": "yarn", "factor": "x"}, "rotary.scaling.factor = 'x'"),
        ({"kind": "linear", "factor": float("inf")}, "rotary.scaling.factor = inf"),
        ({"kind": "linear", "factor": float("nan")}, "rotary.scaling.factor = nan"),
        ({"kind": "linear", "factor": 1e30}, "context_window"),
        ({"context_window": 1 << 40, "kind": "yarn"}, "context_window = 1099511627776"),
        ({"context_window": 128, "kind": "yarn", "original_window": 0}, "rotary.scaling.factor is missing"),
        ({"context_window": 128, "kind": "yarn", "original_window": "x"}, "rotary.scaling.factor is missing"),
    ],
    ids=str,
)
def test_what_is_no_extension_is_refused(options: dict[str, Any], message: str):
    with pytest.raises(UserError) as told:
        extend(lw.Decoder(config()), **options)
    assert message in str(told.value)


# --- runs -------------------------------------------------------------------------------------------------------------


@functools.cache
def start(kind: str = "") -> Path:
    """A model with a window of 64 tokens, trained for a few steps; of a kind, one that was extended to twice of it."""
    if kind:
        return (
            trained(recipe({"context_window": 128, "rotary": {"scaling": {"kind": kind}}}), folder(kind)).result().model
        )
    return trained(runs.recipe("llama", "adamw"), folder("start")).result().model


def folder(name: str) -> Path:
    return Path(_KEPT.name) / name


def recipe(model: dict[str, Any], of: Path | None = None, **training: Any) -> Recipe:
    values = runs.values("llama", "adamw", start_from=str(of or start()), **{"steps": 4} | training)
    overrides = {f"model.{name}": value for name, value in model.items()}
    path = folder("recipe.toml")
    path.write_text("\n".join(runs._toml({name: one for name, one in values.items() if name != "model"})) + "\n")
    return read_recipe(path, overrides)


@pytest.mark.parametrize(
    "model",
    [
        {"context_window": 256, "rotary.scaling.kind": "linear"},
        {"context_window": 256, "rotary.scaling.kind": "llama3"},
        {"context_window": 256, "rotary.scaling.kind": "yarn"},
        {"rotary.scaling.kind": "yarn", "rotary.scaling.factor": 4},
        {"context_window": 256, "rotary.base": 5e5},
        {"context_window": 256},
    ],
    ids=str,
)
def test_a_recipe_extends_the_model_that_it_starts_from(tmp_path: Path, model: dict[str, Any]):
    run = recipe(model, window=128, batch_windows=2)
    first = Trainer(run, tmp_path / "first").model
    begun = lw.load(start()).state_dict()
    assert all(torch.equal(first.state_dict()[name], begun[name]) for name in begun)
    made = trained(run, tmp_path / "run").result().model
    assert load_config(made) == run.model
    assert run.model.context_window == 256
    scaling = run.model.rotary.scaling
    assert (scaling.factor if scaling else 4.0) == 4.0
    assert getattr(scaling, "original_window", 64) == 64


@pytest.mark.parametrize("kind", ["linear", "llama3", "yarn"])
@pytest.mark.parametrize("then", ["linear", "llama3", "yarn"])
def test_a_model_is_extended_again_from_its_original_window(kind: str, then: str):
    run = recipe({"context_window": 512, "rotary.scaling.kind": then}, start(kind), window=64)
    assert run.model.rotary.scaling.factor == 8
    assert getattr(run.model.rotary.scaling, "original_window", 64) == 64


def test_an_extended_run_resumes_to_the_bit(tmp_path: Path):
    run = recipe({"context_window": 256, "rotary.scaling.kind": "yarn"}, window=128, checkpoint_every=2)
    straight = trained(run, tmp_path / "straight")
    with pytest.raises(ConnectionAbortedError):
        trained(run, tmp_path / "broken", CrashAt(3))
    resumed = trained(run, tmp_path / "broken")
    assert differing(contents(resumed), contents(straight)) == []
    assert losses(tmp_path / "broken") == losses(tmp_path / "straight")
    with pytest.raises(UserError, match=r"another run \(model\.rotary\.base"):
        Trainer(recipe({"context_window": 256, "rotary.base": 5e5}, window=128), tmp_path / "broken")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["model.context_window=32", "training.window=32"],
            "model.context_window = 32: {}, from which training.start_from starts, has 64",
        ),
        (["model.rotary.base=1000"], "model.rotary.base = 1000.0: {}, from which training.start_from starts, has"),
        (["model.context_window=x", "model.rotary.scaling.kind=yarn"], "model.context_window = 'x'"),
        (["model.layout=2F"], "model.layout = '2F': {}, from which training.start_from starts, has '3F'"),
        (["training.window=128"], "training.window = 128: at most model.context_window = 64"),
        (["model.rotary.scaling.kind=ntk"], "model.rotary.scaling.kind = 'ntk': use one of linear, llama3, yarn"),
        (["model.rotary.scaling=3"], "model.rotary.scaling = 3: a table"),
        (["model.rotary=3"], "model.rotary = 3: a table"),
        (["model=3"], "model = 3"),
        (["model.rotary.scaling.factor=4"], "model.rotary.scaling.kind is missing"),
        (["model.rotary.scaling.kind=yarn"], "model.rotary.scaling.factor is missing"),
    ],
    ids=str,
)
def test_what_a_recipe_cannot_extend_is_one_line(tmp_path: Path, capsys: Any, words: list[str], message: str):
    recipe({})
    assert main(["train", str(folder("recipe.toml")), *words, "--output", str(tmp_path / "run")]) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1
    assert message.format(start()) in said[0], said
    assert not (tmp_path / "run").exists()


def test_a_scaling_is_not_taken_back(tmp_path: Path):
    run = recipe({}, start("yarn"))
    run = replace(run, model=replace(run.model, rotary=RotaryConfig()))
    with pytest.raises(UserError, match=r"model\.rotary\.scaling = None: .* is scaled already; leave it out"):
        Trainer(run, tmp_path / "run")


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (
            {"context_window": 256, "rotary.scaling.kind": "yarn"},
            "window of 64 becomes 256 tokens, by yarn, factor 4, base 10,000",
        ),
        ({"context_window": 256, "rotary.base": 5e5}, "window of 64 becomes 256 tokens, by base 500,000"),
        (
            {"context_window": 256},
            "model.context_window = 256: .* knows 64 tokens, and its rotation stays as it is; model.rotary.scal",
        ),
        ({}, None),
    ],
    ids=str,
)
def test_a_run_says_how_its_start_is_extended(model: dict[str, Any], said: str | None):
    told = start_notes(recipe(model))
    assert len(told) == (said is not None)
    assert said is None or re.search(said, told[0]), told


def test_the_plan_of_a_recipe_is_that_of_the_extended_model():
    recipe({"context_window": 256})
    path = folder("recipe.toml")
    path.write_text(path.read_text() + "\n[model]\ncontext_window = 256\n[model.rotary.scaling]\nkind = 'yarn'\n")
    assert lw.plan(path, context=256).total(256) == lw.plan(start(), context=256).total(256)
