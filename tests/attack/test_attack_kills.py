"""Commands that are killed (`kill -9`) at random moments: what was saved stays, and the same command goes on.

A row of kills goes on until so many have met a running command, however busy the machine is.
"""

from __future__ import annotations

import json
import random
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import runs
from attacks import Attacker, Outcome
from overwriting_child import models

import longwave as lw
from longwave import files
from longwave.checkpoints import save
from longwave.data.prepared import PreparedInfo
from longwave.training import checkpoints

KILLED = -9
FOREVER = 600.0
MOST = 20  # commands for each kill that is wanted
OVERWRITING = Path(runs.__file__).with_name("overwriting_child.py")


@dataclass
class Row:
    """A command that is killed again and again.

    seconds: how long it takes when it is left alone. kills: how many have met it; within: those that left something
    half-written under a hidden name.
    """

    attacker: Attacker
    words: tuple[object, ...]
    seconds: float
    draw: random.Random
    kills: int = 0
    within: int = 0

    def once(self) -> Outcome:
        """Runs the command, and kills it at a random moment of the time that it takes."""
        outcome = self.attacker.run(*self.words, killed_after=self.draw.uniform(0, self.seconds))
        assert outcome.code in (0, KILLED), str(outcome)
        if outcome.code == KILLED:
            self.kills += 1
            self.within += any(self.attacker.work.rglob(".*.partial-*"))
        return outcome

    def until(self, kills: int, is_whole: Callable[[], object], is_right: Callable[[], object]) -> None:
        """Kills the command so many times; it begins anew whenever it has ended, and once it is left to its end.

        is_whole: asserts after every kill that nothing is lost. is_right: asserts what a command at its end has left.
        """
        for _ in range(MOST * kills):
            if self.kills == kills:
                break
            ended = self.once().code == 0
            (is_right if ended else is_whole)()
            if ended:
                fresh(self.attacker)
        assert self.kills == kills
        outcome = self.attacker.run(*self.words, killed_after=FOREVER)
        assert outcome.code == 0, str(outcome)
        is_right()
        assert not list(self.attacker.work.rglob(".*.partial-*")), "a leftover that nobody sweeps"
        print(f"{self.words[0]}: {self.kills} kills, {self.within} of them within a save")


def fresh(attacker: Attacker) -> None:
    shutil.rmtree(attacker.work, ignore_errors=True)
    attacker.work.mkdir()


def a_row(attacker: Attacker, seed: int, *words: object) -> tuple[Row, Path]:
    """A row of kills, and what the command leaves when nobody kills it."""
    fresh(attacker)
    begin = time.monotonic()
    outcome = attacker.run(*words, killed_after=FOREVER)
    seconds = time.monotonic() - begin
    assert outcome.code == 0, str(outcome)
    straight = attacker.home / "straight"
    shutil.rmtree(straight, ignore_errors=True)
    attacker.work.rename(straight)
    attacker.work.mkdir()
    return Row(attacker, words, seconds, random.Random(seed)), straight


def rows(count: int, of: int, cut: int = 0) -> pytest.MarkDecorator:
    """Parametrizes a test by the seeds of its rows, of `of` kills each; one of `cut` kills is in `make test`, too."""
    more = [pytest.param(seed, of, marks=pytest.mark.attack) for seed in range(count)]
    return pytest.mark.parametrize(("seed", "kills"), [*([(count, cut)] if cut else []), *more])


def same_bytes(one: Path, other: Path, *names: str) -> None:
    for name in names:
        assert (one / name).read_bytes() == (other / name).read_bytes(), name


