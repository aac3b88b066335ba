"""The training loop: resuming to the bit, real signals, accumulation, and checks 21-24 of `docs/subllm.md`."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import runs
import torch
from runs import STEPS, CrashAt, StopAt, contents, differing, furthest, in_double, losses, recipe, trained, write_recipe

import longwave as lw
from longwave import files
from longwave.config import build
from longwave.data.shards import prepare
from longwave.errors import UserError
from longwave.resamplers import subllm
from longwave.training import checkpoints
from longwave.training.loop import Interrupted, Trainer
from longwave.training.metrics import read_metrics
from longwave.training.process import deterministic
from longwave.training.recipe import Recipe

every_model = pytest.mark.parametrize("model", runs.MODELS)
every_optimizer = pytest.mark.parametrize("optimizer", runs.OPTIMIZERS)
every_subllm = pytest.mark.parametrize("model", ["published", "causal"])


def flip_bit(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)


# --- resuming, and check 24 -------------------------------------------------------------------------------------------


@every_optimizer
@every_model
def test_check_24_resumed_once_or_twice_is_the_same_run_to_the_bit(tmp_path: Path, model: str, optimizer: str):
    run = recipe(model, optimizer, micro_windows=2)
    straight = trained(run, tmp_path / "straight")
    for name, stops in {"once": [3], "twice": [2, 5]}.items():
        for stop in stops:
            with pytest.raises(Interrupted, match=f"stopped after step {stop}"):
                trained(run, tmp_path / name, StopAt(stop))
            assert len(losses(tmp_path / name)) == stop
            assert Trainer(run, tmp_path / name).step == stop
        resumed = trained(run, tmp_path / name)
        assert losses(tmp_path / name) == losses(tmp_path / "straight")
        assert differing(contents(resumed), contents(straight)) == []
    assert [entry["step"] for entry in losses(tmp_path / "straight")] == list(range(1, STEPS + 1))


@every_optimizer
def test_resuming_without_the_optimizers_tensors_would_show(tmp_path: Path, optimizer: str, monkeypatch):
    """The control of the test above: what it compares does depend on what a checkpoint holds."""
    run = recipe("published", optimizer)
    straight = trained(run, tmp_path / "straight")
    with pytest.raises(Interrupted):
        trained(run, tmp_path / "resumed", StopAt(3))
    monkeypatch.setattr(Trainer, "_resume_optimizer", lambda self: None)
    assert differing(contents(trained(run, tmp_path / "resumed")), contents(straight))
    assert losses(tmp_path / "resumed") != losses(tmp_path / "straight")


def test_check_24_the_same_seed_gives_the_same_losses_and_another_seed_others(tmp_path: Path):
    for name, seed in {"one": 0, "same": 0, "other": 1}.items():
        trained(recipe("published", seed=seed), tmp_path / name)
    assert losses(tmp_path / "one") == losses(tmp_path / "same")
    assert losses(tmp_path / "one")[0]["loss"] != losses(tmp_path / "other")[0]["loss"]


@every_subllm
def test_a_crash_goes_back_to_the_newest_checkpoint_and_drops_what_was_logged_beyond(tmp_path: Path, model: str):
    run = recipe(model, checkpoint_every=3)
    straight = trained(run, tmp_path / "straight")
    with pytest.raises(ConnectionAbortedError):
        trained(run, tmp_path / "crashed", CrashAt(7))
    assert [entry["step"] for entry in losses(tmp_path / "crashed")] == [1, 2, 3, 4, 5, 6]
    with (tmp_path / "crashed" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "lo')  # a line that the crash cut
    shutil.rmtree(tmp_path / "crashed" / "checkpoints" / "step-00000006")
    assert Trainer(run, tmp_path / "crashed").step == 3
    resumed = trained(run, tmp_path / "crashed")
    assert losses(tmp_path / "crashed") == losses(tmp_path / "straight")
    assert differing(contents(resumed), contents(straight)) == []


def test_a_run_that_never_reached_a_checkpoint_starts_again(tmp_path: Path):
    run = recipe("llama")
    trained(run, tmp_path / "straight")
    with pytest.raises(ConnectionAbortedError):
        trained(run, tmp_path / "crashed", CrashAt(4))
    trained(run, tmp_path / "crashed")
    assert losses(tmp_path / "crashed") == losses(tmp_path / "straight")


def test_a_finished_run_trains_no_further_and_writes_its_model_again(tmp_path: Path):
    run = recipe("llama")
    trained(run, tmp_path)
    before = losses(tmp_path)
    shutil.rmtree(tmp_path / "model")
    again = Trainer(run, tmp_path)
    assert again.finished
    again.run()
    assert losses(tmp_path) == before
    assert differing(lw.load(tmp_path / "model").state_dict(), again.model.state_dict()) == []


def test_how_often_a_run_logs_and_saves_can_be_changed_on_the_way(tmp_path: Path):
    straight = trained(recipe("llama"), tmp_path / "straight")
    with pytest.raises(Interrupted):
        trained(recipe("llama", keep=1, checkpoint_every=1), tmp_path / "changed", StopAt(3))
    assert [one.step for one in checkpoints.complete(tmp_path / "changed" / "checkpoints")] == [3]
    changes = {"log_every": 5, "checkpoint_every": 2, "keep": 3, "deterministic": True}
    changed = trained(recipe("llama", **changes), tmp_path / "changed")
    assert [one.step for one in checkpoints.complete(tmp_path / "changed" / "checkpoints")] == [4, 6, 8]
    assert [entry["step"] for entry in losses(tmp_path / "changed")] == [1, 2, 3, 4, 5, 8]
    assert differing(contents(changed), contents(straight)) == []


def test_determinism_is_put_back_as_it_was():
    """The run's own switch, as it is on a GPU; what it is for is tested there (`tests/ops/test_gpu.py`)."""
    before = torch.get_deterministic_debug_mode(), torch.utils.deterministic.fill_uninitialized_memory
    with deterministic(True):
        assert torch.get_deterministic_debug_mode() == 2
        assert not torch.utils.deterministic.fill_uninitialized_memory
    assert (torch.get_deterministic_debug_mode(), torch.utils.deterministic.fill_uninitialized_memory) == before


