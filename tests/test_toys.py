"""Checks 21 to 23 of `docs/subllm.md`: what a small SUBLLM learns to keep, in minutes of training.

The regime of the published form is the published one, scaled down: ScaledAdam, weights of std 0.006, on prose (the
docstrings of the standard library). Its outer level then comes to its retention; the inner one does in one seed of
three. docs/log.md has the figures, and what it does elsewhere. Causal selection is held to the same with AdamW on code.
"""

from __future__ import annotations

import ast
import functools
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from runs import trained

from longwave.config import build
from longwave.data.packed import PackedTokens
from longwave.data.shards import prepare
from longwave.data.sources import Document, standard_library
from longwave.evaluation.held_out import HeldOut, held_out_loss
from longwave.training.loop import Trainer
from longwave.training.metrics import read_metrics
from longwave.training.recipe import Recipe

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

TOY = {"hidden_size": 96, "context_window": 192, "vocab_size": 258, "attention": {"heads": 4}, "mlp": {"size": 256}}
LAYOUT, STEPS, RATIO = "F subllm(0.64: F subllm(0.64: F) F) F", 700, 0.64
OPTIMIZERS = {"adamw": {"kind": "adamw", "lr": 1e-3}, "scaled_adam": {"kind": "scaled_adam", "lr": 0.03}}


def prose() -> Iterator[Document]:
    """The docstrings of each module of the standard library."""
    for module in standard_library():
        try:
            nodes = ast.walk(ast.parse(module.text))
        except SyntaxError:  # two files are there to be wrong
            continue
        kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        found = [ast.get_docstring(node) for node in nodes if isinstance(node, kinds)]
        if text := "\n\n".join(filter(None, found)):
            yield Document(module.name, text)


TEXTS = {"prose": prose, "code": standard_library}


@dataclass(frozen=True)
class Regime:
    """What a toy is trained on and how. std: of the initial weights."""

    text: str
    optimizer: str
    std: float


PUBLISHED, CAUSAL = Regime("prose", "scaled_adam", 0.006), Regime("code", "adamw", 0.02)
WITH_ADAMW = Regime("prose", "adamw", 0.006)


@dataclass(frozen=True)
class Toy:
    """A trained toy: its trainer, its text, and what it logged."""

    trainer: Trainer
    data: Path
    entries: list[dict[str, Any]]

    def late(self, name: str) -> list[float]:
        """A quantity of each level, averaged over the last hundred steps."""
        shown = [entry[name] for entry in self.entries if name in entry and entry["step"] > STEPS - 100]
        return [sum(level) / len(level) for level in zip(*shown, strict=True)]

    def held_out(self, step: int) -> float:
        return next(entry["held_out_loss"] for entry in self.entries if entry["step"] == step)

    def both_modes(self) -> tuple[HeldOut, HeldOut]:
        """Held-out loss by threshold, and by training's own selection."""
        model, data = self.trainer.model, PackedTokens(self.data, "held_out", 192, keep_last=True)
        model.set_step(STEPS)
        return held_out_loss(model, data), held_out_loss(model, data, selection="training")


@functools.cache
def home() -> Path:
    return Path(tempfile.mkdtemp(prefix="longwave-toys-"))


@functools.cache
def prepared(text: str) -> Path:
    """A text, byte by byte."""
    folder = home() / text
    prepare(TEXTS[text], folder, vocab_size=TOY["vocab_size"])
    return folder


