"""longwave.files: a crash at any operation, a power cut at any operation and kill -9 at any moment lose nothing."""

import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import files_child as child
import pytest
from files_disk import Crash, CrashingDisk, InterruptedDisk
from files_folders import content, hidden, save, version_of

from longwave import files
from longwave.errors import UserError
from longwave.files import storage
from longwave.training import checkpoints


@pytest.fixture(autouse=True)
def real_disk() -> Iterator[None]:
    """Whatever a test did to the disk, the next one starts with the real one."""
    yield
    storage.disk = storage.Disk()


# --- a crash at every operation ---------------------------------------------------------------------------------------

Kept = dict[int, int]  # step: version


class Scenario:
    """Folders that exist, what is then done, and what stands when it is done."""

    def __init__(self, before: Kept, act: Callable[[Path], object], after: Kept) -> None:
        self.before, self.act, self.after = before, act, after

    def prepare(self, root: Path) -> None:
        for step, version in self.before.items():
            save(checkpoints.step_folder(root, step), version)


def saving(step: int, version: int) -> Callable[[Path], None]:
    return lambda root: save(checkpoints.step_folder(root, step), version)


def save_and_prune(root: Path) -> None:
    saving(4, 0)(root)
    checkpoints.prune(root, 2)


SCENARIOS = {
    "very first save": Scenario({}, saving(1, 0), {1: 0}),
    "next save": Scenario({1: 0}, saving(2, 0), {1: 0, 2: 0}),
    "overwrite": Scenario({1: 0, 2: 0}, saving(2, 1), {1: 0, 2: 1}),
    "prune": Scenario({1: 0, 2: 0, 3: 0, 4: 0}, lambda root: checkpoints.prune(root, 2), {3: 0, 4: 0}),
    "save and prune": Scenario({1: 0, 2: 0, 3: 0}, save_and_prune, {3: 0, 4: 0}),
}


def crashes(scenario: Scenario, root: Path, disk: CrashingDisk) -> bool:
    """Play the scenario on `disk`; whether it crashed."""
    storage.disk = disk
    crash_at, disk.crash_at = disk.crash_at, None
    root.mkdir()
    scenario.prepare(root)
    disk.crash_at = None if crash_at is None else disk.count + crash_at
    try:
        scenario.act(root)
    except (Crash, KeyboardInterrupt):
        return True
    finally:
        storage.disk = storage.Disk()
    return False


def check_nothing_lost(scenario: Scenario, root: Path, finished: bool) -> None:
    found = {step: version_of(path) for step, path in checkpoints.complete(root)}
    assert {checkpoints.step_folder(root, step).name for step in found} == set(os.listdir(root)) - set(hidden(root))
    if finished:
        assert found == scenario.after
    for step in scenario.before.keys() & scenario.after.keys():
        assert found[step] in (scenario.before[step], scenario.after[step])
    for step in found:
        assert found[step] in (scenario.before.get(step), scenario.after.get(step))


def check_next_save(root: Path) -> None:
    save(checkpoints.step_folder(root, 9), 7)
    files.sweep(root)
    newest = checkpoints.newest(root)
    assert newest is not None
    assert (newest.step, version_of(newest.path)) == (9, 7)
    assert hidden(root) == []


def crash_everywhere(
    scenario: Scenario, tmp_path: Path, power_cut: bool, kind: type[CrashingDisk] = CrashingDisk, **how
) -> int:
    """Play the scenario with a crash at its first, second, ... operation until it gets through; how many it has."""
    for operation in range(1000):
        root = tmp_path / str(operation)
        disk = kind(operation, **how)
        crashed = crashes(scenario, root, disk)
        if power_cut:
            disk.cut_power(root)
        check_nothing_lost(scenario, root, finished=not crashed)
        check_next_save(root)
        if not crashed:
            return operation
    raise AssertionError("the scenario never gets through")