# --- checkpoints ------------------------------------------------------------------------------------------------------


@every_model
def test_a_checkpoint_is_a_model_folder(tmp_path: Path, model: str):
    trainer = trained(recipe(model), tmp_path)
    newest = checkpoints.newest(tmp_path / "checkpoints")
    assert newest is not None
    for folder in (newest.path, tmp_path / "model"):
        loaded = lw.load(folder)
        assert differing(loaded.state_dict(), trainer.model.state_dict()) == []
        assert loaded.tokenizer is not None
        assert loaded.tokenizer.fingerprint == trainer.data.tokenizer.fingerprint
        trainer.model.tokenizer = trainer.data.tokenizer
        assert lw.generate(loaded, "def ", max_new_tokens=20) == lw.generate(trainer.model, "def ", max_new_tokens=20)


@pytest.mark.parametrize(
    ("table", "change", "named"),
    [
        ("optimizer", {"kind": "scaled_adam", "lr": 0.01}, r"optimizer\.lr = 0\.03 there, 0\.01 here"),
        ("training", {"seed": 3}, r"training\.seed = 0 there, 3 here"),
        ("training", {"steps": 2 * STEPS}, rf"training\.steps = {STEPS} there, {2 * STEPS} here"),
        ("model", {"norm_eps": 1e-6}, r"model\.norm_eps = 1e-05 there, 1e-06 here"),
        ("schedule", {"kind": "constant", "warmup_steps": 2}, r"schedule\.final = 0\.1 there, None here"),
    ],
)
def test_a_checkpoint_of_another_recipe_is_refused_naming_the_field(
    tmp_path: Path, table: str, change: Any, named: str
):
    with pytest.raises(Interrupted):
        trained(recipe("llama"), tmp_path, StopAt(2))
    other = runs.values("llama")
    other[table] = {**other[table], **change} if table in ("training", "model") else change
    with pytest.raises(UserError, match=named):
        Trainer(build(Recipe, other, "tests"), tmp_path)


