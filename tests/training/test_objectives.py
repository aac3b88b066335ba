"""The run is the same for every objective: one that is not a language model's keeps the same laws.

Its objective has a frozen teacher, several students of one pass of it, and its own targets, FLOPs, figures, held-out
measure and checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import runs
import torch
from runs import CrashAt, StopAt, differing, losses
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from longwave.data.packed import Batch
from longwave.errors import UserError
from longwave.model import Decoder
from longwave.training.data import TrainingData
from longwave.training.loop import Interrupted, Run
from longwave.training.metrics import Observer
from longwave.training.objective import plain_backward
from longwave.training.recipe import Recipe

every_optimizer = pytest.mark.parametrize("optimizer", runs.OPTIMIZERS)
WIDTH = 32
FLOPS = 1000  # of a token, as this objective counts


class Imitation:
    """Two students, one linear and one of two layers, that learn a teacher's hidden states from its embeddings."""

    def __init__(self, recipe: Recipe, data: TrainingData, checkpoint: Path | None) -> None:
        self.data, self.passes = data, 0
        self.teacher = Decoder(recipe.model, seed=7).eval().requires_grad_(False)
        torch.manual_seed(recipe.training.seed)
        deep = nn.Sequential(nn.Linear(WIDTH, 16), nn.GELU(), nn.Linear(16, WIDTH))
        self.trained = nn.ModuleDict({"linear": nn.Linear(WIDTH, WIDTH), "deep": deep})
        if checkpoint is not None:
            self.trained.load_state_dict(load_file(checkpoint / "students.safetensors"))

    def weights(self) -> dict[str, Tensor]:
        return self.trained.state_dict(keep_vars=True)

    def begin(self) -> None:
        pass

    def set_step(self, step: int, seed: int) -> None:
        pass

    def targets(self, batch: Batch) -> int:
        return batch.tokens.numel()  # every token, and not those alone that have a next one

    def step(self, logged: bool) -> _Step:
        return _Step(self)

    def errors(self, batch: Batch) -> Tensor:
        """The summed squared error (2,) of each student, from one pass of the teacher."""
        tokens, _, stream = batch.inputs("cpu")
        self.passes += 1
        hidden = self.teacher.hidden(tokens, replace(stream, outputs=None))
        embedded = self.teacher.embed(tokens) / 0.02
        return torch.stack([(student(embedded) - hidden).square().mean(1).sum() for student in self.trained.values()])

    def evaluate(self) -> dict[str, Any]:
        batch = self.data.sources[0].held_out.batch(range(4))
        with torch.no_grad():
            errors = self.errors(batch) / self.targets(batch)
        return {"held_out_loss": float(errors.mean()), "held_out_errors": errors.tolist()}

    def write(self, folder: Path, facts: Mapping[str, Any]) -> None:
        save_file(self.trained.state_dict(), folder / "students.safetensors")

    def write_result(self, folder: Path, place: Path, facts: Mapping[str, Any]) -> None:
        self.write(folder, facts)
        (folder / "facts.txt").write_text(f"{place.name} after {facts['steps']} steps\n")


class _Step:
    def __init__(self, objective: Imitation) -> None:
        self.objective, self.flops, self.errors = objective, 0, torch.zeros(2)

    def backward(self, batch: Batch, targets: int) -> Tensor:
        errors = self.objective.errors(batch)
        self.flops += FLOPS * batch.tokens.numel()
        self.errors += errors.detach() / self.objective.targets(batch)
        return plain_backward(errors.sum() / targets)

    @property
    def figures(self) -> dict[str, list[float]]:
        return {"errors": self.errors.tolist()}


def recipe(optimizer: str = "adamw", **training: Any) -> Recipe:
    return runs.recipe("llama", optimizer, **training)


def imitated(recipe: Recipe, folder: Path, *observers: Observer) -> Run[Imitation]:
    run = Run(recipe, folder, Imitation)
    for observer in observers:
        run.watch(observer)
    run.complete()
    return run


