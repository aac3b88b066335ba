"""A run is tied to its folder, to its data and to itself; the times it tells are those that passed."""

from __future__ import annotations

import errno
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import runs
from runs import CrashAt, StopAt, contents, differing, losses, recipe, trained, write_recipe

from longwave import files
from longwave.cli import main
from longwave.config import build
from longwave.data.shards import prepare
from longwave.errors import MachineError, UserError
from longwave.training import checkpoints
from longwave.training.clock import Clock, Seconds, read_seconds
from longwave.training.loop import Interrupted, Trainer
from longwave.training.metrics import read_metrics
from longwave.training.notes import FolderWindows, notes
from longwave.training.recipe import Recipe

# --- the lock ---------------------------------------------------------------------------------------------------------

HOLD = """
import sys, time
from longwave import files
with files.locked(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""


@contextmanager
def holder(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that holds the lock of a folder."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def test_a_lock_excludes_processes_and_other_parts_of_this_one_and_leaves_nothing(tmp_path: Path):
    held = r"run: process {} on .* is writing to it; wait until it ends"
    with holder(tmp_path / "run") as process, pytest.raises(UserError, match=held.format(process.pid)):
        files.locked(tmp_path / "run").__enter__()
    with files.locked(tmp_path / "run"):
        with pytest.raises(UserError, match=held.format(os.getpid())):
            files.locked(tmp_path / "run").__enter__()
        (tmp_path / "run" / "file").touch()
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["file"]
    with files.locked(tmp_path / "new"):
        pass
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("kind", ["link", "link to nothing", "pipe", "folder"])
def test_a_lock_is_a_file_and_empties_no_other(tmp_path: Path, kind: str):
    """As a run folder of somebody else could have it: what a link leads to stays as it is."""
    (tmp_path / "mine").write_text("precious")
    (tmp_path / "run").mkdir()
    lock = tmp_path / "run" / ".lock"
    {
        "link": lambda: lock.symlink_to(tmp_path / "mine"),
        "link to nothing": lambda: lock.symlink_to(tmp_path / "nothing"),
        "pipe": lambda: os.mkfifo(lock),
        "folder": lock.mkdir,
    }[kind]()
    with pytest.raises(UserError, match=r"run/\.lock: no regular file.*; remove it"):
        files.locked(tmp_path / "run").__enter__()
    assert (tmp_path / "mine").read_text() == "precious"
    assert not (tmp_path / "nothing").exists()


@pytest.mark.parametrize("name", ["metrics.jsonl", "times.json", "report.html"])
@pytest.mark.parametrize("there", [True, False])
def test_nothing_is_written_through_a_link(tmp_path: Path, name: str, there: bool):
    (tmp_path / "run").mkdir()
    if there:
        (tmp_path / "mine").write_text("precious")
    (tmp_path / "run" / name).symlink_to(tmp_path / "mine")
    with pytest.raises(UserError, match=rf"run/{name}: a link or no regular file"):
        trained(recipe("llama", steps=3), tmp_path / "run")
    assert (tmp_path / "mine").exists() == there
    assert not there or (tmp_path / "mine").read_text() == "precious"


def test_a_pipe_in_the_place_of_a_log_is_refused(tmp_path: Path):
    (tmp_path / "run").mkdir()
    os.mkfifo(tmp_path / "run/metrics.jsonl")
    with pytest.raises(UserError, match=r"run/metrics\.jsonl: a link or no regular file"):
        trained(recipe("llama", steps=3), tmp_path / "run")


def test_checkpoints_may_lie_on_another_disk(tmp_path: Path):
    (tmp_path / "run").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "run/checkpoints").symlink_to(tmp_path / "elsewhere")
    trained(recipe("llama", steps=3), tmp_path / "run")
    assert list((tmp_path / "elsewhere").glob("step-*"))


def test_a_lock_dies_with_its_process(tmp_path: Path):
    with holder(tmp_path) as process:
        process.send_signal(signal.SIGKILL)
        process.wait()
        with files.locked(tmp_path):
            assert (tmp_path / ".lock").read_text().startswith(f"process {os.getpid()} on ")


def test_a_file_system_without_locks_is_told_of_and_used(tmp_path: Path, monkeypatch):
    def none(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("longwave.files.lock.fcntl.flock", none)
    with pytest.warns(UserWarning, match="has no locks; a second run in it would not be noticed"):
        trained(recipe("llama", steps=3), tmp_path / "run")


def test_many_at_once_get_the_lock_one_at_a_time(tmp_path: Path):
    """Each adds one to a number, which would lose some if two ever held the lock together."""
    code = (
        "import sys, pathlib; from longwave import files\n"
        "from longwave.errors import UserError\n"
        "done, path = 0, pathlib.Path(sys.argv[1])\n"
        "while done < 50:\n"
        "    try:\n"
        "        with files.locked(path):\n"
        "            number = path / 'number'; number.write_text(str(int(number.read_text()) + 1)); done += 1\n"
        "    except UserError: pass\n"
    )
    (tmp_path / "number").write_text("0")
    processes = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path)]) for _ in range(4)]
    assert [process.wait() for process in processes] == [0] * 4
    assert (tmp_path / "number").read_text() == "200"


def test_the_second_run_in_a_folder_gets_one_line_and_the_first_goes_on(tmp_path: Path, refuses):
    path = write_recipe(tmp_path / "r.toml", "llama")
    refused: list[str] = []

    class Second:
        def record(self, entry: dict[str, Any]) -> None:
            if entry["step"] in (1, 5):
                refused.append(refuses("train", path, "--output", tmp_path / "run", says=["is writing to it"]))

        def close(self) -> None:
            pass

    first = trained(recipe("llama", checkpoint_every=2), tmp_path / "run", Second())
    straight = trained(recipe("llama", checkpoint_every=2), tmp_path / "straight")
    assert len(refused) == 2
    assert losses(tmp_path / "run") == losses(tmp_path / "straight")
    assert differing(contents(first), contents(straight)) == []
    assert sorted(os.listdir(tmp_path / "run")) == ["checkpoints", "metrics.jsonl", "model", "times.json"]


def test_a_trainer_that_was_made_before_another_run_went_on_is_refused(tmp_path: Path):
    early = Trainer(recipe("llama"), tmp_path)
    with pytest.raises(Interrupted):
        trained(recipe("llama"), tmp_path, StopAt(3))
    with pytest.raises(UserError, match="has gone on from step 0 to 3 since it was read"):
        early.run()
    assert len(losses(tmp_path)) == 3


@pytest.mark.parametrize("how", ["moved", "deleted", "moved and made again"])
def test_a_folder_that_is_moved_away_ends_the_run_in_one_line(tmp_path: Path, refuses, monkeypatch, how: str):
    path, run, away = (
        write_recipe(tmp_path / "r.toml", "llama", checkpoint_every=2),
        tmp_path / "run",
        tmp_path / "away",
    )

    class Move(StopAt):
        def record(self, entry: dict[str, Any]) -> None:
            if entry["step"] == 5:
                shutil.rmtree(run) if how == "deleted" else run.rename(away)
                if how == "moved and made again":
                    run.mkdir()

    monkeypatch.setattr("longwave.verbs.TrainingProgress", lambda *_: Move(5))
    says = [str(run), "was moved or deleted while it was written to", "the same command goes on"]
    refuses("train", path, "--output", run, says=says, code=1)
    assert not run.exists() or not any(run.iterdir())
    if how != "deleted":
        shutil.rmtree(run, ignore_errors=True)
        away.rename(run)
        monkeypatch.undo()
        assert main(["train", str(path), "--output", str(run)]) == 0
        trained(recipe("llama", checkpoint_every=2), tmp_path / "straight")
        assert losses(run) == losses(tmp_path / "straight")


# --- checkpoints that are not what their names say --------------------------------------------------------------------


def copied(folder: Path, step: int, name: int) -> Path:
    """A copy of a checkpoint under another step's name."""
    parent = folder / "checkpoints"
    shutil.copytree(checkpoints.step_folder(parent, step), copy := checkpoints.step_folder(parent, name))
    return copy


