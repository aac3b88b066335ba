"""longwave.durable: no crash, power cut, kill, flipped bit or full disk loses a save or lets half of one pass for a whole."""

import errno
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import durable_child as child
import pytest
from durable_disk import Crash, CrashingDisk, FailingDisk

from longwave import durable
from longwave.errors import MachineError, UserError

NAMES = ("model.safetensors", "config.json", "optimizer/part-0")


def content(name: str, version: int) -> bytes:
    return f"{name} {version} ".encode() * 50


def save(path: Path, version: int = 0) -> None:
    with durable.folder(path) as staging:
        durable.disk.mkdir(staging / "optimizer")
        for name in NAMES:
            durable.disk.write(staging / name, content(name, version))


def version_of(path: Path) -> int:
    """The version of a whole folder, every byte of which is looked at."""
    assert durable.verify(path)
    version = int((path / "config.json").read_text().split()[1])
    assert all((path / name).read_bytes() == content(name, version) for name in NAMES)
    return version


def hidden(root: Path) -> list[str]:
    return sorted(name for name in os.listdir(root) if name.startswith("."))


@pytest.fixture(autouse=True)
def real_disk() -> Iterator[None]:
    """Whatever a test did to the disk, the next one starts with the real one."""
    yield
    durable.disk = durable.Disk()


# --- a crash at every operation ---------------------------------------------------------------------------------------

Kept = dict[int, int]  # step: version


class Scenario:
    """Folders that exist, what is then done, and what stands when it is done."""

    def __init__(self, before: Kept, act: Callable[[Path], object], after: Kept) -> None:
        self.before, self.act, self.after = before, act, after

    def prepare(self, root: Path) -> None:
        for step, version in self.before.items():
            save(durable.step_folder(root, step), version)


def saving(step: int, version: int) -> Callable[[Path], None]:
    return lambda root: save(durable.step_folder(root, step), version)


def save_and_prune(root: Path) -> None:
    saving(4, 0)(root)
    durable.prune(root, 2)


SCENARIOS = {
    "very first save": Scenario({}, saving(1, 0), {1: 0}),
    "next save": Scenario({1: 0}, saving(2, 0), {1: 0, 2: 0}),
    "overwrite": Scenario({1: 0, 2: 0}, saving(2, 1), {1: 0, 2: 1}),
    "prune": Scenario({1: 0, 2: 0, 3: 0, 4: 0}, lambda root: durable.prune(root, 2), {3: 0, 4: 0}),
    "save and prune": Scenario({1: 0, 2: 0, 3: 0}, save_and_prune, {3: 0, 4: 0}),
}


def crashes(scenario: Scenario, root: Path, disk: CrashingDisk) -> bool:
    """Play the scenario on `disk`; whether it crashed."""
    durable.disk = disk
    crash_at, disk.crash_at = disk.crash_at, None
    root.mkdir()
    scenario.prepare(root)
    disk.crash_at = None if crash_at is None else disk.count + crash_at
    try:
        scenario.act(root)
    except Crash:
        return True
    finally:
        durable.disk = durable.Disk()
    return False


def check_nothing_lost(scenario: Scenario, root: Path, finished: bool) -> None:
    found = {step: version_of(path) for step, path in durable.checkpoints(root)}
    assert {durable.step_folder(root, step).name for step in found} == set(os.listdir(root)) - set(hidden(root))
    if finished:
        assert found == scenario.after
    for step in scenario.before.keys() & scenario.after.keys():
        assert found[step] in (scenario.before[step], scenario.after[step])
    for step in found:
        assert found[step] in (scenario.before.get(step), scenario.after.get(step))


def check_next_save(root: Path) -> None:
    save(durable.step_folder(root, 9), 7)
    durable.sweep(root)
    newest = durable.newest(root)
    assert newest is not None
    assert (newest.step, version_of(newest.path)) == (9, 7)
    assert hidden(root) == []


def crash_everywhere(scenario: Scenario, tmp_path: Path, power_cut: bool, **how) -> int:
    """Play the scenario with a crash at its first, second, ... operation until it gets through; how many it has."""
    for operation in range(1000):
        root = tmp_path / str(operation)
        disk = CrashingDisk(operation, **how)
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
    assert (
        operations >= 12
    )  # each save has three files and a manifest to write and sync; prune has two folders to empty


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
@pytest.mark.parametrize("scenario", ["next save", "overwrite"])
def test_the_power_cut_test_notices_a_missing_sync(scenario: str, forgets, tmp_path: Path):
    with pytest.raises((AssertionError, UserError, KeyError)):
        crash_everywhere(SCENARIOS[scenario], tmp_path, power_cut=True, forgets=forgets)


