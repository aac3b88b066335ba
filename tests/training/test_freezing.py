"""Parameters frozen by name: the same to the bit at the end, for every model, optimizer and pattern."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import runs
import torch
from runs import CrashAt, StopAt, differing, losses, trained
from torch import Tensor

import longwave as lw
from longwave import files
from longwave.cli import main
from longwave.errors import UserError
from longwave.model import Decoder
from longwave.training.divergence import weights_of
from longwave.training.freezing import freeze, frozen_names, parameters_of
from longwave.training.loop import Interrupted, Trainer
from longwave.training.recipe import read_recipe

every_model = pytest.mark.parametrize("model", runs.MODELS)
every_optimizer = pytest.mark.parametrize("optimizer", runs.OPTIMIZERS)
NAMES = [
    "embed.weight",
    *(f"blocks.{i}.{part}.weight" for i in (0, 1, 10) for part in ("mixer.q_proj", "mixer.k_proj", "mlp.up_proj")),
    "resamplers.0.score.weight",
    "resamplers.0.bypass",
    "norm.weight",
    "head.weight",
]
PATTERNS: list[tuple[str, ...]] = [
    ("embed",),
    ("head", "norm"),
    ("*norm*",),
    ("blocks.0",),
    ("blocks.*.mixer",),
    ("blocks.*.mlp", "embed"),
    ("*", "!blocks.*.mixer"),
    ("*", "!head"),
    ("*", "!embed"),
]
# Every model with every optimizer, and each pattern once at least.
CASES = [
    (model, optimizer, PATTERNS[(3 * row + column) % len(PATTERNS)])
    for row, model in enumerate(runs.MODELS)
    for column, optimizer in enumerate(runs.OPTIMIZERS)
]


def frozen_run(model: str, optimizer: str, *patterns: str, **training: Any) -> Any:
    return runs.recipe(model, optimizer, freeze=list(patterns), **training)


@pytest.mark.parametrize(
    ("patterns", "frozen"),
    [
        ([], []),
        (["embed"], ["embed.weight"]),
        (["embed.weight"], ["embed.weight"]),
        (["*.weight"], [name for name in NAMES if name != "resamplers.0.bypass"]),
        (["blocks.1"], [name for name in NAMES if name.startswith("blocks.1.")]),
        (["blocks.1*"], [name for name in NAMES if name.startswith("blocks.1")]),
        (["blocks.*.mixer.q_proj"], [f"blocks.{i}.mixer.q_proj.weight" for i in (0, 1, 10)]),
        (["blocks.[01].mlp"], [f"blocks.{i}.mlp.up_proj.weight" for i in (0, 1)]),
        (["resamplers.?.bypass"], ["resamplers.0.bypass"]),
        (["*", "!head"], [name for name in NAMES if name != "head.weight"]),
        (["*", "!blocks", "blocks.0"], [n for n in NAMES if not n.startswith(("blocks.1.", "blocks.10."))]),
        (["!head", "*norm*"], ["norm.weight"]),
    ],
)
def test_patterns_match_names_and_the_parts_that_hold_them(patterns: list[str], frozen: list[str]):
    assert frozen_names(patterns, NAMES) == set(frozen)


@pytest.mark.parametrize(
    "pattern", ["blocks.2", "embe", "Embed", "bed", "weight", "", "!", "!heads", "blocks.*.mixer."]
)
def test_a_pattern_that_matches_nothing_is_refused_with_the_nearest_name(pattern: str):
    with pytest.raises(UserError, match=r"training\.freeze = '.*': matches no parameter; the nearest is "):
        frozen_names(["embed", pattern], NAMES)


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        (["*"] * 101, "training.freeze: 101 patterns; at most 100"),
        (["[" * 201], "201 letters; at most 200"),
        (["*b" * (1 << 19)], "1,048,576 letters; at most 200"),
    ],
)
def test_more_patterns_than_anybody_writes_are_refused_at_once(patterns: list[str], message: str):
    with pytest.raises(UserError, match=message):
        frozen_names(patterns, NAMES)


def test_a_model_of_which_nothing_is_left_is_refused():
    with pytest.raises(UserError, match=r"training\.freeze: freezes all 14 tensors; .*'!blocks\.\*\.mixer'"):
        frozen_names(["head", "*"], NAMES)


@pytest.mark.parametrize(("model", "optimizer", "patterns"), CASES)
def test_frozen_parameters_stay_to_the_bit_and_the_others_learn(
    tmp_path: Path, model: str, optimizer: str, patterns: tuple[str, ...]
):
    trainer = Trainer(frozen_run(model, optimizer, *patterns, steps=3, evaluate_every=0, evaluate_windows=1), tmp_path)
    before = {name: tensor.detach().clone() for name, tensor in weights_of(trainer.model).items()}
    parameters = parameters_of(before | weights_of(trainer.model))
    frozen = frozen_names(patterns, parameters)
    trainer.run()
    saved = weights_of(lw.load(tmp_path / "model"))
    assert {name for name in parameters if torch.equal(saved[name], before[name])} == frozen
    assert {name for name in parameters if not weights_of(trainer.model)[name].requires_grad} == frozen
    assert len(trainer.optimizer.weights) == len(parameters) - len(frozen)


@every_model
@pytest.mark.parametrize("patterns", PATTERNS, ids=" ".join)
def test_freezing_changes_no_bit_of_the_gradients_of_the_others(tmp_path: Path, model: str, patterns: tuple[str, ...]):
    trainer = Trainer(runs.recipe(model), tmp_path)

    def gradients() -> dict[str, Tensor]:
        trainer.model.set_step(0)
        trainer.model.zero_grad()
        trainer.model.loss(*trainer.data.batch(range(4)).inputs("cpu")).backward()
        found = weights_of(trainer.model)
        return {name: weight.grad.clone() for name, weight in found.items() if weight.grad is not None}

    whole = gradients()
    freeze(weights_of(trainer.model), patterns)
    part = gradients()
    assert part.keys() == whole.keys() - frozen_names(patterns, parameters_of(weights_of(trainer.model)))
    assert differing(part, {name: whole[name] for name in part}) == []


@pytest.mark.parametrize(
    ("optimizer", "observer"), [("adamw", StopAt(3)), ("muon", CrashAt(5)), ("scaled_adam", CrashAt(3))]
)
def test_a_run_with_frozen_parts_resumes_to_the_bit(tmp_path: Path, optimizer: str, observer: StopAt):
    recipe = frozen_run("causal", optimizer, "*", "!blocks.*.mixer", checkpoint_every=2, precision="bf16")
    straight = trained(recipe, tmp_path / "straight")
    with pytest.raises((Interrupted, ConnectionAbortedError)):
        trained(recipe, tmp_path / "broken", observer)
    resumed = trained(recipe, tmp_path / "broken")
    assert differing(runs.contents(resumed), runs.contents(straight)) == []
    assert losses(tmp_path / "broken") == losses(tmp_path / "straight")


def test_a_run_does_not_go_on_with_other_parts_frozen(tmp_path: Path):
    trained(frozen_run("llama", "adamw", "embed", steps=3), tmp_path)
    with pytest.raises(UserError, match=r"training\.freeze = \['embed'\] there, \['head'\] here"):
        Trainer(frozen_run("llama", "adamw", "head", steps=3), tmp_path)


def test_a_checkpoint_from_before_there_was_freezing_or_a_mix_goes_on(tmp_path: Path):
    with pytest.raises(Interrupted):
        trained(runs.recipe("llama"), tmp_path, StopAt(3))
    folder = tmp_path / "checkpoints" / "step-00000003"
    written = json.loads((folder / "trainer.json").read_text())
    del written["recipe"]["training"]["freeze"], written["recipe"]["data"]["mix"]
    rewrite(folder, written)
    with pytest.raises(UserError, match=r"training\.freeze = \[\] there, \['embed'\] here"):
        Trainer(frozen_run("llama", "scaled_adam", "embed"), tmp_path)
    assert Trainer(runs.recipe("llama"), tmp_path).step == 3


def rewrite(folder: Path, written: dict[str, Any]) -> None:
    """Puts a `trainer.json` in place of a checkpoint's, as if the run had written it so."""
    with files.folder(folder) as staging:
        shutil.copytree(folder, staging, ignore=shutil.ignore_patterns(files.MANIFEST), dirs_exist_ok=True)
        (staging / "trainer.json").write_text(json.dumps(written))