def test_a_copy_under_a_higher_number_is_refused_by_name(tmp_path: Path, refuses):
    path = write_recipe(tmp_path / "r.toml", "llama")
    with pytest.raises(Interrupted):
        trained(recipe("llama"), tmp_path / "run", StopAt(3))
    copy = copied(tmp_path / "run", 3, 7)
    refuses(
        "train", path, "--output", tmp_path / "run", says=[str(copy), "a checkpoint of step 3", "remove the folder"]
    )
    shutil.rmtree(copy)
    assert Trainer(recipe("llama"), tmp_path / "run").step == 3


def test_what_was_just_written_is_never_pruned(tmp_path: Path):
    class Copy(StopAt):
        def record(self, entry: dict[str, Any]) -> None:
            if entry["step"] == 3:
                copied(tmp_path, 2, 1000)

    trained(recipe("llama", checkpoint_every=2, keep=1), tmp_path, Copy(3))
    assert [one.step for one in checkpoints.complete(tmp_path / "checkpoints")] == [8, 1000]


def test_a_model_folder_among_the_checkpoints_is_refused_by_name(tmp_path: Path):
    trained(recipe("llama"), tmp_path)
    shutil.copytree(tmp_path / "model", checkpoints.step_folder(tmp_path / "checkpoints", 99))
    with pytest.raises(UserError, match=r"step-00000099: no checkpoint of a run \(no trainer.json"):
        Trainer(recipe("llama"), tmp_path)