@pytest.mark.parametrize("exchanges", [True, False], ids=["exchange", "two renames"])
def test_a_crash_while_recovering_from_a_crash_loses_nothing(exchanges, tmp_path: Path):
    first = SCENARIOS["overwrite"]
    trials = 0
    for operation in range(1000):
        for again in range(1000):
            root = tmp_path / f"{operation}-{again}"
            crashed = crashes(first, root, CrashingDisk(operation, exchanges=exchanges))
            second_crashed = resave(root, CrashingDisk(again, exchanges=exchanges))
            version = version_of(durable.newest(root).path)  # type: ignore[union-attr]
            assert version in ((0, 1, 2) if second_crashed else (2,))
            trials += 1
            if not second_crashed:
                check_next_save(root)
                break
        if not crashed:
            break
    assert trials > 200


def resave(root: Path, disk: CrashingDisk) -> bool:
    durable.disk = disk
    try:
        saving(2, 2)(root)
    except Crash:
        return True
    finally:
        durable.disk = durable.Disk()
    return False


# --- kill -9 ----------------------------------------------------------------------------------------------------------


def kill_once(root: Path, state: Path, seed: int) -> int:
    """Let a child save for a random while, kill it, and give the phase it died in."""
    draw = random.Random(seed)
    way = draw.choice(["exchange", "renames"])
    state.write_bytes(bytes(child.STATE.size))
    command = [sys.executable, "-S", "-c", CHILD, str(root), str(state), str(seed), way]
    with subprocess.Popen(
        command, cwd=Path(__file__).parent, env={"PYTHONPATH": str(Path(__file__).parents[1])}
    ) as dying:
        while state.read_bytes() == bytes(child.STATE.size) and dying.poll() is None:
            time.sleep(0.001)
        time.sleep(draw.uniform(0, 0.05))
        dying.kill()
    assert dying.returncode == -signal.SIGKILL, "the child failed by itself"
    return child.STATE.unpack(state.read_bytes())[0]


CHILD = "import runpy; runpy.run_path('durable_child.py', run_name='__main__')"


def check_after_kill(root: Path, state: Path) -> None:
    _, step, version = child.STATE.unpack(state.read_bytes())
    newest = durable.newest(root)
    if newest is None:
        assert step == 0, "a save that returned is gone"
        return
    assert (newest.step, child_version(newest)) >= (step, version), "a save that returned is gone"
    for checkpoint in durable.checkpoints(root):
        child_version(checkpoint)


def child_version(checkpoint: durable.Checkpoint) -> int:
    assert durable.verify(checkpoint.path)
    version = int((checkpoint.path / "version").read_text())
    for name in ("model.safetensors", "optimizer/part-0", "optimizer/part-1"):
        assert (checkpoint.path / name).read_bytes() == child.content(name, checkpoint.step, version)
    return version


@pytest.mark.parametrize(("kills", "inside"), [(25, 12), (200, 100)])
def test_kill_9_loses_nothing(kills: int, inside: int, tmp_path: Path):
    """At least `kills` kills, of which `inside` fell within a save: it goes on until both are reached."""
    root, state = tmp_path / "runs", tmp_path / "state"
    root.mkdir()
    died_in: Counter[int] = Counter()
    while died_in.total() < kills or died_in[child.WRITING] + died_in[child.COMMITTING] < inside:
        died_in[kill_once(root, state, seed=died_in.total())] += 1
        check_after_kill(root, state)
        assert died_in.total() < 5 * kills, f"too few kills fell within a save: {died_in}"
    durable.sweep(root)
    assert hidden(root) == []
    assert died_in[child.COMMITTING] > 0
    assert len(durable.checkpoints(root)) in (child.KEEP, child.KEEP + 1)
    print(
        f"killed: {died_in[child.WRITING]} writing, {died_in[child.COMMITTING]} committing, "
        f"{died_in[child.PRUNING]} pruning, {died_in[child.IDLE]} between"
    )


def test_importing_does_not_import_torch():
    code = "import sys, longwave.durable; print('torch' in sys.modules, 'numpy' in sys.modules)"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        == "False False\n"
    )


# --- damage -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    save(tmp_path / "model")
    return tmp_path / "model"


def some_file(path: Path, draw: random.Random) -> Path:
    return path / draw.choice([*NAMES, durable.MANIFEST])


