"""Medusa's heads in training: what they learn, that the model stays as it is, and their folder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import runs
import torch

import longwave as lw
from longwave.checkpoints import native
from longwave.config import build
from longwave.data.tokenizer import Tokenizer
from longwave.engine.medusa import MedusaDrafts
from longwave.errors import UserError
from longwave.inference.drafter import drafter
from longwave.medusa import Medusa, MedusaConfig, is_medusa, load_medusa, shifted, write_medusa
from longwave.model import Decoder
from longwave.streams import Stream
from longwave.training.loop import Run
from longwave.training.medusa import MedusaTraining
from longwave.training.recipe import Recipe, recipe_of

every_model = pytest.mark.parametrize("kind", runs.MODELS)


def base_of(kind: str, folder: Path) -> Decoder:
    """A random model in a folder, with the tokenizer of the data."""
    model = Decoder(build(Recipe, runs.values(kind), "tests").model, seed=3)
    model.tokenizer = Tokenizer.load(runs.prepared())
    lw.save(model, folder)
    return model


def recipe(kind: str, folder: Path, medusa: dict[str, Any] | None = None, **training: Any) -> Recipe:
    values = runs.values(kind, "adamw", start_from=str(folder), **training)
    return recipe_of({**values, "medusa": {"heads": 2} if medusa is None else medusa}, "tests")


def finished(recipe: Recipe, output: Path, *observers: Any) -> Run[MedusaTraining]:
    run = Run(recipe, output, MedusaTraining)
    for observer in observers:
        run.watch(observer)
    run.complete()
    return run


def weights_in(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


@every_model
@pytest.mark.parametrize("projection", ["own", "shared"])
def test_heads_learn_and_the_model_stays_to_the_bit(kind: str, projection: str, tmp_path: Path):
    model = base_of(kind, tmp_path / "base")
    before = weights_in(tmp_path / "base")
    run = finished(recipe(kind, tmp_path / "base", {"heads": 2, "projection": projection}), tmp_path / "run")
    found = runs.losses(tmp_path / "run")
    assert found[-1]["loss"] < found[0]["loss"]
    assert len(found[-1]["accuracy"]) == 2
    assert run.flops == sum(
        run.objective.flops(batch) for step in range(runs.STEPS) for batch in run.data.batches(step)
    )
    assert weights_in(tmp_path / "base") == before
    assert all(torch.equal(one, model.state_dict()[name]) for name, one in run.objective.model.state_dict().items())
    heads = load_medusa(tmp_path / "run" / "model", model)
    assert is_medusa(tmp_path / "run" / "model")
    assert not is_medusa(tmp_path / "base")
    assert [len(row) for row in heads.accuracies] == [10, 10]
    assert all(sum(row) <= 1 for row in heads.accuracies)
    hidden = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    assert torch.equal(heads(hidden), run.objective.trained(hidden))


def test_a_stopped_run_goes_on_to_the_bit(tmp_path: Path):
    base_of("causal", tmp_path / "base")
    asked = recipe("causal", tmp_path / "base", checkpoint_every=2)
    finished(asked, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        finished(asked, tmp_path / "stopped", runs.StopAt(3))
    finished(asked, tmp_path / "stopped")
    assert weights_in(tmp_path / "stopped" / "model") == weights_in(tmp_path / "whole" / "model")
    assert runs.losses(tmp_path / "stopped") == runs.losses(tmp_path / "whole")


@pytest.mark.parametrize("micro", [1, 2, 4])
def test_a_step_is_the_same_in_micro_batches(micro: int, tmp_path: Path):
    base_of("llama", tmp_path / "base")
    run = Run(recipe("llama", tmp_path / "base", micro_windows=micro), tmp_path / "run", MedusaTraining)
    batches = run.data.batches(0)
    targets = sum(map(run.objective.targets, batches))
    loss = sum(float(run.objective.step(False).backward(batch, targets)) for batch in batches)
    whole = run.data.batch(range(4))
    losses, _, _ = run.objective.losses(whole)
    assert loss == pytest.approx(float(run.objective.weighted(losses).detach() / whole.predicted), rel=1e-5)


def test_heads_begin_as_the_models_own():
    model = Decoder(build(Recipe, runs.values("llama"), "tests").model, seed=3)
    hidden = torch.randn(5, 32)
    for projection in ("own", "shared"):
        heads = Medusa(model, MedusaConfig(heads=3, projection=projection))
        assert torch.allclose(heads(hidden), model.logits(hidden).expand(3, -1, -1))
    assert "base" not in "".join(heads.state_dict())
    assert sum(one.numel() for one in heads.parameters()) == 3 * 32 * 32


def test_targets_are_shifted_within_their_document():
    following = torch.tensor([1, 2, 3, -100, 11, 12, -100, 21])
    assert shifted(following, [4, 3, 1], 1).tolist() == [2, 3, -100, -100, 12, -100, -100, -100]
    assert shifted(following, [4, 3, 1], 3).tolist() == [-100] * 8
    assert shifted(following, [8], 2).tolist() == [3, -100, 11, 12, -100, 21, -100, -100]


def test_a_head_learns_what_its_number_says():
    """On text that counts up, head k of a model that knows it ends with the token k + 1 places further on."""
    model = Decoder(build(Recipe, runs.values("llama"), "tests").model, seed=3)
    heads, tokens = Medusa(model, MedusaConfig(heads=2)), torch.arange(2, 42)
    following = torch.cat([tokens[1:], torch.tensor([-100])])
    with torch.no_grad():
        hidden = model.hidden(tokens, Stream.of([40]))
    optimizer = torch.optim.AdamW(heads.parameters(), lr=0.02)
    for _ in range(150):
        optimizer.zero_grad()
        losses = [heads.loss(number, hidden, shifted(following, [40], number + 1)) for number in range(2)]
        torch.stack(losses).sum().backward()
        optimizer.step()
    for number in range(2):
        assert torch.equal(heads(hidden)[number, :30].argmax(-1), tokens[:30] + number + 2)


REFUSED = {
    "heads": ({"heads": 0}, "medusa.heads = 0: 1 to 16"),
    "weight": ({"weight": 1.5}, "medusa.weight = 1.5: more than 0, at most 1"),
    "unknown": ({"layers": 2}, "layers"),
    "projection": ({"projection": "none"}, "medusa.projection"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_recipe_is_refused_by_its_key(case: str, tmp_path: Path):
    base_of("llama", tmp_path / "base")
    table, says = REFUSED[case]
    with pytest.raises(UserError, match=says):
        recipe("llama", tmp_path / "base", table)


def test_heads_need_a_model_and_all_of_it_stays(tmp_path: Path):
    base_of("llama", tmp_path / "base")
    with pytest.raises(UserError, match=r"medusa: heads are trained on a model; give its folder"):
        recipe_of({**runs.values("llama"), "medusa": {}}, "tests")
    with pytest.raises(UserError, match=r"training.freeze has no effect with \[medusa\]"):
        recipe("llama", tmp_path / "base", freeze=["embed"])
    with pytest.raises(UserError, match=r"this trains whole models; leave \[medusa\] out"):
        runs.Trainer(recipe("llama", tmp_path / "base"), tmp_path / "run")


def changed(folder: Path, **values: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **values}))
    (folder / "manifest.json").unlink(missing_ok=True)
    for manifest in folder.glob("*manifest*"):
        manifest.unlink()


FOLDERS = {
    "hidden size": ({"hidden_size": 64}, "hidden_size = 64: the model has 32; give heads that were trained on it"),
    "vocabulary": ({"vocab_size": 301}, "vocab_size = 301: the model has 300"),
    "tokenizer": ({"tokenizer": "0"}, "heads of a model of another tokenizer"),
    "a model": ({"model_type": native.MODEL_TYPE}, "give a folder of Medusa heads"),
    "table": ({"medusa": [1]}, "medusa = .*expected the table"),
    "other heads": ({"medusa": {"heads": 3}}, "missing tensor"),
    "other projection": ({"medusa": {"heads": 2, "projection": "shared"}}, "unexpected tensor"),
    "accuracies": ({"accuracies": [[0.5], [2.0]]}, "a row of shares from 0 to 1 for each of 2 heads"),
    "rows": ({"accuracies": [[0.5]]}, "a row of shares from 0 to 1 for each of 2 heads"),
    "words": ({"accuracies": "many"}, "a row of shares from 0 to 1 for each of 2 heads"),
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("medusa")
    base_of("llama", folder / "base")
    finished(recipe("llama", folder / "base", steps=3), folder / "run")
    return folder


@pytest.mark.parametrize("case", FOLDERS)
def test_heads_of_another_model_are_refused(case: str, trained: Path, tmp_path: Path):
    values, says = FOLDERS[case]
    shutil.copytree(trained / "run" / "model", tmp_path / "heads")
    changed(tmp_path / "heads", **values)
    model = lw.load(trained / "base")
    assert model.tokenizer is not None
    with pytest.raises(UserError, match=says) as refusal:
        load_medusa(tmp_path / "heads", model)
    assert "\n" not in str(refusal.value)


def test_heads_that_are_not_finite_are_refused(trained: Path, tmp_path: Path):
    model = lw.load(trained / "base")
    heads = load_medusa(trained / "run" / "model", model)
    with torch.no_grad():
        next(heads.parameters())[0, 0] = torch.nan
    write_medusa(heads, tmp_path)
    with pytest.raises(UserError, match="a weight is NaN or infinite"):
        load_medusa(tmp_path, model)


def test_a_folder_of_heads_is_no_model(trained: Path):
    with pytest.raises(UserError, match="model_type = 'longwave-medusa'"):
        lw.load(trained / "run" / "model")


def test_commands_train_heads_and_draft_by_them(trained: Path, tmp_path: Path, longwave):
    values = {"medusa": {"heads": 2}, **runs.values("llama", "adamw", start_from=str(trained / "base"), steps=3)}
    (tmp_path / "heads.toml").write_text("\n".join(runs._toml(values)) + "\n")
    assert longwave("train", tmp_path / "heads.toml", "--output", tmp_path / "run").code == 0
    heads, words = (
        tmp_path / "run" / "model",
        ["generate", trained / "base", "--prompt", "def ", "--max-new-tokens", 12],
    )
    assert load_medusa(heads, lw.load(trained / "base")).config.heads == 2
    assert longwave(*words, "--draft", heads).out == longwave(*words).out
    model = lw.load(trained / "base")
    proposer = drafter(heads, model, 1)
    assert isinstance(proposer, MedusaDrafts)
    assert proposer.medusa.base is model


def test_heads_of_another_model_do_not_draft(trained: Path):
    other = runs.values("llama")["model"]
    model = Decoder(build(Recipe, {**runs.values("llama"), "model": {**other, "hidden_size": 64}}, "tests").model)
    with pytest.raises(UserError, match="hidden_size = 32: the model has 64"):
        drafter(trained / "run" / "model", model, 1)
