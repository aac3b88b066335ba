"""Letters that a recipe defines: two windows in one model, other wirings, folders that hold them, and refusals."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import runs
import torch
from contract import VOCABULARY, Case, alone, decoder, distance, in_pieces, step
from hf_models import in_class
from model_folders import same

import longwave as lw
from longwave.config import BlockConfig, ModelConfig, ScalesConfig, build
from longwave.errors import UserError
from longwave.mixers import WindowConfig
from longwave.model import Decoder
from longwave.ops.attention import Pattern
from longwave.training.loop import Interrupted
from longwave.training.recipe import read_recipe

TOKENS = [(7 * place * place + 3 * place) % VOCABULARY for place in range(30)]
WIDE = {"V": BlockConfig(("window", "mlp"), window=WindowConfig(8))}
PLAIN: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 32,
    "attention": {"heads": 4, "kv_heads": 2},
    "mlp": {"size": 40},
}
LETTERS = {
    "two windows": Case("2W V", {"blocks": WIDE}),
    "in a level": Case("F subllm(0.6: V W) V", {"blocks": WIDE}),
    "parallel": Case("F 2P", {"blocks": {"P": BlockConfig(("full", "mlp"), wiring="parallel")}}),
    "two mixers": Case("F 2M", {"blocks": {"M": BlockConfig(("lightning", "window", "mlp"), window=WindowConfig(3))}}),
    "no mixer": Case("2N", {"blocks": {"N": BlockConfig(("mlp",))}}),
}
every_letter = pytest.mark.parametrize("name", LETTERS)


# --- what they compute ------------------------------------------------------------------------------------------------


def test_two_windows_in_one_model():
    model, same_weights = decoder(LETTERS["two windows"]), decoder(Case("3W"))
    assert [block.mixer.pattern.window for block in model.blocks] == [5, 5, 8]
    same(model.state_dict(), same_weights.state_dict())
    assert distance(alone(model, TOKENS), alone(same_weights, TOKENS)) > 1e-6
    same_weights.blocks[2].mixer.pattern = Pattern(window=8)
    assert torch.equal(alone(model, TOKENS), alone(same_weights, TOKENS))


def test_each_window_is_kept_and_counted_as_wide_as_it_is():
    model = decoder(LETTERS["two windows"])
    state = model.state()
    step(model, state, [TOKENS])
    per_token = 2 * 2 * 8 * 8  # keys and values of two heads of eight channels in fp64
    assert state.used_bytes() == per_token * (5 + 5 + 8)
    assert {cost.kind: cost.state_bytes for cost in model.costs(30)}["V"] == per_token * 8


@every_letter
@pytest.mark.parametrize("cuts", [range(1, 30), [7, 8, 21]], ids=["steps", "ragged"])
def test_pieces_are_the_whole(name: str, cuts: list[int]):
    model = decoder(LETTERS[name])
    assert distance(in_pieces(model, TOKENS, cuts), alone(model, TOKENS)) <= 1e-10


@torch.no_grad()
def test_a_parallel_block_adds_what_its_parts_make_of_the_same():
    model = decoder(Case("P", {**LETTERS["parallel"].fields, "scales": ScalesConfig(residual=0.7)}))
    (block,), stream = model.blocks, model.state().stream([30])
    given: list[tuple[Any, ...]] = []
    block.register_forward_pre_hook(lambda _, arguments: given.append(arguments))
    outputs: list[torch.Tensor] = []
    block.register_forward_hook(lambda _, arguments, output: outputs.append(output))
    alone(model, TOKENS)
    (hidden, stream, _), (output,) = given[0], outputs
    mixed = block.mixer(block.mixer_norm(hidden), stream, None)
    fed = block.mlp(block.mlp_norm(hidden), stream, None)
    assert distance(output, hidden + 0.7 * (mixed + fed)) <= 1e-12
    serial = hidden + 0.7 * mixed
    assert distance(output, serial + 0.7 * block.mlp(block.mlp_norm(serial), stream, None)) > 1e-6


def test_parts_of_one_role_are_numbered():
    model = decoder(LETTERS["two mixers"])
    assert [part.site.name for part in model.blocks[1].parts] == ["blocks.1.mixer", "blocks.1.mixer2", "blocks.1.mlp"]
    assert set(model.state().specs) >= {"blocks.1.mixer", "blocks.1.mixer2"}
    assert not torch.equal(model.blocks[1].mixer.q_proj.weight, model.blocks[1].mixer2.q_proj.weight)


# --- recipes and folders ----------------------------------------------------------------------------------------------


@every_letter
def test_a_saved_model_is_loaded_with_its_letters(tmp_path: Path, name: str):
    model = decoder(LETTERS[name])
    lw.save(model, tmp_path / "model")
    loaded = lw.load(tmp_path / "model")
    assert loaded.config == model.config
    same(loaded.state_dict(), model.state_dict())
    assert torch.equal(alone(loaded, TOKENS), alone(model, TOKENS))
    theirs = in_class(model, tmp_path / "again")
    with torch.no_grad():
        assert distance(theirs(torch.tensor([TOKENS])).logits[0], alone(model, TOKENS)) <= 1e-11


def test_a_folder_writes_only_what_a_letter_gives_itself(tmp_path: Path):
    lw.save(decoder(LETTERS["two windows"]), tmp_path / "model")
    model = json.loads((tmp_path / "model/config.json").read_text())["model"]
    assert model["blocks"] == {"V": {"parts": ["window", "mlp"], "wiring": "residual", "window": {"size": 8}}}
    assert model["window"] == {"size": 5}


@pytest.mark.parametrize("format", ["llama", "mistral", "minicpm_sala", "subllm"])
def test_other_formats_refuse_letters_of_a_recipe(tmp_path: Path, format: str):
    model = decoder(Case("2V", {"blocks": WIDE}))
    with pytest.raises(UserError, match=f"format = '{format}' cannot hold this model: layout = '2V'"):
        lw.save(model, tmp_path / "model", format=format)


def lettered(path: Path, **training: Any) -> Path:
    """A tiny recipe of two windows as a TOML file."""
    text = runs.write_recipe(path, "llama", **training).read_text()
    tables = (
        "[model.window]\nsize = 5\n",
        '[model.blocks.V]\nparts = ["window", "mlp"]\n',
        "[model.blocks.V.window]\nsize = 8\n",
    )
    path.write_text(text.replace('layout = "3F"', 'layout = "2W V"') + "".join(tables))
    return path


def test_a_recipe_defines_a_letter_and_its_run_goes_on_to_the_bit(tmp_path: Path):
    recipe = read_recipe(lettered(tmp_path / "recipe.toml"), ["model.blocks.V.window.size=9"])
    assert recipe.model.blocks == {"V": BlockConfig(("window", "mlp"), window=WindowConfig(9))}
    assert build(type(recipe), recipe.to_dict(), "again") == recipe
    straight = runs.trained(recipe, tmp_path / "straight")
    with pytest.raises(Interrupted):
        runs.trained(recipe, tmp_path / "run", runs.StopAt(3))
    resumed = runs.trained(recipe, tmp_path / "run")
    assert runs.differing(runs.contents(resumed), runs.contents(straight)) == []


def test_a_run_starts_from_a_model_with_letters(tmp_path: Path):
    recipe = read_recipe(lettered(tmp_path / "recipe.toml"))
    start = runs.trained(recipe, tmp_path / "start").model
    again = read_recipe(
        tmp_path / "recipe.toml", [f"training.start_from={tmp_path / 'start/model'}", "training.steps=3"]
    )
    assert again.model == start.config
    assert runs.trained(again, tmp_path / "next").model.config == start.config
    other = ["model.blocks.V.window.size=7", f"training.start_from={tmp_path / 'start/model'}"]
    with pytest.raises(UserError, match=r"model\.blocks\.V\.window\.size = 7: .* has 8; leave it out"):
        runs.trained(read_recipe(tmp_path / "recipe.toml", other), tmp_path / "other")


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        (
            {"F": {"parts": ["full"]}, "V": {"parts": ["mlp"]}},
            "blocks.F: F is a block of longwave's own; take another letter",
        ),
        ({"V": {"parts": ["windo"]}}, "blocks.V.parts: no part 'windo'; known: full, infllm, lightning, mlp, window"),
        ({"V": {"parts": []}}, "blocks.V.parts is empty: name one part or more, such as 'full' and 'mlp'"),
        ({"V": {"parts": ["mlp"], "wiring": "twisted"}}, "blocks.V.wiring = 'twisted': use one of residual, parallel"),
        (
            {"V": {"parts": ["full", "mlp"], "window": {"size": 8}}},
            "blocks.V.window has no effect: none of its parts reads it",
        ),
        ({"V": {"parts": ["mlp"]}, "Z": {"parts": ["mlp"]}}, "blocks.Z has no effect: the layout has no Z block"),
        ({"V": {"parts": ["window"]}}, "window is missing; a part in the layout needs it"),
        ({}, "no block kind 'V'; known: F, L, S, W"),
    ],
)
def test_a_letter_that_makes_no_sense_is_refused(blocks: dict[str, Any], message: str):
    config = build(ModelConfig, {**PLAIN, "layout": "F V", "blocks": blocks}, "recipe.toml")
    with pytest.raises(UserError) as refusal:
        Decoder(config)
    assert message in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        ({"v": {"parts": ["mlp"]}}, "recipe.toml: blocks.v: a block is named by one letter from A to Z"),
        ({"VV": {"parts": ["mlp"]}}, "recipe.toml: blocks.VV: a block is named by one letter from A to Z"),
        ({"V": {}}, "recipe.toml: blocks.V.parts is missing"),
        (
            {"V": {"parts": ["mlp"], "wirin": "parallel"}},
            "recipe.toml: unknown key blocks.V.wirin = 'parallel'; did you",
        ),
        (
            {"V": {"parts": ["window"], "window": {"size": 0}}},
            "recipe.toml: blocks.V.window.size = 0: 1 or more tokens",
        ),
        (
            {"V": {"parts": ["window"], "window": {"size": 5, "sizes": 5}}},
            "recipe.toml: unknown key blocks.V.window.sizes = 5; did",
        ),
    ],
)
def test_a_table_of_a_letter_is_as_strict_as_any(blocks: dict[str, Any], message: str):
    with pytest.raises(UserError) as refusal:
        build(ModelConfig, {**PLAIN, "layout": "F V", "blocks": blocks}, "recipe.toml")
    assert str(refusal.value).startswith(message)


def test_a_table_that_only_blocks_with_their_own_would_read_has_no_effect():
    config = Case("F V", {"blocks": WIDE, "window": WindowConfig(5)}).config()
    with pytest.raises(UserError, match=r"^window has no effect: the layout has no W block$"):
        Decoder(config)
    assert Decoder(replace(config, layout="W V")).config.window == WindowConfig(5)
