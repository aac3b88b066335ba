"""Retention that training lowers on a schedule: exact at every step, at both selections, and resumed to the bit."""

from __future__ import annotations

import math
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import runs
import torch
from runs import StopAt, contents, differing, losses, trained

import longwave as lw
from longwave.config import ModelConfig, build
from longwave.errors import UserError
from longwave.model import Decoder
from longwave.resamplers import Clock
from longwave.resamplers.balancer import limits
from longwave.streams import Stream, Windows
from longwave.training.loop import Interrupted, Trainer
from longwave.training.recipe import Recipe

SCHEDULES = {
    "from 0.9": (Fraction(9, 10), {"retention_start": 0.9, "retention_steps": 7}),
    "from all": (Fraction(1), {"retention_start": 1.0, "retention_steps": 13}),
    "in one step": (Fraction(7, 10), {"retention_start": 0.7, "retention_steps": 1}),
    "none": (Fraction(64, 100), {}),
}


def config(**subllm: Any) -> ModelConfig:
    values = runs.values("published")["model"]
    return build(ModelConfig, {**values, "subllm": subllm}, "model")


def recipe(selection: str, **training: Any) -> Recipe:
    values = runs.values(selection, "adamw", **training)
    values["model"]["subllm"] = {"selection": selection, "retention_start": 1.0, "retention_steps": 6}
    return build(Recipe, values, "tests")


@pytest.mark.parametrize("name", SCHEDULES)
def test_training_keeps_the_scheduled_share_of_every_window_exactly(name: str):
    """ceil(N d) on the straight line from the start to the retention, at both levels, in windows of several sizes."""
    start, settings = SCHEDULES[name]
    model, sizes, seen = Decoder(config(**settings), seed=1).train(), (61, 0, 3, 29), list[tuple[int, ...]]()
    tokens = torch.randint(300, (sum(sizes),), generator=torch.Generator().manual_seed(2))
    stream = Stream.of(sizes, windows=Windows(sizes, (0, 1, 2, 3)))
    for step in range(16):
        model.set_step(step)
        seen.clear()
        with model.watching(lambda _level, _stream, selection: seen.append(selection.windows.sizes)):
            model.loss(tokens, tokens, stream)
        left = max(Fraction(0), 1 - Fraction(step, settings.get("retention_steps", 1)))
        share = Fraction(64, 100) + (start - Fraction(64, 100)) * left
        outer = tuple(math.ceil(size * share) for size in sizes)
        assert seen == [outer, tuple(math.ceil(size * share) for size in outer)]


@pytest.mark.parametrize("memory", [0.98, 0.5])
def test_causal_thresholds_follow_the_schedule_without_delay(memory: float):
    """Scores that stay as they are: inference keeps the share of each step, as a mean of old thresholds would not."""
    settings = {"retention_start": 1.0, "retention_steps": 60, "threshold_memory": memory}
    level = Decoder(config(selection="causal", **settings), seed=1).resamplers[0]
    draw, stream = torch.Generator().manual_seed(2), Stream.of((20_000,))
    for step in range(80):
        level.follow(Clock(step, seed=0))
        fresh, text = torch.randn(2, 20_000, 32, generator=draw)
        if step:
            kept = len(level.eval().select(fresh, stream).rows) / 20_000
            assert kept == pytest.approx(float(level.retention_at(step)), abs=0.02)
        level.train().select(text, stream)


def test_the_balancer_centres_scores_at_the_scheduled_share(monkeypatch: pytest.MonkeyPatch):
    asked = list[tuple[float, float]]()

    def noted(low: float, high: float, *rest: Any) -> Any:
        asked.append((low, high))
        return limits(low, high, *rest)

    monkeypatch.setattr("longwave.resamplers.subllm.limits", noted)
    model, tokens = Decoder(config(retention_start=0.9, retention_steps=100), seed=1).train(), torch.arange(60)
    for step in (0, 50, 100):
        model.set_step(step)
        model.loss(tokens, tokens, Stream.of((60,)))
    middles = [sum(pair) / 2 for pair in asked[::2]]
    assert middles == pytest.approx([0.9, 0.77, 0.64])


@pytest.mark.parametrize("selection", ["published", "causal"])
def test_a_stopped_schedule_ends_in_the_same_bits(tmp_path: Path, selection: str):
    one = recipe(selection, checkpoint_every=2)
    straight = trained(one, tmp_path / "straight")
    with pytest.raises(Interrupted):
        trained(one, tmp_path / "broken", StopAt(3))
    resumed = trained(one, tmp_path / "broken")
    assert differing(contents(resumed), contents(straight)) == []
    assert losses(tmp_path / "broken") == losses(tmp_path / "straight")


def test_costs_are_nominal_and_steps_are_counted_as_they_were(tmp_path: Path):
    """A plan knows no schedule; the FLOPs of a step fall from nearly those of a Llama to those without a schedule."""
    scheduled, plain = recipe("published"), runs.recipe("published", "adamw")
    assert scheduled.step_flops == plain.step_flops
    assert lw.plan(scheduled.model, context=[64]) == lw.plan(plain.model, context=[64])
    steps = [_step_flops(trained(one, tmp_path / str(number))) for number, one in enumerate((scheduled, plain))]
    assert sorted(steps[0], reverse=True) == steps[0]
    assert steps[0][0] > 1.15 * steps[1][0]
    assert steps[0][6:] == pytest.approx(steps[1][6:], rel=0.01)


def test_a_start_below_the_retention_is_refused():
    says = r"^subllm.retention_start = 0.5: at least the retention of the levels, here 0.64$"
    with pytest.raises(UserError, match=says):
        Decoder(config(retention_start=0.5, retention_steps=3))


def _step_flops(run: Trainer) -> list[int]:
    totals = [0, *(entry["flops"] for entry in losses(run.output))]
    return [later - earlier for earlier, later in pairwise(totals)]