def contents(run: Run[Imitation]) -> dict[str, Tensor]:
    return run.objective.trained.state_dict() | {
        f"optimizer.{name}": tensor for name, tensor in run.optimizer.tensors().items()
    }


@pytest.mark.parametrize(
    ("optimizer", "observer"), [("adamw", StopAt(3)), ("muon", CrashAt(5)), ("scaled_adam", CrashAt(3))]
)
def test_any_objective_resumes_to_the_bit(tmp_path: Path, optimizer: str, observer: Observer):
    one = recipe(optimizer, checkpoint_every=2)
    straight = imitated(one, tmp_path / "straight")
    with pytest.raises((Interrupted, ConnectionAbortedError)):
        imitated(one, tmp_path / "broken", observer)
    resumed = imitated(one, tmp_path / "broken")
    assert differing(contents(resumed), contents(straight)) == []
    assert losses(tmp_path / "broken") == losses(tmp_path / "straight")
    assert resumed.flops == straight.flops


@every_optimizer
def test_a_frozen_teacher_stays_as_it_was_and_the_students_learn(tmp_path: Path, optimizer: str):
    run = imitated(recipe(optimizer), tmp_path)
    untouched = Decoder(run.recipe.model, seed=7).state_dict()
    assert differing(run.objective.teacher.state_dict(), untouched) == []
    kept = {name for name in run.optimizer.tensors() if name.split(".", 1)[-1].startswith("embed")}
    assert kept == set()
    first, *_, last = losses(tmp_path)
    assert last["errors"][0] < first["errors"][0]
    assert last["errors"][1] < first["errors"][1]


def test_the_figures_of_a_run_are_its_objective_s(tmp_path: Path):
    run = imitated(recipe(micro_windows=2), tmp_path)
    entries, tokens = losses(tmp_path), 4 * runs.WINDOW
    assert [entry["flops"] for entry in entries] == [FLOPS * tokens * (step + 1) for step in range(runs.STEPS)]
    for entry in entries:  # two micro-batches of one size: the mean error of each student is half of the sum
        assert entry["loss"] == pytest.approx(sum(entry["errors"]) / 2, rel=1e-5)
    measured = [entry for entry in entries if "held_out_errors" in entry]
    assert [entry["step"] for entry in measured] == [4, 8]
    assert run.objective.passes == 2 * runs.STEPS + len(measured)


def test_a_checkpoint_holds_what_the_objective_writes_and_the_run_s_own(tmp_path: Path):
    imitated(recipe(), tmp_path)
    names = {path.name for path in (tmp_path / "checkpoints" / "step-00000008").iterdir()}
    assert names == {"students.safetensors", "optimizer.safetensors", "trainer.json", "manifest.json"}
    assert (tmp_path / "model" / "facts.txt").read_text() == "model after 8 steps\n"


def test_a_gradient_that_is_not_finite_skips_the_step_of_any_objective(tmp_path: Path):
    run = Run(recipe(), tmp_path, Imitation)
    weight = next(run.objective.trained.parameters())
    weight.register_hook(lambda grad: grad * float("nan"))
    run.watch(StopAt(1))
    before = {name: tensor.clone() for name, tensor in contents(run).items()}
    with pytest.raises(Interrupted):
        run.complete()
    assert run.progress.skipped == 1
    assert differing(contents(run), before) == []


def test_a_checkpoint_of_another_recipe_is_refused_for_any_objective(tmp_path: Path):
    imitated(recipe(steps=3), tmp_path)
    with pytest.raises(UserError, match=r"training.steps = 3 there, 4 here"):
        Run(recipe(steps=4), tmp_path, Imitation)


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("optimizer", runs.OPTIMIZERS)
def test_muon_is_told_to_be_slow_where_bf16_is(tmp_path: Path, monkeypatch: Any, optimizer: str, fast: bool):
    monkeypatch.setattr("longwave.training.loop.fast_bf16", lambda: fast)
    notes = Run(recipe(optimizer), tmp_path, Imitation).notes()
    assert any("bf16, which is slow on this CPU" in note for note in notes) == (optimizer == "muon" and not fast)
