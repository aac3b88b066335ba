"""Runs with NaN or infinity in their weights, data or gradients: what ends them, what is told, and what is left."""

from __future__ import annotations

import json
import math
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np
import pytest
import runs
import torch
from runs import CrashAt, StopAt, contents, differing, losses, trained
from torch import Tensor

import longwave as lw
from longwave.cli import main
from longwave.config import build
from longwave.errors import MachineError, UserError
from longwave.evaluation.held_out import HeldOut
from longwave.training import checkpoints
from longwave.training.divergence import RunEnded, not_finite
from longwave.training.loop import Interrupted, Trainer
from longwave.training.metrics import read_metrics
from longwave.training.recipe import Recipe

STEPS, LIMIT = 14, 3
BAD = (math.nan, math.inf, -math.inf)


def recipe(folder: Path, model: str = "published", optimizer: str = "adamw", **changes: Any) -> Recipe:
    """A short run over a copy of the data, which a test can damage."""
    data = folder / "data"
    if not data.exists():
        shutil.copytree(runs.prepared(), data)
    training = {
        "steps": STEPS,
        "checkpoint_every": 2,
        "evaluate_windows": 1,
        "max_skipped": LIMIT,
        "keep": 1,
        **changes,
    }
    return build(Recipe, runs.values(model, optimizer, **training) | {"data": {"folder": str(data)}}, "tests")


# --- what goes wrong --------------------------------------------------------------------------------------------------


class At:
    """An observer that does something to a trainer once a step is done."""

    def __init__(self, step: int, act: Callable[[], object]) -> None:
        self.step, self.act = step, act

    def record(self, entry: dict[str, Any]) -> None:
        if entry["step"] == self.step:
            self.act()

    def close(self) -> None:
        pass