# --- the data ---------------------------------------------------------------------------------------------------------


def on_data(folder: Path) -> Recipe:
    return build(Recipe, runs.values("llama") | {"data": {"folder": str(folder)}}, "tests")


def test_other_data_under_the_same_name_is_refused_and_what_changed_is_named(tmp_path: Path):
    shutil.copytree(runs.prepared(), tmp_path / "data")
    with pytest.raises(Interrupted):
        trained(on_data(tmp_path / "data"), tmp_path / "run", StopAt(2))
    prepare(runs.corpus(), tmp_path / "other", tokenizer=Trainer(recipe(), tmp_path / "x").data.tokenizer, held_out=0.5)
    shutil.rmtree(tmp_path / "data")
    (tmp_path / "other").rename(tmp_path / "data")
    with pytest.raises(
        UserError, match=r"other data than .*step-00000002 was trained on \(held_out/.* and \d more chang"
    ):
        Trainer(on_data(tmp_path / "data"), tmp_path / "run")


def test_the_same_data_at_another_place_goes_on_to_the_bit(tmp_path: Path):
    straight = trained(on_data(runs.prepared()), tmp_path / "straight")
    shutil.copytree(runs.prepared(), tmp_path / "data")
    with pytest.raises(Interrupted):
        trained(on_data(tmp_path / "data"), tmp_path / "run", StopAt(2))
    (tmp_path / "data").rename(tmp_path / "moved")
    resumed = trained(on_data(tmp_path / "moved"), tmp_path / "run")
    assert differing(contents(resumed), contents(straight)) == []


# --- the time that passed ---------------------------------------------------------------------------------------------


class Sleep(StopAt):
    """An observer that takes its time at a step."""

    def record(self, entry: dict[str, Any]) -> None:
        if entry["step"] == self.step:
            time.sleep(0.5)


def test_times_are_those_that_passed_over_all_sessions_a_killed_one_too(tmp_path: Path):
    """What a crash threw away was time as well: 0.5 s at step 2 (saved), 5 (lost) and 7."""
    run, started = recipe("llama", checkpoint_every=4), time.monotonic()
    with pytest.raises(ConnectionAbortedError):
        trained(run, tmp_path, Sleep(2), Sleep(5), CrashAt(7))
    os.remove(tmp_path / "times.json")  # as a kill leaves it: what the log knows is all there is
    trainer = trained(run, tmp_path, Sleep(7))
    found, passed = trainer.result().seconds, time.monotonic() - started
    assert 1.5 < found.training < found.total < passed
    assert found.evaluation > 0 < found.checkpoints
    assert found.total == pytest.approx(passed, abs=1.0)  # all but building the models
    logged = [entry["seconds"] for entry in read_metrics(tmp_path / "metrics.jsonl")]
    assert logged == sorted(logged)
    assert logged[-1] <= found.total
    Trainer(run, tmp_path).run()
    assert read_seconds(tmp_path) == found