@pytest.mark.parametrize("power_cut", [False, True], ids=["process dies", "power cut"])
@pytest.mark.parametrize("exchanges", [True, False], ids=["exchange", "two renames"])
@pytest.mark.parametrize("scenario", SCENARIOS.values(), ids=SCENARIOS.keys())
def test_a_crash_at_any_operation_loses_nothing(scenario: Scenario, exchanges, power_cut, tmp_path: Path):
    operations = crash_everywhere(scenario, tmp_path, power_cut, exchanges=exchanges)
    assert operations >= 8  # a save syncs four files, a prune empties two folders of four


@pytest.mark.parametrize("power_cut", [False, True], ids=["process dies", "power cut"])
def test_a_crash_at_any_operation_leaves_the_old_file_or_the_new_one(power_cut, tmp_path: Path):
    for operation in range(100):
        root = tmp_path / str(operation)
        root.mkdir()
        storage.disk = disk = CrashingDisk()
        files.write_file(root / "results.json", b"old")
        disk.crash_at = disk.count + operation
        try:
            files.write_file(root / "results.json", b"new")
        except Crash:
            crashed = True
        else:
            crashed = False
        if power_cut:
            disk.cut_power(root)
        storage.disk = storage.Disk()
        assert (root / "results.json").read_bytes() in ((b"old", b"new") if crashed else (b"new",))
        if not crashed:
            assert operation >= 4
            return
    raise AssertionError("it never gets through")


@pytest.mark.parametrize(
    "forgets",
    [
        lambda path: path.name == "model.safetensors",
        lambda path: path.name == "part-0",
        lambda path: path.name == "manifest.json",
        lambda path: path.name == "optimizer",
        lambda path: ".partial-" in path.name,
        lambda path: path.is_dir() and "step-" not in path.name and path.name != "optimizer",
    ],
    ids=["weights", "file in a subfolder", "manifest", "subfolder", "staging folder", "parent folder"],
)
@pytest.mark.parametrize("scenario", ["next save", "overwrite", "prune"])
def test_the_power_cut_test_notices_a_missing_sync(scenario: str, forgets, tmp_path: Path):
    with pytest.raises((AssertionError, UserError, KeyError)):
        crash_everywhere(SCENARIOS[scenario], tmp_path, power_cut=True, forgets=forgets)


FEW = ("model.safetensors", "config.json")


def save_few(path: Path, version: int) -> None:
    with files.add_to(path) as staging:
        for name in FEW:
            storage.disk.write(staging / name, content(name, version))


@pytest.mark.parametrize("power_cut", [False, True], ids=["process dies", "power cut"])
@pytest.mark.parametrize("ours", [False, True], ids=["files of others", "files of ours"])
def test_a_crash_while_files_are_changed_leaves_all_old_or_all_new_or_a_folder_that_is_refused(
    ours, power_cut, tmp_path: Path
):
    outcomes: list[str] = []
    for operation in range(1000):
        path = tmp_path / str(operation) / "model"
        storage.disk = disk = CrashingDisk()
        save(path)
        if not ours:
            (path / files.MANIFEST).unlink()
        disk.crash_at = disk.count + operation
        with suppress(Crash):
            save_few(path, 1)
        if power_cut:
            disk.cut_power(path.parent)
        storage.disk = storage.Disk()
        outcomes.append(outcome_of_few(path))
        assert (path / "optimizer/part-0").read_bytes() == content("optimizer/part-0", 0)
        save_few(path, 2)
        assert {(path / name).read_bytes() for name in FEW} == {content(name, 2) for name in FEW}
        if not disk.dead:
            break
    assert outcomes[-1] == "new"
    assert set(outcomes) == {"old", "refused", "new"}


def outcome_of_few(path: Path) -> str:
    try:
        files.verify(path)
    except UserError:
        return "refused"
    found = [next(v for v in (0, 1) if (path / name).read_bytes() == content(name, v)) for name in FEW]
    assert len(set(found)) == 1
    return ("old", "new")[found[0]]