class Fault(NamedTuple):
    """A value that is not finite, in one place of a run, once `step` steps are done."""

    kind: str
    step: int
    value: float
    seed: int

    def into(self, trainer: Trainer) -> None:
        """Prepares the fault."""
        {"weights": self._weights, "data": self._data}.get(self.kind, self._gradients)(trainer)

    def _weights(self, trainer: Trainer) -> None:
        weights = list(trainer.model.state_dict().values())
        one = random.Random(self.seed).choice([weight for weight in weights if weight.is_floating_point()])
        trainer.watch(At(self.step, lambda: self._spoil(one)))

    def _data(self, trainer: Trainer) -> None:
        shard = Path(trainer.recipe.data.folder) / "train" / "tokens-00000.bin"
        damaged = np.full(shard.stat().st_size // 2, 0xFFFF, np.uint16).tobytes()
        trainer.watch(At(self.step, lambda: _overwrite(shard, damaged)))

    def _gradients(self, trainer: Trainer) -> None:
        step, pick = trainer.optimizer.step, random.Random(self.seed)

        def spoiled(scale: float) -> Any:
            if trainer.step == self.step or (self.kind == "every gradient" and trainer.step > self.step):
                grads = [weight.grad for weight in trainer.model.parameters() if weight.grad is not None]
                self._spoil(pick.choice(grads))
            return step(scale)

        trainer.optimizer.step = spoiled  # type: ignore[method-assign]

    def _spoil(self, tensor: Tensor) -> None:
        with torch.no_grad():
            tensor.view(-1)[random.Random(self.seed).randrange(tensor.numel())] = self.value


def _overwrite(path: Path, content: bytes) -> None:
    """Changes the bytes of a file that is mapped into memory."""
    with path.open("r+b") as file:
        file.write(content)


def outcome(fault: Fault, run: Recipe, folder: Path) -> tuple[int, str]:
    """The exit code of a run with a fault, and its last line."""
    trainer = Trainer(run, folder)
    fault.into(trainer)
    try:
        trainer.run()
    except MachineError as error:
        return 1, str(error)
    return 0, ""


def strict(path: Path) -> list[dict[str, Any]]:
    """The entries of a metrics file, whose lines have to be JSON to the letter."""

    def refuse(constant: str) -> NoReturn:
        raise AssertionError(f"{constant} is no JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


def check(fault: Fault, folder: Path, **changes: Any) -> None:
    """Injects a fault and holds all that the rule of divergence promises against what is there afterwards."""
    run = recipe(folder, **changes)
    code, line = outcome(fault, run, folder / "run")
    entries = strict(folder / "run" / "metrics.jsonl")
    skipped = [entry["step"] for entry in entries if entry.get("skipped")]
    newest = checkpoints.newest(folder / "run" / "checkpoints")
    assert newest is not None
    assert not_finite(lw.load(newest.path).state_dict()) is None
    if fault.kind == "one gradient":
        assert (code, skipped) == (0, [fault.step + 1])
        assert entries[fault.step]["grad_norm"] is None
        assert not_finite(lw.load(folder / "run" / "model").state_dict()) is None
        return
    assert code == 1
    assert f"the last whole checkpoint is {newest.path}" in line
    assert line.startswith(f"step {entries[-1]['step']}: ")
    assert not (folder / "run" / "model").exists()
    assert len(skipped) == {"weights": len(skipped), "data": 0, "every gradient": LIMIT}[fault.kind]
    assert newest.step >= fault.step - 2
    shutil.copytree(runs.prepared(), folder / "data", dirs_exist_ok=True)
    assert Trainer(run, folder / "run").step == newest.step
    assert trained(run, folder / "run").finished


KINDS = ("weights", "data", "one gradient", "every gradient")


@pytest.mark.parametrize("optimizer", runs.OPTIMIZERS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_fault_of_each_kind(tmp_path: Path, kind: str, optimizer: str):
    check(Fault(kind, 5, math.nan, seed=1), tmp_path, model="llama", optimizer=optimizer)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(100))
def test_a_hundred_runs_with_a_random_fault(tmp_path: Path, seed: int):
    draw = random.Random(seed)
    fault = Fault(KINDS[seed % 4], draw.randrange(2, STEPS - LIMIT), draw.choice(BAD), seed)
    check(fault, tmp_path, model=draw.choice(list(runs.MODELS)), optimizer=draw.choice(list(runs.OPTIMIZERS)))


# --- the rule ---------------------------------------------------------------------------------------------------------


def test_a_skipped_update_changes_no_weight_no_buffer_and_no_state(tmp_path: Path):
    """Thresholds of causal selection included, which follow what a forward pass saw."""
    run = recipe(tmp_path, "causal", steps=6)
    trainer = Trainer(run, tmp_path / "run")
    seen: dict[int, dict[str, Tensor]] = {}
    for step in (3, 4):
        trainer.watch(
            At(step, lambda at=step: seen.update({at: {name: t.clone() for name, t in contents(trainer).items()}}))
        )
    Fault("one gradient", 3, math.nan, seed=0).into(trainer)
    trainer.run()
    assert differing(seen[3], seen[4]) == []
    assert differing(seen[4], contents(trainer))


def test_scores_that_are_not_finite_do_not_reach_the_thresholds(tmp_path: Path):
    trainer = Trainer(recipe(tmp_path, "causal", steps=6), tmp_path / "run")
    loss = trainer.model.loss
    score = trainer.model.resamplers[0].score

    def spoiled(*inputs: Any) -> Tensor:
        hook = score.register_forward_hook(lambda _, __, out: out * math.nan) if trainer.step == 3 else None
        found = loss(*inputs)
        if hook is not None:
            hook.remove()
        return found

    trainer.model.loss = spoiled  # type: ignore[method-assign]
    trainer.run()
    assert trainer.result().skipped == 1
    assert not_finite(trainer.model.state_dict()) is None


def test_skips_that_are_not_in_a_row_do_not_end_a_run(tmp_path: Path):
    run = recipe(tmp_path, "llama")
    trainer = Trainer(run, tmp_path / "run")
    for step in (2, 3, 5, 6, 8, 9, 11, 12):
        Fault("one gradient", step, math.inf, step).into(trainer)
    trainer.run()
    assert trainer.result().skipped == 8


def test_skips_in_a_row_are_counted_over_an_interruption(tmp_path: Path):
    run = recipe(tmp_path, "llama")
    for ends in (Interrupted, RunEnded):
        trainer = Trainer(run, tmp_path / "run")
        Fault("every gradient", 4, math.nan, 0).into(trainer)
        trainer.watch(StopAt(6))
        with pytest.raises(ends):
            trainer.run()
    assert [entry["step"] for entry in losses(tmp_path / "run") if entry.get("skipped")] == [5, 6, 7]


def test_a_run_whose_every_update_was_skipped_ends_however_short_it_is(tmp_path: Path):
    run = recipe(tmp_path, "llama", steps=3, max_skipped=10, checkpoint_every=0)
    code, line = outcome(Fault("every gradient", 0, math.nan, 0), run, tmp_path / "run")
    assert code == 1
    assert "3 updates in a row skipped" in line
    assert "no checkpoint had been written" in line


def test_a_weight_that_takes_no_part_is_found_before_it_is_written(tmp_path: Path):
    """A row of the embedding that no text uses: loss and gradients stay finite, and only a look at it tells."""
    run = recipe(tmp_path, "llama", checkpoint_every=7, log_every=100)
    trainer = Trainer(run, tmp_path / "run")
    embed, used = trainer.model.embed.weight, set(np.fromfile(tmp_path / "data/train/tokens-00000.bin", np.uint16))
    unused = next(row for row in range(len(embed)) if row not in used)
    trainer.watch(At(3, lambda: embed.data[unused].fill_(math.nan)))
    with pytest.raises(RunEnded, match=r"step 7: .* holds NaN or infinity"):
        trainer.run()
    assert checkpoints.newest(tmp_path / "run" / "checkpoints") is None


@pytest.mark.parametrize("where", ["second_moment", "first_moment"])
def test_the_state_of_the_optimizer_is_looked_at_too(tmp_path: Path, where: str):
    trainer = Trainer(recipe(tmp_path, "llama"), tmp_path / "run")
    name = next(name for name in trainer.optimizer.tensors() if name.startswith(where))
    trainer.watch(At(4, lambda: trainer.optimizer.tensors()[name].view(-1)[0].fill_(math.inf)))
    with pytest.raises(RunEnded, match=rf"step 4: optimizer\.{where}.* holds NaN or infinity.*step-00000002"):
        trainer.run()


def test_a_held_out_loss_that_is_not_finite_is_told_and_ends_nothing(tmp_path: Path, monkeypatch, capsys):
    found = HeldOut(math.nan, 10, ())
    monkeypatch.setattr("longwave.training.next_token.held_out_loss", lambda *_, **__: found)
    path = runs.write_recipe(tmp_path / "r.toml", "llama")
    assert main(["train", str(path), "--output", str(tmp_path / "run"), "--json"]) == 0
    said = capsys.readouterr()
    assert "the held-out loss is not finite" in said.err
    assert "held-out loss not finite after" in said.out
    assert json.loads(said.out.splitlines()[-1])["held_out_loss"] is None
    assert strict(tmp_path / "run" / "metrics.jsonl")[-1]["held_out_loss"] is None


def test_held_out_data_that_is_damaged_meanwhile_ends_the_run_in_one_line(tmp_path: Path):
    run = recipe(tmp_path, "llama")
    trainer = Trainer(run, tmp_path / "run")
    shard = tmp_path / "data" / "held_out" / "tokens-00000.bin"
    damaged = np.full(shard.stat().st_size // 2, 0xFFFF, np.uint16).tobytes()
    trainer.watch(At(5, lambda: _overwrite(shard, damaged)))
    with pytest.raises(RunEnded, match=r"step 8: .*held_out: damaged: it has a token id 65535, .*step-00000006"):
        trainer.run()


def test_weights_that_are_not_finite_are_no_start(tmp_path: Path):
    trainer = trained(recipe(tmp_path, "llama", steps=4), tmp_path / "run")
    trainer.model.blocks[1].mixer.q_proj.weight.data[0, 0] = math.nan
    lw.save(trainer.model, tmp_path / "bad")
    with pytest.raises(UserError, match=r"start_from = .*bad: blocks\.1.*q_proj.weight holds NaN or infinity"):
        Trainer(recipe(tmp_path, "llama", start_from=str(tmp_path / "bad")), tmp_path / "other")


def test_through_the_command_line(tmp_path: Path, capsys):
    """A learning rate that nothing survives: a line for each skip, one at the end, exit code 1, and JSON throughout."""
    path = runs.write_recipe(tmp_path / "r.toml", "llama", "adamw", steps=STEPS, max_skipped=4)
    words = ["train", str(path), "optimizer.lr=1e20", "--output", str(tmp_path / "run")]
    assert main(words) == 1
    lines = capsys.readouterr().err.splitlines()
    assert sum("so its update was skipped" in line for line in lines) == 4
    assert lines[-1].startswith("longwave: step ")
    assert "4 updates in a row skipped" in lines[-1] or "holds NaN or infinity" in lines[-1]
    assert len(strict(tmp_path / "run" / "metrics.jsonl")) == len(read_metrics(tmp_path / "run" / "metrics.jsonl"))


def test_nothing_is_pruned_by_a_checkpoint_that_was_not_written(tmp_path: Path):
    run = recipe(tmp_path, "llama", keep=2)
    with pytest.raises(ConnectionAbortedError):
        trained(run, tmp_path / "run", CrashAt(7))
    kept = [one.step for one in checkpoints.complete(tmp_path / "run" / "checkpoints")]
    code, _ = outcome(Fault("weights", 8, math.nan, 3), run, tmp_path / "run")
    assert (code, kept) == (1, [4, 6])
    assert [one.step for one in checkpoints.complete(tmp_path / "run" / "checkpoints")] == kept