def test_a_clock_tells_activities_apart(tmp_path: Path, monkeypatch):
    now = 0.0
    monkeypatch.setattr("longwave.training.clock.time.monotonic", lambda: now)
    clock = Clock(tmp_path)
    now = 3.0
    with clock.during("evaluation"):
        now = 5.0
        with clock.during("checkpoints"):
            now = 6.0
        now = 8.0
    now = 9.0
    assert clock.seconds == Seconds(training=4.0, evaluation=4.0, checkpoints=1.0)
    clock.save()
    now = 100.0
    assert Clock(tmp_path, logged=11.0).seconds == Seconds(training=6.0, evaluation=4.0, checkpoints=1.0)


def test_train_tells_the_time(tmp_path: Path, longwave):
    found = longwave("train", write_recipe(tmp_path / "r.toml", "llama"), "--output", tmp_path / "run", "--json")
    assert re.search(r"time: \d+ s of training, \d+ s of evaluation, \d+ s of checkpoints", found.out)
    assert found.json["seconds"] == json.loads((tmp_path / "run" / "times.json").read_text())


# --- files that a power cut or a person spoiled -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "spoiled", [b"\0" * 50, b"\xff\xfe\n", b"[1]\n3\nnull\n", b'{"loss": 1}\n', b'{"step": "x"}\n']
)
def test_spoiled_lines_of_the_log_are_left_out(tmp_path: Path, spoiled: bytes):
    with pytest.raises(Interrupted):
        trained(recipe("llama"), tmp_path, StopAt(4))
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(spoiled)
    trained(recipe("llama"), tmp_path)
    assert [entry["step"] for entry in losses(tmp_path)] == list(range(1, runs.STEPS + 1))


def test_a_finished_run_without_its_log_has_a_result(tmp_path: Path, longwave):
    path = write_recipe(tmp_path / "r.toml", "llama")
    assert longwave("train", path, "--output", tmp_path / "run").code == 0
    os.remove(tmp_path / "run" / "metrics.jsonl")
    again = longwave("train", path, "--output", tmp_path / "run", "--json")
    assert (again.code, again.json["step"], again.json["loss"]) == (0, runs.STEPS, None)


@pytest.mark.parametrize(
    "text", ['{"training": "x"}', '{"training": -1}', '{"other": 1}', "[]", "", '{"training": NaN}']
)
def test_times_that_are_none_are_refused_by_name(tmp_path: Path, refuses, text: str):
    path = write_recipe(tmp_path / "r.toml", "llama")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "times.json").write_text(text)
    refuses("train", path, "--output", tmp_path / "run", says=["times.json"])


# --- settings that do less than they seem to --------------------------------------------------------------------------

EDEN, CONSTANT = {"kind": "eden"}, {"kind": "constant", "warmup_steps": 20}


@pytest.mark.parametrize(
    ("changes", "schedule", "says"),
    [
        ({"steps": 500}, None, "goes through its 100 training windows 20.0 times"),
        ({"evaluate_windows": 50}, None, "evaluate_windows = 50: only 7 are held out, which all count"),
        ({"checkpoint_every": 9}, None, "checkpoint_every = 9: more than 8 steps, so it happens once, at the end"),
        ({"evaluate_every": 9}, None, "evaluate_every = 9: more than 8 steps"),
        ({}, EDEN, "schedule.warmup_steps = 500: the run of 8 steps ends before the full learning rate is reached"),
        ({}, CONSTANT, "schedule.warmup_steps = 20: .* give schedule.warmup_steps below 8, or more training.steps"),
    ],
)
def test_a_setting_that_does_less_than_it_seems_to_is_told(changes: Any, schedule: Any, says: str):
    values = runs.values("llama", **changes)
    run = build(Recipe, values | ({"schedule": schedule} if schedule else {}), "tests")
    (line,) = notes(run, [FolderWindows("data", 1.0, 100, 7)])
    assert re.search(says, line)


