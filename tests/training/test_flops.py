"""Runs that end by their FLOPs: counted at the tokens really kept, schedules that go along, and resumed to the bit."""

from itertools import pairwise
from pathlib import Path

import pytest
from runs import MODELS, StopAt, contents, differing, losses, recipe, trained, values

from longwave.config import build
from longwave.errors import UserError
from longwave.training.loop import Interrupted, Trainer
from longwave.training.metrics import read_metrics
from longwave.training.recipe import Recipe


def flops_of(trainer: Trainer) -> list[int]:
    """The FLOPs of each step."""
    spent = [0, *(entry["flops"] for entry in read_metrics(trainer.output / "metrics.jsonl"))]
    return [after - before for before, after in pairwise(spent)]


@pytest.fixture(params=MODELS)
def by_flops(request: pytest.FixtureRequest) -> Recipe:
    """A recipe whose budget is that of six expected steps and a half."""
    steps = recipe(request.param, "adamw")
    return recipe(request.param, "adamw", steps=None, flops=6.5 * steps.step_flops, checkpoint_every=3)


def test_a_run_by_flops_ends_within_a_step_of_them(by_flops: Recipe, tmp_path: Path) -> None:
    trainer = trained(by_flops, tmp_path)
    budget, each = by_flops.training.flops, flops_of(trainer)
    assert budget is not None
    assert by_flops.steps == 7
    assert budget <= trainer.flops < budget + each[-1]
    assert sum(each) == trainer.flops
    assert len(each) == trainer.step


def test_the_schedule_goes_by_the_share_that_is_spent(by_flops: Recipe, tmp_path: Path) -> None:
    trainer = trained(by_flops, tmp_path)
    entries = read_metrics(tmp_path / "metrics.jsonl")
    before = [0, *(entry["flops"] for entry in entries)]
    expected = [by_flops.schedule.scale(spent / by_flops.step_flops, 0, 7) for spent in before[:-1]]
    assert [entry["lr_scale"] for entry in entries] == expected
    assert trainer.position >= 6.5


def test_a_run_by_flops_resumes_to_the_bit(by_flops: Recipe, tmp_path: Path) -> None:
    straight = trained(by_flops, tmp_path / "straight")
    with pytest.raises(Interrupted):
        trained(by_flops, tmp_path / "stopped", StopAt(4))
    resumed = trained(by_flops, tmp_path / "stopped")
    assert losses(tmp_path / "stopped") == losses(tmp_path / "straight")
    assert differing(contents(resumed), contents(straight)) == []
    assert resumed.flops == straight.flops


@pytest.mark.parametrize("changes", [{"micro_windows": 1}, {"recompute": True}])
@pytest.mark.parametrize("model", MODELS)
def test_neither_micro_batches_nor_recomputing_change_what_counts(
    model: str, changes: dict[str, int], tmp_path: Path
) -> None:
    plain = trained(recipe(model, "adamw", steps=3), tmp_path / "plain")
    other = trained(recipe(model, "adamw", steps=3, **changes), tmp_path / "other")
    assert flops_of(plain)[0] == flops_of(other)[0] > 0


def test_levels_that_keep_less_leave_more_steps(tmp_path: Path) -> None:
    """The same FLOPs last longer for a layout that keeps less."""
    steps = {}
    for retention in (0.9, 0.3):
        shape = values("causal", "adamw", steps=None, flops=8.0 * recipe("causal", "adamw").step_flops)
        shape["model"]["layout"] = f"F subllm({retention}: 6F) F"
        steps[retention] = trained(build(Recipe, shape, "tests"), tmp_path / str(retention)).step
    assert steps[0.3] > steps[0.9]


def test_a_run_can_be_stopped_before_any_step_and_goes_on_to_the_bit(tmp_path: Path) -> None:
    run = recipe("causal", "adamw")
    straight = trained(run, tmp_path / "straight")
    trainer = Trainer(run, tmp_path / "paused")
    for pause in (3, 3, 5):
        trainer.run_until(lambda pause=pause: trainer.step == pause)
        assert trainer.step == pause
        assert not (tmp_path / "paused" / "model").exists()
    trainer.run()
    assert losses(tmp_path / "paused") == losses(tmp_path / "straight")
    assert differing(contents(trainer), contents(straight)) == []


@pytest.mark.parametrize(
    ("training", "message"),
    [
        ({"steps": None}, r"training\.steps is missing"),
        ({"flops": 1e9}, r"training\.flops: in place of training\.steps"),
        ({"steps": None, "flops": 0.5}, r"training\.flops = 0\.5: 1 or more"),
        ({"steps": 0}, r"training\.steps = 0: 1 or more"),
        ({"steps": None, "flops": 1.0}, r"schedule\.warmup_steps = 2: a run of 1 step"),
    ],
)
def test_budgets_that_make_no_sense_are_refused(training: dict[str, float], message: str) -> None:
    with pytest.raises(UserError, match=message):
        recipe("llama", "adamw", **training)
