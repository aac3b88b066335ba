"""A student that learns its teacher's distribution: over every row, in chunks, with a gradient to the student alone."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import runs
import torch
from runs import CrashAt, StopAt, differing, losses
from torch import Tensor

import longwave as lw
from longwave.config import ModelConfig, build
from longwave.conversion import distil
from longwave.conversion.distil import Distillation, divergence
from longwave.conversion.transfer import transferred
from longwave.errors import UserError
from longwave.model import Decoder
from longwave.training.loop import Interrupted, Run
from longwave.training.metrics import Observer
from longwave.training.recipe import Recipe


def teacher(**changes: Any) -> Decoder:
    return Decoder(build(ModelConfig, {**runs.values("llama")["model"], **changes}, "model"), seed=7)


def recipe(model: str = "llama", layout: str | None = "F L F", **training: Any) -> Recipe:
    values = runs.values(model, "adamw", **training)
    values["model"] |= {} if layout is None else {"layout": layout}
    return build(Recipe, values, "tests")


def distilled(recipe: Recipe, folder: Path, *observers: Observer, **options: Any) -> Run[Distillation]:
    run = Run(recipe, folder, partial(Distillation, **{"teacher": teacher(), **options}))
    for observer in observers:
        run.watch(observer)
    run.complete()
    return run


def contents(run: Run[Distillation]) -> dict[str, Tensor]:
    moments = {f"optimizer.{name}": tensor for name, tensor in run.optimizer.tensors().items()}
    return run.objective.weights() | moments


@pytest.fixture
def in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of seven rows."""
    monkeypatch.setattr(distil, "_CHUNK_ELEMENTS", 7 * runs.VOCABULARY)


# The loss -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_the_divergence_is_its_formula_in_double_precision(direction: Any) -> None:
    draws = torch.Generator().manual_seed(0)
    theirs, ours = (3 * torch.randn(700, 50, generator=draws, dtype=torch.float64) for _ in range(2))
    first, second = (one.softmax(-1) for one in ((theirs, ours) if direction == "forward" else (ours, theirs)))
    expected = float((first * (first / second).log()).sum())
    assert float(divergence(theirs, ours, direction)) == pytest.approx(expected, rel=1e-12)
    assert float(divergence(theirs.float(), ours.float(), direction)) == pytest.approx(expected, rel=1e-5)
    assert float(divergence(theirs, theirs, direction)) == 0


@pytest.mark.parametrize("direction", ["forward", "reverse"])
@pytest.mark.parametrize("rows", ["all", "targets"])
@pytest.mark.parametrize("hidden", [0.0, 0.5])
def test_gradients_are_those_of_the_whole_in_one_piece(
    in_chunks: None, tmp_path: Path, direction: Any, rows: Any, hidden: float
) -> None:
    """Acceptance check 41: over more rows than one chunk, and more than the 512 that others summed."""
    options = {"direction": direction, "rows": rows, "hidden": hidden}
    objective = Run(recipe(batch_windows=12), tmp_path, partial(Distillation, teacher=teacher(), **options)).objective
    batch = objective._data.batch(range(12))
    targets = objective.targets(batch)
    assert targets > 512
    loss = objective.step(True).backward(batch, targets)
    found = {
        name: weight.grad.clone() for name, weight in objective.model.named_parameters() if weight.grad is not None
    }
    tokens, stream = objective.inputs(batch)
    own, theirs = objective.model.hidden(tokens, stream), objective.teacher.read(tokens, stream).hidden
    assert len(own) == targets
    whole = divergence(objective.teacher.model.logits(theirs).detach(), objective.model.logits(own), direction)
    whole = (whole + hidden * (own - theirs).square().mean(1).sum()) / targets
    assert float(loss) == pytest.approx(float(whole.detach()), rel=1e-5)
    expected = torch.autograd.grad(whole, list(objective.model.parameters()))
    for (name, _), gradient in zip(objective.model.named_parameters(), expected, strict=True):
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-8)
    assert all(weight.grad is None for weight in objective.teacher.model.parameters())


def test_every_row_has_a_gradient(in_chunks: None, tmp_path: Path) -> None:
    """The loss that HALO's code had for months summed the first 512 rows of 6,144."""
    objective = Run(recipe(), tmp_path, partial(Distillation, teacher=teacher())).objective
    batch = objective._data.batch(range(4))
    tokens, stream = objective.inputs(batch)
    own, theirs = objective.model.hidden(tokens, stream), objective.teacher.read(tokens, stream)
    own = own.detach().requires_grad_()
    objective.backward(own, theirs, objective.targets(batch))
    assert own.grad is not None
    assert own.grad.shape[0] == batch.tokens.numel()
    assert (own.grad.abs().amax(1) > 0).all()


def test_chunks_change_nothing_but_rounding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = distilled(recipe(), tmp_path / "whole")
    monkeypatch.setattr(distil, "_CHUNK_ELEMENTS", 7 * runs.VOCABULARY)
    cut = distilled(recipe(micro_windows=1), tmp_path / "cut")
    for entry, other in zip(losses(tmp_path / "whole"), losses(tmp_path / "cut"), strict=True):
        assert entry["loss"] == pytest.approx(other["loss"], rel=1e-3)
    assert whole.flops == cut.flops


# Runs ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["llama", "causal"])
@pytest.mark.parametrize("observer", [StopAt(3), CrashAt(5)], ids=["stopped", "crashed"])
def test_a_stopped_distillation_ends_in_the_same_bits(tmp_path: Path, observer: Observer, model: str) -> None:
    one = recipe(model, "F L F" if model == "llama" else None, checkpoint_every=2)
    straight = distilled(one, tmp_path / "straight")
    with pytest.raises((Interrupted, ConnectionAbortedError)):
        distilled(one, tmp_path / "broken", observer)
    resumed = distilled(one, tmp_path / "broken")
    assert differing(contents(resumed), contents(straight)) == []
    assert losses(tmp_path / "broken") == losses(tmp_path / "straight")


def test_the_teacher_itself_has_nothing_to_learn(tmp_path: Path) -> None:
    """At the first step; later ones decay its weights."""
    source = teacher()
    lw.save(source, tmp_path / "teacher")
    run = distilled(recipe(layout=None, start_from=str(tmp_path / "teacher")), tmp_path / "run", teacher=source)
    assert abs(losses(tmp_path / "run")[0]["loss"]) < 1e-6
    assert differing(run.objective.teacher.model.state_dict(), teacher().state_dict()) == []


def test_a_hybrid_comes_nearer_to_its_teacher(tmp_path: Path) -> None:
    source = teacher()
    student = transferred(source, recipe().model)
    lw.save(student, tmp_path / "student")
    run = distilled(recipe(steps=40, evaluate_every=20, start_from=str(tmp_path / "student")), tmp_path / "run")
    found = [entry["held_out_kl"] for entry in losses(tmp_path / "run") if "held_out_kl" in entry]
    assert found[-1] < found[0] < losses(tmp_path / "run")[0]["loss"]
    loaded = lw.load(tmp_path / "run" / "model")
    assert differing(loaded.state_dict(), run.objective.model.state_dict()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hidden": -1.0}, "hidden = -1.0: a weight of 0 or more"),
        ({"teacher": {"vocab_size": 301}}, "teacher.vocab_size = 301: the student's is 300"),
        ({"teacher": {"hidden_size": 64}, "hidden": 1.0}, "the hidden sizes differ"),
    ],
)
def test_what_cannot_be_distilled_is_refused(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    made = {**options, "teacher": teacher(**options.get("teacher", {}))}
    with pytest.raises(UserError, match=message):
        distilled(recipe(), tmp_path, **made)