def test_the_rest_of_a_trained_model_is_kept_where_training_starts_from_it(tmp_path: Path):
    trained(runs.recipe("llama", steps=3), tmp_path / "first")
    start = tmp_path / "first" / "model"
    trained(frozen_run("llama", "adamw", "*", "!head", start_from=str(start)), tmp_path / "second")
    one, other = (weights_of(lw.load(folder)) for folder in (start, tmp_path / "second" / "model"))
    assert differing(one, other) == ["head.weight"]


def test_tied_embeddings_are_frozen_with_the_head(tmp_path: Path):
    values = runs.values("llama", "adamw", freeze=["embed"], steps=3)
    recipe = runs.build(runs.Recipe, values | {"model": values["model"] | {"tie_embeddings": True}}, "tests")
    start = Decoder(recipe.model, recipe.training.seed).head_weight.detach()
    assert torch.equal(trained(recipe, tmp_path).model.head_weight, start)


def test_a_pattern_that_matches_nothing_is_one_line_before_anything_is_written(tmp_path: Path, capsys: Any):
    path = runs.write_recipe(tmp_path / "r.toml", "causal", freeze=["blocks.*.atention"])
    with pytest.raises(UserError, match=r"r\.toml: training\.freeze = 'blocks\.\*\.atention'"):
        read_recipe(path)
    assert main(["train", str(path), "--output", str(tmp_path / "run")]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_a_command_says_how_much_is_frozen(tmp_path: Path, capsys: Any):
    path, pattern = runs.write_recipe(tmp_path / "r.toml", "llama", steps=3), 'training.freeze=["*", "!head"]'
    assert main(["train", str(path), pattern, "--output", str(tmp_path / "run")]) == 0
    assert "training.freeze: 29 of 30 tensors, 32.9 k parameters, stay as they are" in capsys.readouterr().err