def test_a_schedule_of_levels_that_outlasts_the_run_is_told():
    values = runs.values("causal")
    (line,) = notes(build(Recipe, values, "tests"), [FolderWindows("data", 1.0, 100, 7)])
    assert line.startswith("model.subllm.bypass_steps = 20000: the run ends after 0% of them")
    values["model"] = values["model"] | {"subllm": {"selection": "causal", "bypass_steps": 8, "retention_steps": 10}}
    (line,) = notes(build(Recipe, values, "tests"), [FolderWindows("data", 1.0, 100, 7)])
    assert line.startswith("model.subllm.retention_steps = 10: the run ends after 80% of them, with more tokens kept")
    values["model"]["subllm"]["retention_steps"] = 8
    assert list(notes(build(Recipe, values, "tests"), [FolderWindows("data", 1.0, 100, 7)])) == []


def test_a_run_without_such_settings_has_no_notes():
    assert list(notes(recipe("llama"), [FolderWindows("data", 1.0, 100, 7)])) == []


@pytest.mark.parametrize("kind", ["cosine", "wsd"])
def test_a_warm_up_that_does_not_fit_names_its_key_and_the_remedy(kind: str):
    values = runs.values("llama") | {"schedule": {"kind": kind, "warmup_steps": 20}}
    says = (
        r"schedule\.warmup_steps = 20: a run of 8 steps; give schedule\.warmup_steps below \d, or more training\.steps"
    )
    with pytest.raises(UserError, match=says):
        build(Recipe, values, "tests")


def test_a_disk_that_fails_under_the_lock_is_one_line(tmp_path: Path):
    (tmp_path / "run").write_text("a file")
    with pytest.raises((MachineError, OSError)):
        Trainer(recipe("llama"), tmp_path / "run").run()


# --- attacks ----------------------------------------------------------------------------------------------------------


def _started(path: Path, output: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "longwave", "train", str(path), "--output", str(output)]
    return subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE, text=True)


def _holds(process: subprocess.Popen[str], folder: Path) -> bool:
    lock = folder / ".lock"
    return lock.exists() and lock.read_text().startswith(f"process {process.pid} on")


def _ended(process: subprocess.Popen[str]) -> str:
    """How a trainer ended: at its end, killed, or refused in one line because another one holds the folder."""
    _, errors = process.communicate(timeout=300)
    assert "Traceback" not in errors
    if process.returncode == 2:
        assert "is writing to it" in errors.splitlines()[-1] or "since it was read" in errors.splitlines()[-1]
        return "refused"
    assert process.returncode in (0, -signal.SIGKILL), errors
    return "killed" if process.returncode else "done"


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_trainers_that_fight_over_a_folder_and_are_killed_lose_nothing(tmp_path: Path, seed: int):
    """One is held at a random step while two others try; it is killed, and three start at once, until the end."""
    draw, output = random.Random(seed), tmp_path / "run"
    run = {"steps": 60, "checkpoint_every": 5, "keep": 1, "evaluate_every": 0}
    path = write_recipe(tmp_path / "r.toml", "causal", **run)
    for until in sorted(draw.sample(range(5, 55), 3)):
        leader = _started(path, output)
        while not (_holds(leader, output) and len(read_metrics(output / "metrics.jsonl")) >= until):
            assert leader.poll() is None
            time.sleep(0.01)
        leader.send_signal(signal.SIGSTOP)
        rivals = [_started(path, output) for _ in range(2)]
        assert [_ended(rival) for rival in rivals] == ["refused", "refused"]
        leader.kill()
        assert _ended(leader) == "killed"
    found = [_ended(process) for process in [_started(path, output) for _ in range(3)]]
    assert "done" in found
    trained(recipe("causal", **run), tmp_path / "straight")
    assert losses(output) == losses(tmp_path / "straight")
    for file in ("model/model.safetensors", "checkpoints/step-00000060/optimizer.safetensors"):
        assert (output / file).read_bytes() == (tmp_path / "straight" / file).read_bytes()