def test_a_flipped_bit_anywhere_is_refused(saved: Path):
    draw = random.Random(0)
    for _ in range(1000):
        file = some_file(saved, draw)
        good = file.read_bytes()
        bit = draw.randrange(8 * len(good))
        bad = bytearray(good)
        bad[bit // 8] ^= 1 << bit % 8
        file.write_bytes(bad)
        with pytest.raises(UserError, match=file.name):
            durable.verify(saved)
        file.write_bytes(good)
    assert durable.verify(saved)


def test_every_bit_of_the_manifest_is_guarded(saved: Path):
    file = saved / durable.MANIFEST
    good = file.read_bytes()
    for bit in range(8 * len(good)):
        bad = bytearray(good)
        bad[bit // 8] ^= 1 << bit % 8
        file.write_bytes(bad)
        with pytest.raises(UserError):
            durable.verify(saved, full=False)


@pytest.mark.parametrize("full", [True, False])
def test_a_cut_or_grown_file_is_refused_and_its_step_is_not_complete(full: bool, tmp_path: Path):
    draw = random.Random(1)
    save(durable.step_folder(tmp_path, 1))
    path = durable.step_folder(tmp_path, 2)
    save(path)
    for _ in range(100):
        file = some_file(path, draw)
        good = file.read_bytes()
        file.write_bytes(draw.choice([good[: draw.randrange(len(good))], good + b"\0"]))
        with pytest.raises(UserError, match=file.name):
            durable.verify(path, full=full)
        assert [step for step, _ in durable.checkpoints(tmp_path)] == [1]
        file.write_bytes(good)
    assert [step for step, _ in durable.checkpoints(tmp_path)] == [1, 2]


@pytest.mark.parametrize("name", NAMES)
def test_a_missing_file_is_refused_by_name(saved: Path, name: str):
    (saved / name).unlink()
    with pytest.raises(UserError, match=f"{name} is missing"):
        durable.verify(saved, full=False)


@pytest.mark.parametrize("raw", [b"", b"{}", b"[]", b"null", b"\xff", b"[" * 100_000, b'{"version": 1, "files": 3}'])
def test_a_garbled_manifest_is_refused_and_not_overwritten(saved: Path, raw: bytes):
    (saved / durable.MANIFEST).write_bytes(raw)
    with pytest.raises(UserError, match=r"manifest\.json is damaged"):
        durable.verify(saved)
    with pytest.raises(UserError, match=r"manifest\.json is damaged"):
        save(saved)


def test_another_version_of_the_format_is_refused(saved: Path):
    file = saved / durable.MANIFEST
    file.write_bytes(file.read_bytes().replace(b'"version": 1', b'"version": 2'))
    with pytest.raises(UserError, match="has version 2; this longwave reads version 1"):
        durable.verify(saved)


def test_an_extra_weight_file_is_refused_and_another_extra_file_is_not(saved: Path):
    (saved / "notes.txt").write_text("mine")
    assert durable.verify(saved)
    (saved / "optimizer" / "more.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match="more.safetensors was not saved"):
        durable.verify(saved, full=False)


def test_sizes_alone_do_not_read_content(saved: Path):
    (saved / "config.json").write_bytes(content("config.json", 0).swapcase())
    assert durable.verify(saved, full=False)
    with pytest.raises(UserError, match=r"config\.json is damaged"):
        durable.verify(saved)


# --- a machine that fails ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EIO])
def test_a_failing_operation_is_one_line_and_changes_nothing(code: int, tmp_path: Path):
    """Each operation fails once: before the swap the old folder stands, after it the new one, and nothing lies around."""
    for operation in range(1000):
        path = tmp_path / str(operation) / "model"
        save(path)
        durable.disk = disk = FailingDisk(operation, code)
        outcome = outcome_of_saving(path, code)
        durable.disk = durable.Disk()
        assert version_of(path) == (0 if "nothing was changed" in outcome else 1)
        if "nothing was changed" in outcome:
            assert hidden(path.parent) == []
        durable.sweep(path.parent)
        assert hidden(path.parent) == []
        if disk.count <= operation:
            break
    assert operation > 15
    assert outcome == "saved"


def outcome_of_saving(path: Path, code: int) -> str:
    try:
        save(path, version=1)
    except MachineError as error:
        assert "\n" not in str(error)
        assert str(path) in str(error)
        assert os.strerror(code) in str(error)
        assert ("nothing was changed" in str(error)) != ("the new folder is in place" in str(error))
        return str(error)
    return "saved"


FULL = {
    "in the caller's write": "(staging / 'model.safetensors').write_bytes(bytes(100_000))",
    "in safetensors": "import numpy, safetensors.numpy as st; "
    "st.save_file({'x': numpy.zeros(100_000)}, staging / 'model.safetensors')",
    "in the manifest": "[(staging / f'{i}').write_bytes(b'x') for i in range(2_000)]",
}


@pytest.mark.parametrize("write", FULL.values(), ids=FULL.keys())
def test_a_file_that_the_machine_cannot_hold(saved: Path, write: str):
    """A real failure: the process may not write files of more than 20,000 bytes."""
    code = (
        "import resource, sys; from pathlib import Path; from longwave import durable, errors\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))\n"
        "try:\n"
        "    with durable.folder(sys.argv[1]) as staging:\n"
        f"        {write}\n"
        "except errors.MachineError as error:\n"
        "    print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(saved)], capture_output=True, text=True, check=True)
    assert done.stdout.startswith(f"saving {saved} failed: File too large")
    assert done.stdout.endswith("nothing was changed\n")
    assert done.stdout.count("\n") == 1
    assert version_of(saved) == 0
    assert hidden(saved.parent) == []


def test_any_other_exception_passes_and_changes_nothing(saved: Path):
    with pytest.raises(KeyboardInterrupt), durable.folder(saved) as staging:
        (staging / "config.json").write_text("half")
        raise KeyboardInterrupt
    with pytest.raises(FileNotFoundError), durable.folder(saved) as staging:
        (staging / "nowhere" / "config.json").write_text("half")
    assert version_of(saved) == 0
    assert hidden(saved.parent) == []


# --- what may be overwritten, and what may be in it -------------------------------------------------------------------


def test_a_foreign_folder_is_unverified_and_never_overwritten(tmp_path: Path):
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text("{}")
    assert durable.verify(tmp_path / "hf") is False
    with pytest.raises(UserError, match="longwave did not write"):
        save(tmp_path / "hf")
    assert os.listdir(tmp_path) == ["hf"]
    assert os.listdir(tmp_path / "hf") == ["config.json"]


def test_a_folder_that_became_foreign_during_the_save_is_not_overwritten(tmp_path: Path):
    with pytest.raises(UserError, match="longwave did not write"), durable.folder(tmp_path / "out"):
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "thesis.tex").write_text("mine")
    assert (tmp_path / "out" / "thesis.tex").read_text() == "mine"
    assert os.listdir(tmp_path) == ["out"]


def test_files_are_never_overwritten_and_empty_folders_may_be(tmp_path: Path):
    (tmp_path / "file").write_text("mine")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UserError, match="is a file, not a folder"):
            save(path)
    (tmp_path / "empty").mkdir()
    save(tmp_path / "empty")
    assert version_of(tmp_path / "empty") == 0


def test_overwriting_can_be_forbidden(saved: Path):
    with pytest.raises(UserError, match="it exists"), durable.folder(saved, overwrite=False):
        raise AssertionError("it is refused before anything is written")
    assert version_of(saved) == 0


def test_overwriting_replaces_the_whole_folder_and_follows_links(saved: Path):
    link = saved.with_name("link")
    link.symlink_to(saved)
    with durable.folder(link) as staging:
        (staging / "only.txt").write_text("new")
    assert sorted(os.listdir(saved)) == [durable.MANIFEST, "only.txt"]
    assert link.is_symlink()
    assert hidden(saved.parent) == []


def test_parents_are_made(tmp_path: Path):
    save(tmp_path / "a" / "b" / "c")
    assert version_of(tmp_path / "a" / "b" / "c") == 0


def test_only_plain_files_can_be_saved(tmp_path: Path):
    with pytest.raises(UserError, match="link: it is not a plain file"), durable.folder(tmp_path / "out") as staging:
        (staging / "link").symlink_to("/etc/hostname")
    with pytest.raises(UserError, match="the name is reserved"), durable.folder(tmp_path / "out") as staging:
        (staging / durable.MANIFEST).write_text("{}")
    assert os.listdir(tmp_path) == []


def test_a_folder_that_is_not_there(tmp_path: Path):
    with pytest.raises(UserError, match="there is no folder"):
        durable.verify(tmp_path / "nothing")
    assert durable.checkpoints(tmp_path / "nothing") == []
    assert durable.newest(tmp_path / "nothing") is None


# --- the living -------------------------------------------------------------------------------------------------------


def test_leftovers_of_the_dead_are_swept_and_those_of_the_living_are_not(tmp_path: Path):
    with subprocess.Popen(["sleep", "60"]) as living:
        for kind in ("partial", "trash", "old"):
            leftover = tmp_path / f".model.{kind}-{living.pid}-0123456789ab"
            leftover.mkdir()
            (leftover / "part").write_text("x")
        (tmp_path / ".cache").mkdir()
        durable.sweep(tmp_path)
        assert len(hidden(tmp_path)) == 4
        living.kill()
    durable.sweep(tmp_path)
    assert os.listdir(tmp_path) == [".cache"]


def test_a_save_under_way_in_this_process_is_not_swept_and_one_of_an_earlier_life_is(tmp_path: Path):
    earlier = tmp_path / f".model.partial-{os.getpid()}-0123456789ab"  # a restarted container has the same process id
    earlier.mkdir()
    with durable.folder(tmp_path / "model") as staging:
        assert not earlier.exists()
        (staging / "config.json").write_text("{}")
        durable.sweep(tmp_path)
        assert (staging / "config.json").exists()
    assert os.listdir(tmp_path) == ["model"]


def test_saving_sweeps_only_its_own_name(tmp_path: Path):
    other = tmp_path / ".other.partial-999999999-0123456789ab"  # on a shared disk it may live on another machine
    other.mkdir()
    save(tmp_path / "model")
    assert other.exists()


def displaced(saved: Path, pid: int) -> Path:
    """What a writer with this process id leaves between its two renames."""
    path = saved.with_name(f".{saved.name}.old-{pid}-0123456789ab")
    return saved.rename(path)


def test_a_reader_waits_for_a_living_writer(saved: Path):
    old = displaced(saved, os.getppid())
    writer = threading.Timer(0.2, lambda: (save(saved.with_name("new"), 1), saved.with_name("new").rename(saved)))
    writer.start()
    assert durable.recover(saved) is False
    writer.join()
    assert version_of(saved) == 1
    assert old.exists()


def test_a_reader_puts_back_what_a_stuck_writer_displaced(saved: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(durable, "_PATIENCE", 0.05)
    displaced(saved, os.getppid())
    assert version_of(saved) == 0


def test_a_half_deleted_old_folder_is_not_put_back(saved: Path):
    (displaced(saved, 999999999) / durable.MANIFEST).unlink()
    assert durable.recover(saved) is False
    with pytest.raises(UserError, match="there is no folder"):
        durable.verify(saved)
    durable.sweep(saved.parent)
    assert os.listdir(saved.parent) == []


def test_there_is_a_folder_at_every_instant_of_an_exchange(saved: Path):
    absent = threading.Event()
    done = threading.Event()

    def watch() -> None:
        while not done.is_set():
            if not saved.is_dir():
                absent.set()

    watcher = threading.Thread(target=watch)
    watcher.start()
    for version in range(100):
        save(saved, version)
    done.set()
    watcher.join()
    assert not absent.is_set()


# --- steps ------------------------------------------------------------------------------------------------------------


def test_steps_are_named_and_ordered_by_number(tmp_path: Path):
    assert durable.step_folder("runs", 100) == Path("runs/step-00000100")
    for step in (100, 20, 100_000_000, 3):
        save(durable.step_folder(tmp_path, step))
    save(tmp_path / "step-7")
    save(tmp_path / "best-00000200")
    (tmp_path / "step-00000300").mkdir()
    (tmp_path / "step-00000400").write_text("a file")
    assert [step for step, _ in durable.checkpoints(tmp_path)] == [3, 20, 100, 100_000_000]
    assert durable.newest(tmp_path) == (100_000_000, tmp_path / "step-100000000")
    assert durable.newest(tmp_path, "best-") == (200, tmp_path / "best-00000200")


def test_prune_keeps_the_newest_complete_ones(tmp_path: Path):
    for step in range(1, 6):
        save(durable.step_folder(tmp_path, step))
    (durable.step_folder(tmp_path, 5) / "config.json").unlink()
    assert [step for step, _ in durable.prune(tmp_path, keep=2)] == [1, 2]
    assert sorted(os.listdir(tmp_path)) == ["step-00000003", "step-00000004", "step-00000005"]
    assert durable.prune(tmp_path, keep=2) == []
    with pytest.raises(UserError, match="keep=0"):
        durable.prune(tmp_path, keep=0)