@pytest.mark.parametrize("exchanges", [True, False], ids=["exchange", "two renames"])
def test_a_crash_while_recovering_from_a_crash_loses_nothing(exchanges, tmp_path: Path):
    first = SCENARIOS["overwrite"]
    trials = 0
    for operation in range(1000):
        for again in range(1000):
            root = tmp_path / f"{operation}-{again}"
            crashed = crashes(first, root, CrashingDisk(operation, exchanges=exchanges))
            second_crashed = resave(root, CrashingDisk(again, exchanges=exchanges))
            version = version_of(checkpoints.newest(root).path)  # type: ignore[union-attr]
            assert version in ((0, 1, 2) if second_crashed else (2,))
            trials += 1
            if not second_crashed:
                check_next_save(root)
                break
        if not crashed:
            break
    assert trials > 200


@pytest.mark.parametrize("exchanges", [True, False], ids=["exchange", "two renames"])
@pytest.mark.parametrize("scenario", ["next save", "overwrite", "prune"])
def test_an_interrupt_at_any_operation_and_then_a_power_cut_lose_nothing(scenario: str, exchanges, tmp_path: Path):
    crash_everywhere(SCENARIOS[scenario], tmp_path, power_cut=True, kind=InterruptedDisk, exchanges=exchanges)


def resave(root: Path, disk: CrashingDisk) -> bool:
    storage.disk = disk
    try:
        saving(2, 2)(root)
    except Crash:
        return True
    finally:
        storage.disk = storage.Disk()
    return False


# --- kill -9 ----------------------------------------------------------------------------------------------------------


def kill_once(root: Path, state: Path, seed: int) -> int:
    """Let a child save for a random while, kill it, and give the phase it died in."""
    draw = random.Random(seed)
    blank = bytes(child.STATE.size)
    state.write_bytes(blank)
    support = Path(child.__file__).parent
    arguments = [str(root), str(state), str(seed), draw.choice(["exchange", "renames"])]
    command = [sys.executable, "-S", str(support / "files_child.py"), *arguments]
    with subprocess.Popen(command, env={"PYTHONPATH": str(support.parents[1])}) as dying:
        while state.read_bytes() == blank and dying.poll() is None:
            time.sleep(0.001)
        time.sleep(draw.uniform(0, 0.05))
        dying.kill()
    assert dying.returncode == -signal.SIGKILL, "the child failed by itself"
    return child.STATE.unpack(state.read_bytes())[0]


def check_after_kill(root: Path, state: Path) -> None:
    _, returned = child.STATE.unpack(state.read_bytes())
    newest = checkpoints.newest(root)
    if newest is None:
        assert returned == 0, "a save that returned is gone"
        return
    assert child.one_number(newest.step, child_version(newest)) >= returned, "a save that returned is gone"
    for checkpoint in checkpoints.complete(root):
        child_version(checkpoint)


def child_version(checkpoint: checkpoints.Checkpoint) -> int:
    assert files.verify(checkpoint.path)
    version = int((checkpoint.path / "version").read_text())
    for name in ("model.safetensors", "optimizer/part-0", "optimizer/part-1"):
        assert (checkpoint.path / name).read_bytes() == child.content(name, checkpoint.step, version)
    return version


@pytest.mark.parametrize(("kills", "inside"), [(25, 12), (200, 100)])
def test_kill_9_loses_nothing(kills: int, inside: int, tmp_path: Path):
    """At least `kills` kills, of which `inside` fell within a save, and some saves that were left to end.

    It goes on until all are reached: on a busy machine many a process is killed before it has saved anything.
    """
    root, state = tmp_path / "runs", tmp_path / "state"
    root.mkdir()
    died_in: Counter[int] = Counter()
    while (
        died_in.total() < kills
        or died_in[child.WRITING] + died_in[child.COMMITTING] < inside
        or len(checkpoints.complete(root)) < child.KEEP
    ):
        died_in[kill_once(root, state, seed=died_in.total())] += 1
        check_after_kill(root, state)
        assert died_in.total() < 5 * kills, f"too few kills fell within a save: {died_in}"
    files.sweep(root)
    checkpoints.prune(root, child.KEEP)
    assert hidden(root) == []
    assert len(os.listdir(root)) == len(checkpoints.complete(root)) == child.KEEP
    print(
        f"killed: {died_in[child.WRITING]} writing, {died_in[child.COMMITTING]} committing, "
        f"{died_in[child.PRUNING]} pruning, {died_in[child.IDLE]} between"
    )
