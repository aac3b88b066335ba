"""Layers that learn their own teacher's outputs: each by itself, the teacher untouched, resumed to the bit."""

from __future__ import annotations

import dataclasses
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
from longwave.conversion.align import Alignment, _Fit
from longwave.errors import UserError
from longwave.model import Decoder
from longwave.training.loop import Interrupted, Run
from longwave.training.metrics import Observer
from longwave.training.recipe import Recipe

STUDENT = {"layout": "3L"}


def teacher() -> Decoder:
    """A GQA Llama whose attention is far from even."""
    model, generator = Decoder(runs.recipe("llama").model, seed=7), torch.Generator().manual_seed(1)
    for block in model.blocks:
        for name, weight in block.mixer.named_parameters():
            if name.startswith(("q_proj", "k_proj")):
                torch.nn.init.normal_(weight, std=0.3, generator=generator)
    return model


def recipe(model: dict[str, Any] | None = None, **training: Any) -> Recipe:
    values = runs.values("llama", "adamw", **training)
    values["model"] |= STUDENT if model is None else model
    return build(Recipe, values, "tests")


def aligned(recipe: Recipe, folder: Path, *observers: Observer, **options: Any) -> Run[Alignment]:
    run = Run(recipe, folder, partial(Alignment, teacher=teacher(), **options))
    for observer in observers:
        run.watch(observer)
    run.complete()
    return run


def contents(run: Run[Alignment]) -> dict[str, Tensor]:
    moments = {f"optimizer.{name}": tensor for name, tensor in run.optimizer.tensors().items()}
    return run.objective.weights() | moments


@pytest.mark.parametrize("error", ["mse", "relative"])
@pytest.mark.parametrize("observer", [StopAt(3), CrashAt(5)], ids=["stopped", "crashed"])
def test_a_stopped_alignment_ends_in_the_same_bits(tmp_path: Path, observer: Observer, error: str):
    one = recipe(checkpoint_every=2)
    straight = aligned(one, tmp_path / "straight", error=error)
    with pytest.raises((Interrupted, ConnectionAbortedError)):
        aligned(one, tmp_path / "broken", observer, error=error)
    resumed = aligned(one, tmp_path / "broken", error=error)
    assert differing(contents(resumed), contents(straight)) == []
    assert losses(tmp_path / "broken") == losses(tmp_path / "straight")


def test_the_teacher_has_no_gradient_and_does_not_change(tmp_path: Path):
    """Acceptance check 37, and 38: what watches the teacher changes none of its logits."""
    run = aligned(recipe(), tmp_path)
    source = run.objective.teacher
    assert differing(source.state_dict(), teacher().state_dict()) == []
    assert all(weight.grad is None for weight in source.parameters())
    batch = run.data.batch(range(2))
    tokens, _, stream = batch.inputs("cpu")
    with torch.no_grad():
        alone = source(tokens, stream)
        hidden: list[Tensor] = []
        hook = source.norm.register_forward_hook(lambda _module, _inputs, output: hidden.append(output))
        run.objective.outputs(batch, lambda *_: None)
        hook.remove()
        assert torch.equal(source.logits(hidden[0][stream.outputs]), alone)


def test_the_loss_falls_more_than_tenfold_and_every_layer_explains_more(tmp_path: Path):
    """Acceptance check 37, on a teacher of which linear attention can be the equal: its attention is even."""
    steps = recipe({**STUDENT, "lightning": {"rotary": False}}, steps=60, evaluate_every=30)
    faster = dataclasses.replace(steps, optimizer=dataclasses.replace(steps.optimizer, lr=1e-2))
    run = Run(faster, tmp_path, partial(Alignment, teacher=Decoder(runs.recipe("llama").model, seed=7)))
    run.complete()
    entries = losses(tmp_path)
    assert entries[-1]["loss"] < entries[0]["loss"] / 10
    evaluated = [entry["r2"] for entry in entries if "r2" in entry]
    assert all(later > earlier for earlier, later in zip(evaluated[0], evaluated[-1], strict=True))


def test_r2_is_the_share_of_the_variance_that_is_explained():
    draws = torch.Generator().manual_seed(0)
    wanted = torch.randn(90, 5, generator=draws, dtype=torch.float64) + torch.arange(5)
    found = wanted + 0.1 * torch.randn(90, 5, generator=draws, dtype=torch.float64)
    fit = _Fit()
    for part in (slice(0, 17), slice(17, 90)):
        fit.add(wanted[part], found[part])
    spread = (wanted - wanted.mean(0)).square().mean()
    assert fit.error == pytest.approx(float((wanted - found).square().mean()))
    assert fit.variance == pytest.approx(float(spread))
    assert fit.r2 == pytest.approx(1 - float((wanted - found).square().mean() / spread))
    assert 0.98 < fit.r2 < 1