def test_a_checkpoint_of_another_tokenizer_is_refused(tmp_path: Path):
    shutil.copytree(runs.prepared(), tmp_path / "data")
    plain = runs.values("llama") | {"data": {"folder": str(tmp_path / "data")}}
    run = build(Recipe, plain, "tests")
    with pytest.raises(Interrupted):
        trained(run, tmp_path / "run", StopAt(2))
    shutil.rmtree(tmp_path / "data")
    prepare(runs.corpus(), tmp_path / "data", vocab_size=290, held_out=0.3, seed=1)
    with pytest.raises(UserError, match="trained with another tokenizer"):
        Trainer(run, tmp_path / "run")


def test_data_whose_tokenizer_was_changed_is_refused(tmp_path: Path):
    """A tokenizer of the same size is found out by its checksum."""
    shutil.copytree(runs.prepared(), tmp_path / "data")
    path = tmp_path / "data" / "tokenizer.json"
    text = path.read_text(encoding="utf8")
    swapped = text.replace('"#": 4,', '"#": 5,').replace('"$": 5,', '"$": 4,')
    assert swapped != text
    path.write_text(swapped, encoding="utf8")
    run = build(Recipe, runs.values("llama") | {"data": {"folder": str(tmp_path / "data")}}, "tests")
    with pytest.raises(UserError, match=r"tokenizer\.json is damaged"):
        Trainer(run, tmp_path / "run")


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "trainer.json", files.MANIFEST])
def test_a_flipped_bit_in_the_newest_checkpoint_is_refused(tmp_path: Path, name: str):
    with pytest.raises(ConnectionAbortedError):
        trained(recipe("llama", checkpoint_every=2), tmp_path, CrashAt(5))
    flip_bit(tmp_path / "checkpoints" / "step-00000004" / name)
    with pytest.raises(UserError, match=f"{name}.*damaged.*remove the folder to go on from an earlier one"):
        Trainer(recipe("llama", checkpoint_every=2), tmp_path)


def test_a_cut_or_missing_file_in_the_newest_checkpoint_is_refused_until_it_is_removed(tmp_path: Path):
    run = recipe("llama", checkpoint_every=2)
    with pytest.raises(ConnectionAbortedError):
        trained(run, tmp_path, CrashAt(5))
    newest = tmp_path / "checkpoints" / "step-00000004"
    os.truncate(newest / "optimizer.safetensors", 100)
    with pytest.raises(UserError, match=r"optimizer\.safetensors has 100 bytes"):
        Trainer(run, tmp_path)
    (newest / files.MANIFEST).unlink()
    with pytest.raises(UserError, match=files.MANIFEST):
        Trainer(run, tmp_path)
    shutil.rmtree(newest)
    assert Trainer(run, tmp_path).step == 2


# --- what a step computes ---------------------------------------------------------------------------------------------


@every_optimizer
@pytest.mark.parametrize("micro", [1, 2])
def test_accumulating_micro_batches_is_one_batch(tmp_path: Path, optimizer: str, micro: int):
    whole, parts = (recipe("llama", optimizer, micro_windows=size, steps=4) for size in (None, micro))
    one, other = in_double(whole, tmp_path / "whole"), in_double(parts, tmp_path / "parts")
    assert furthest(contents(one), contents(other)) == 0
    before = {name: tensor.clone() for name, tensor in contents(one).items()}
    one.run(), other.run()
    assert furthest(contents(one), contents(other)) < 1e-9
    assert furthest(contents(one), before) > 1e-3
    first, second = losses(tmp_path / "whole"), losses(tmp_path / "parts")
    assert all(abs(a["loss"] - b["loss"]) < 2e-6 for a, b in zip(first, second, strict=True))  # added up in fp32


def test_accumulating_in_fp32_is_one_batch_up_to_rounding(tmp_path: Path):
    one = trained(recipe("llama", "adamw", steps=3), tmp_path / "whole")
    other = trained(recipe("llama", "adamw", steps=3, micro_windows=1), tmp_path / "parts")
    for name, tensor in one.optimizer.tensors().items():
        torch.testing.assert_close(other.optimizer.tensors()[name], tensor, rtol=1e-3, atol=1e-7)


def draws_that_matter(micro: int | None) -> Recipe:
    """At a retention of 0.3, weights above zero are discarded from the first step on, and the draws show in the loss.

    The Balancer and the bypass limiter, which act on a whole forward, are off.
    """
    values = runs.values("published", "adamw", micro_windows=micro, steps=3)
    values["model"] |= {
        "layout": "F subllm(0.3: F subllm(0.3: F) F) F",
        "subllm": {"balancer": False, "bypass_probability": 0.0},
    }
    return build(Recipe, values, "tests")