@functools.cache
def toy(regime: Regime, subllm: str | None, seed: int = 0) -> Toy:
    """Trains one toy to the budget: `causal`, published with a way of sampling, or None for the dense one."""
    model: dict[str, Any] = {**TOY, "layout": "5F", "init": {"std": regime.std}}
    if subllm == "causal":
        model |= {"layout": LAYOUT, "subllm": {"selection": "causal", "threshold_memory": 0.5}}
    elif subllm is not None:
        model |= {"layout": LAYOUT, "subllm": {"balancer_steps": 600, "discard_sampling": subllm}}
    data = prepared(regime.text)
    run = {"steps": STEPS, "window": 192, "batch_windows": 8, "evaluate_every": 100, "evaluate_windows": 200}
    training = {**run, "device": "cpu", "seed": seed}
    settings = {"optimizer": OPTIMIZERS[regime.optimizer], "schedule": {"kind": "constant"}}
    values = {"model": model, "data": {"folder": str(data)}, "training": training, **settings}
    output = home() / f"{regime.text}-{regime.optimizer}-{regime.std}-{subllm}-{seed}"
    trainer = trained(build(Recipe, values, "toy"), output)
    return Toy(trainer, data, read_metrics(output / "metrics.jsonl"))


def reached_but(*missed: int, why: str) -> pytest.MarkDecorator:
    """Three seeds, of which some are known to miss; docs/log.md has the figures."""
    marks = {seed: [pytest.mark.xfail(reason=why, strict=True)] for seed in missed}
    return pytest.mark.parametrize("seed", [pytest.param(seed, marks=marks.get(seed, [])) for seed in range(3)])


every_seed = pytest.mark.parametrize("seed", range(3))


@every_seed
def test_check_21_the_outer_level_comes_to_its_retention(seed: int):
    assert toy(PUBLISHED, "uniform", seed).late("positive")[0] == pytest.approx(RATIO, abs=0.12)


@reached_but(1, 2, why="the inner level keeps 0.35 and 0.51")
def test_check_21_both_levels_come_to_their_retention(seed: int):
    found = toy(PUBLISHED, "uniform", seed)
    assert found.late("positive") == pytest.approx([RATIO, RATIO], abs=0.12)
    assert max(found.late("discarded_weight")) < 0.02


@every_seed
def test_check_22_threshold_and_top_k_agree(seed: int):
    threshold, training = toy(PUBLISHED, "uniform", seed).both_modes()
    assert threshold.tokens == training.tokens
    assert threshold.loss == pytest.approx(training.loss, rel=0.01)
    assert threshold.loss != training.loss


@reached_but(1, why="top-k keeps 0.29 at the inner level whose score is not positive")
def test_check_22_few_tokens_are_wrongly_kept_or_dropped(seed: int):
    found = toy(PUBLISHED, "uniform", seed)
    assert max(found.late("false_keep") + found.late("false_drop")) < 0.15


@pytest.mark.xfail(reason="3.4 %, but from -1.0 % at step 200; 8.0 % behind the dense model of std 0.02", strict=True)
def test_check_23_the_gap_to_a_dense_model_is_small_and_shrinks():
    dense, resampled = toy(PUBLISHED, None), toy(PUBLISHED, "uniform")
    early, late = (resampled.held_out(step) / dense.held_out(step) - 1 for step in (200, STEPS))
    assert late < 0.08
    assert late < early


@pytest.mark.xfail(reason="0.80 here: the subtraction matters less than in the spec's toy; docs/log.md", strict=True)
def test_check_21_without_subtraction_nearly_everything_is_kept():
    assert toy(PUBLISHED, "none").late("positive")[0] > 0.9


@pytest.mark.xfail(reason="level 2 keeps 0.34: AdamW does not suit the published form; docs/log.md", strict=True)
def test_check_21_with_adamw():
    assert toy(WITH_ADAMW, "uniform").late("positive") == pytest.approx([RATIO, RATIO], abs=0.12)


def test_checks_21_to_23_hold_for_causal_selection():
    """Retention comes to its target, both modes are one function, and the gap to a dense model stays small."""
    dense, found = toy(CAUSAL, None), toy(CAUSAL, "causal")
    assert found.late("positive") == pytest.approx([RATIO, RATIO], abs=0.12)
    threshold, training = found.both_modes()
    assert threshold.loss == pytest.approx(training.loss, rel=1e-6)
    assert threshold.retention == pytest.approx((RATIO, RATIO), abs=0.12)
    assert found.held_out(STEPS) < 1.08 * dense.held_out(STEPS)