@rows(12, of=12)
def test_training(attacker: Attacker, tmp_path: Path, seed: int, kills: int):
    """A checkpoint at every step, so that most kills fall into one."""
    run = {"steps": 30, "checkpoint_every": 1, "keep": 2, "evaluate_every": 0}
    recipe = runs.write_recipe(tmp_path / "r.toml", "causal", **run)
    row, straight = a_row(attacker, seed, "train", recipe, "--output", "run", "training.seed=1")
    output, reached = attacker.work / "run", 0

    def is_whole() -> None:
        nonlocal reached
        found = checkpoints.complete(output / "checkpoints")
        assert all(files.verify(one.path) for one in found)
        newest = max((one.step for one in found), default=0)
        assert newest >= reached, "a checkpoint is lost"
        reached = newest

    def is_right() -> None:
        nonlocal reached
        reached = 0
        assert runs.losses(output) == runs.losses(straight / "run")
        same_bytes(
            output, straight / "run", "model/model.safetensors", "checkpoints/step-00000030/optimizer.safetensors"
        )

    row.until(kills, is_whole, is_right)


@rows(4, of=10, cut=2)
def test_prepare(attacker: Attacker, seed: int, kills: int):
    words = ["prepare", runs.corpus(), "data", "--vocab-size", "300", "--held-out", "0.3"]
    row, straight = a_row(attacker, seed, *words)
    names = sorted(str(path.relative_to(straight)) for path in straight.rglob("*") if path.is_file())

    def is_whole() -> None:
        if (attacker.work / "data").exists():
            is_right()
            shutil.rmtree(attacker.work / "data")

    def is_right() -> None:
        assert files.verify(attacker.work / "data")
        assert PreparedInfo.read(attacker.work / "data").train.tokens
        same_bytes(attacker.work, straight, *names)

    row.until(kills, is_whole, is_right)


@rows(4, of=15, cut=2)
def test_save_over_a_folder(attacker: Attacker, tmp_path: Path, seed: int, kills: int):
    """Two models by turns, by an exchange of folders or by two renames: one of them is always there."""
    originals = []
    for at, (model, tokenizer) in enumerate(models()):
        save(model, tmp_path / f"{at}", tokenizer=tokenizer)
        originals.append(told(tmp_path / f"{at}"))
    row, _ = a_row(attacker, seed, OVERWRITING, "model", 60, ["exchange", "rename"][seed % 2])
    begun = False

    def is_whole() -> None:
        nonlocal begun
        if begun or (attacker.work / "model").exists():
            begun = True
            assert told(attacker.work / "model") in originals

    def is_right() -> None:
        nonlocal begun
        begun = False
        assert told(attacker.work / "model") == originals[1]

    row.until(kills, is_whole, is_right)


def told(folder: Path) -> tuple[str, str]:
    """Layout and tokenizer of the model in a folder, which is checked whole."""
    model = lw.load(folder)
    assert model.tokenizer is not None
    return model.config.layout, model.tokenizer.fingerprint


SHORT = [
    *("training.steps=6", "training.batch_windows=2", "training.window=64", "training.checkpoint_every=1"),
    *("training.evaluate_every=3", "training.evaluate_windows=2", "training.log_every=1", "schedule.warmup_steps=1"),
    *("model.hidden_size=32", "model.attention.heads=2", "model.mlp.size=32", "model.vocab_size=300"),
    "model.context_window=128",
]


@rows(3, of=8)
def test_quickstart(attacker: Attacker, seed: int, kills: int):
    row, straight = a_row(attacker, seed, "quickstart", runs.corpus(), "--output", "out", *SHORT)
    output, expected = attacker.work / "out", straight / "out"

    def is_whole() -> None:
        for name in ("llama", "subllm"):
            for one in checkpoints.complete(output / name / "checkpoints"):
                assert files.verify(one.path)
        for page in ("results.json", "speed.json"):
            assert not (output / page).exists() or json.loads((output / page).read_text())

    def is_right() -> None:
        for name in ("llama", "subllm"):
            assert runs.losses(output / name) == runs.losses(expected / name)
            same_bytes(output / name, expected / name, "model/model.safetensors")
        found, figures = (json.loads((one / "results.json").read_text()) for one in (output, expected))
        assert found["held_out_loss"] == figures["held_out_loss"]
        assert (output / "report.html").exists()

    row.until(kills, is_whole, is_right)