@pytest.mark.parametrize("micro", [1, 2])
def test_draws_do_not_depend_on_the_micro_batch_that_a_window_is_in(tmp_path: Path, micro: int):
    one, other = in_double(draws_that_matter(None), tmp_path / "a"), in_double(draws_that_matter(micro), tmp_path / "b")
    one.run(), other.run()
    first, second = losses(tmp_path / "a"), losses(tmp_path / "b")
    assert max(abs(a["loss"] - b["loss"]) for a, b in zip(first, second, strict=True)) < 2e-6  # added up in fp32
    assert furthest(contents(one), contents(other)) < 1e-9


def test_draws_that_depend_on_the_place_in_a_batch_would_show(tmp_path: Path, monkeypatch):
    """The control of the test above."""
    keys, places = subllm.window_keys, lambda ids: torch.arange(len(ids))
    monkeypatch.setattr(subllm, "window_keys", lambda seed, step, part, ids: keys(seed, step, part, places(ids)))
    one, other = in_double(draws_that_matter(None), tmp_path / "a"), in_double(draws_that_matter(1), tmp_path / "b")
    one.run(), other.run()
    assert furthest(contents(one), contents(other)) > 1e-5


def gradients(trainer: Trainer, recompute: bool) -> tuple[float, dict[str, torch.Tensor], int]:
    """Loss and gradients of the first batch, and how often mixers ran forward."""
    calls: list[None] = []
    hooks = [b.mixer.register_forward_pre_hook(lambda *_: calls.append(None)) for b in trainer.model.blocks]
    trainer.model.checkpoint_blocks(recompute)
    trainer.model.set_step(0)
    trainer.model.zero_grad()
    loss = trainer.model.loss(*trainer.data.batch(range(4)).inputs("cpu"))
    loss.backward()
    for hook in hooks:
        hook.remove()
    found = {name: weight.grad for name, weight in trainer.model.named_parameters() if weight.grad is not None}
    return float(loss.detach()), {name: grad.clone() for name, grad in found.items()}, len(calls)


@every_model
def test_recomputing_changes_no_bit_of_losses_and_gradients(tmp_path: Path, model: str):
    trainer = Trainer(recipe(model), tmp_path / "one")
    loss, grads, calls = gradients(trainer, recompute=False)
    again, same, twice = gradients(trainer, recompute=True)
    assert (loss, twice) == (again, 2 * calls)
    assert differing(grads, same) == []
    plain = trained(recipe(model), tmp_path / "plain")
    recomputed = trained(recipe(model, recompute=True), tmp_path / "recomputed")
    assert losses(tmp_path / "plain") == losses(tmp_path / "recomputed")
    assert differing(contents(plain), contents(recomputed)) == []


@every_model
def test_bf16_trains_close_to_fp32_over_fp32_weights(tmp_path: Path, model: str):
    trained(recipe(model, "adamw"), tmp_path / "fp32")
    trainer = trained(recipe(model, "adamw", precision="bf16"), tmp_path / "bf16")
    assert {weight.dtype for weight in trainer.model.parameters()} == {torch.float32}
    pairs = list(zip(losses(tmp_path / "fp32"), losses(tmp_path / "bf16"), strict=True))
    assert all(abs(a["loss"] - b["loss"]) < 0.005 * a["loss"] for a, b in pairs)
    assert any(a["loss"] != b["loss"] for a, b in pairs)
    assert losses(tmp_path / "bf16")[-1]["held_out_loss"] < losses(tmp_path / "bf16")[0]["loss"]


def test_the_default_schedule_and_logging_reach_every_step(tmp_path: Path):
    run = recipe("published", "adamw", log_every=3, evaluate_every=0)
    trained(run, tmp_path)
    entries = read_metrics(tmp_path / "metrics.jsonl")
    assert [entry["step"] for entry in entries] == [1, 3, 6, 8]
    assert [entry["lr_scale"] for entry in entries] == [run.schedule.scale(e["step"] - 1, 0, STEPS) for e in entries]
    assert all(entry["tokens"] == entry["step"] * 4 * runs.WINDOW for entry in entries)
    assert ["held_out_loss" in entry for entry in entries] == [False, False, False, True]
    assert all(len(entry["positive"]) == 2 for entry in entries[1:])
    assert entries[-1]["held_out_loss"] < entries[0]["loss"]