def test_a_layer_learns_from_its_own_student_alone(tmp_path: Path):
    """Acceptance check 37: the errors of the layers add up to the loss, and one student's weights move one error."""
    objective = Run(recipe(), tmp_path, partial(Alignment, teacher=teacher())).objective
    batch = objective._data.batch(range(4))

    def errors() -> tuple[float, list[float]]:
        step = objective.step(logged=True)
        return float(step.backward(batch, objective.targets(batch))), step.figures["errors"]

    loss, before = errors()
    assert loss == pytest.approx(sum(before) / 3, rel=1e-6)
    gradients = {name: weight.grad.clone() for name, weight in objective.weights().items() if weight.grad is not None}
    with torch.no_grad():
        objective.student.blocks[1].mixer.v_proj.weight.mul_(2)
    _, after = errors()
    assert (after[0], after[2]) == (before[0], before[2])
    assert after[1] != before[1]
    for name, weight in objective.weights().items():  # gradients add up: of the others the same once more
        same = torch.equal(weight.grad, 2 * gradients[name])
        assert same == (not name.startswith("blocks.1."))


def test_gradients_are_those_of_the_loss_written_plainly(tmp_path: Path):
    """Against the mean over layers, tokens and channels of the squared error after the output projection."""
    objective = Run(recipe(), tmp_path, partial(Alignment, teacher=teacher())).objective
    batch = objective._data.batch(range(2))
    tokens, _, stream = batch.inputs("cpu")
    inputs: list[Any] = []
    mixers = [block.mixer for block in objective.teacher.blocks]
    hooks = [one.register_forward_hook(lambda _, given, output: inputs.append((*given[:2], output))) for one in mixers]
    with torch.no_grad():
        objective.teacher.hidden(tokens, dataclasses.replace(stream, outputs=None))
    for hook in hooks:
        hook.remove()
    angles = objective.student.passengers(stream)
    found = [
        (block.mixer(hidden, at.carrying(**angles), None) - output).square().mean()
        for block, (hidden, at, output) in zip(objective.student.blocks, inputs, strict=True)
    ]
    expected = torch.autograd.grad(sum(found) / 3, list(objective.weights().values()))  # pyright: ignore[reportArgumentType]
    loss = objective.step(True).backward(batch, objective.targets(batch))
    assert float(loss) == pytest.approx(float(sum(found).detach()) / 3, rel=1e-6)
    for weight, gradient in zip(objective.weights().values(), expected, strict=True):
        torch.testing.assert_close(weight.grad, gradient, rtol=1e-5, atol=1e-9)


def test_micro_batches_change_nothing_but_rounding(tmp_path: Path):
    whole, cut = (aligned(recipe(micro_windows=size), tmp_path / str(size)) for size in (4, 1))
    for entry, other in zip(losses(tmp_path / "4"), losses(tmp_path / "1"), strict=True):
        assert entry["loss"] == pytest.approx(other["loss"], rel=1e-4)
        assert entry["errors"] == pytest.approx(other["errors"], rel=1e-4)
    assert whole.flops == cut.flops


def test_only_converted_layers_learn_and_the_rest_is_the_teacher_s(tmp_path: Path):
    run = aligned(recipe({"layout": "F L F"}), tmp_path)
    assert run.objective.layers == [1]
    assert all(name.startswith("blocks.1.mixer.") for name in run.objective.weights())
    model = lw.load(tmp_path / "model")
    source = teacher()
    for depth in (0, 2):
        ours, theirs = model.blocks[depth].state_dict(), source.blocks[depth].state_dict()
        assert differing(ours, theirs) == []
    assert torch.equal(model.embed.weight, source.embed.weight)
    assert model.tokenizer is not None
    held = {weight.untyped_storage().data_ptr() for weight in run.objective.student.parameters()}
    shared = {weight.untyped_storage().data_ptr() for weight in run.objective.teacher.parameters()}
    assert len(held - shared) == len(run.objective.weights())


def test_relative_errors_count_layers_alike(tmp_path: Path):
    """A layer whose outputs are a hundred times as large has the same share in the loss."""
    source = teacher()
    with torch.no_grad():
        source.blocks[1].mixer.o_proj.weight.mul_(100)
    plain, relative = (
        Run(recipe(), tmp_path / error, partial(Alignment, teacher=source, error=error)).objective
        for error in ("mse", "relative")
    )
    batch = plain._data.batch(range(4))
    found = {}
    for error, objective in {"mse": plain, "relative": relative}.items():
        step = objective.step(True)
        step.backward(batch, objective.targets(batch))
        found[error] = step.figures["errors"]
    assert found["mse"][1] > 1000 * found["mse"][0]
    assert max(found["relative"]) < 20 * min(found["relative"])


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"layout": "3F"}, "3F: every layer keeps softmax; convert some"),
        ({"layout": "4L"}, "4L: 4 blocks; the source has 3"),
        ({"layout": "F subllm(0.64: L) L"}, "levels are put in after the layers are aligned"),
    ],
)
def test_what_cannot_be_aligned_is_refused(tmp_path: Path, model: dict[str, Any], message: str):
    with pytest.raises(UserError, match=message.replace("(", r"\(").replace(")", r"\)")):
        aligned(recipe(model), tmp_path)


def test_a_config_of_the_student_is_its_own() -> None:
    assert build(ModelConfig, {**runs.values("llama")["model"], **STUDENT}, "model").layout == "3L"