def test_tensorboard_gets_every_number_of_every_step(tmp_path: Path):
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    with pytest.raises(ConnectionAbortedError):
        trained(recipe("published", tensorboard=True, checkpoint_every=2), tmp_path, CrashAt(5))
    trained(recipe("published", tensorboard=True, checkpoint_every=2), tmp_path)
    assert list((tmp_path / "tensorboard").glob("events.out.tfevents.*"))
    events = event_accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    logged = losses(tmp_path)
    for name in ("loss", "grad_norm", "lr_scale"):
        scalars = events.Scalars(name)
        assert [one.step for one in scalars] == list(range(1, STEPS + 1))
        assert [one.value for one in scalars] == pytest.approx([entry[name] for entry in logged], rel=1e-6)
    levels = [one.value for one in events.Scalars("positive/1")]
    assert levels == pytest.approx([entry["positive"][1] for entry in logged])
    assert len(events.Scalars("held_out_loss")) == 2


# --- real signals, through the command line ---------------------------------------------------------------------------


def command(path: Path, output: Path) -> list[str]:
    return [sys.executable, "-m", "longwave", "train", str(path), "--output", str(output)]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


def finish(path: Path, output: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(path, output), env=environment(), capture_output=True, text=True, timeout=300)


def interrupt(path: Path, output: Path, number: int, after: int) -> tuple[int, str]:
    """Starts a run, sends it a signal once it has logged `after` steps, and gives its exit code and stderr."""
    process = subprocess.Popen(command(path, output), env=environment(), stderr=subprocess.PIPE, text=True)
    while len(read_metrics(output / "metrics.jsonl")) < after and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(number)
    _, errors = process.communicate(timeout=120)
    return process.returncode, errors


SIGNAL_STEPS = 150


@pytest.fixture(scope="module")
def signal_recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recipes")
    run = {"steps": SIGNAL_STEPS, "checkpoint_every": 20, "evaluate_every": 0, "batch_windows": 8}
    return write_recipe(folder / "signals.toml", "causal", **run)


@pytest.fixture(scope="module")
def uninterrupted(signal_recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("runs") / "straight"
    assert finish(signal_recipe, output).returncode == 0
    return output


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_signal_costs_nothing(signal_recipe: Path, uninterrupted: Path, tmp_path: Path, number: signal.Signals):
    code, errors = interrupt(signal_recipe, tmp_path / "run", number, after=25)
    saved = checkpoints.newest(tmp_path / "run" / "checkpoints")
    assert saved is not None
    reached = len(losses(tmp_path / "run"))
    assert 25 <= reached < SIGNAL_STEPS
    if number == signal.SIGKILL:
        assert (code, saved.step) == (-signal.SIGKILL, 20 * (saved.step // 20))
    else:
        line = f"longwave: stopped after step {saved.step}; the same command continues from there"
        assert (code, saved.step, errors.splitlines()[-1]) == (130, reached, line)
    assert not (tmp_path / "run" / "model").exists()
    assert finish(signal_recipe, tmp_path / "run").returncode == 0
    assert losses(tmp_path / "run") == losses(uninterrupted)
    for file in ("model/model.safetensors", f"checkpoints/step-{SIGNAL_STEPS:08d}/optimizer.safetensors"):
        assert (tmp_path / "run" / file).read_bytes() == (uninterrupted / file).read_bytes()


@pytest.mark.slow
def test_compiled_feed_forwards_train_close_to_plain_ones(tmp_path: Path):
    """In a process of its own: the tests' shape checks cannot be compiled."""
    for name in ("plain", "compiled"):
        run = {"steps": 3, "compile": name == "compiled"}
        path = write_recipe(tmp_path / f"{name}.toml", "published", "adamw", **run)
        assert finish(path, tmp_path / name).returncode == 0
    pairs = list(zip(losses(tmp_path / "plain"), losses(tmp_path / "compiled"), strict=True))
    assert len(pairs) == 3
    assert all(abs(a["loss"] - b["loss"]) < 1e-4 for a, b in pairs)
