"""longwave.files: no flipped bit, cut file or full disk lets half a save pass for a whole one."""

import errno
import os
import random
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from files_disk import FailingDisk
from files_folders import NAMES, content, hidden, save, version_of

from longwave import files
from longwave.errors import MachineError, UserError
from longwave.files import leftovers, storage
from longwave.training import checkpoints


@pytest.fixture(autouse=True)
def real_disk() -> Iterator[None]:
    """Whatever a test did to the disk, the next one starts with the real one."""
    yield
    storage.disk = storage.Disk()


def test_importing_does_not_import_torch():
    imports = "import sys, longwave.files, longwave.training.checkpoints"
    code = f"{imports}; print('torch' in sys.modules, 'numpy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False False\n"


# --- damage -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    save(tmp_path / "model")
    return tmp_path / "model"


def some_file(path: Path, draw: random.Random) -> Path:
    return path / draw.choice([*NAMES, files.MANIFEST])


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
            files.verify(saved)
        file.write_bytes(good)
    assert files.verify(saved)


def test_every_bit_of_the_manifest_is_guarded(tmp_path: Path):
    saved = tmp_path / "small"
    with files.folder(saved) as staging:
        (staging / "x").write_text("x")
    file = saved / files.MANIFEST
    good = file.read_bytes()
    for bit in range(8 * len(good)):
        bad = bytearray(good)
        bad[bit // 8] ^= 1 << bit % 8
        file.write_bytes(bad)
        with pytest.raises(UserError):
            files.verify(saved, full=False)


@pytest.mark.parametrize("full", [True, False])
def test_a_cut_or_grown_file_is_refused_and_its_step_is_not_complete(full: bool, tmp_path: Path):
    draw = random.Random(1)
    save(checkpoints.step_folder(tmp_path, 1))
    path = checkpoints.step_folder(tmp_path, 2)
    save(path)
    for _ in range(100):
        file = some_file(path, draw)
        good = file.read_bytes()
        file.write_bytes(draw.choice([good[: draw.randrange(len(good))], good + b"\0"]))
        with pytest.raises(UserError, match=file.name):
            files.verify(path, full=full)
        assert [step for step, _ in checkpoints.complete(tmp_path)] == [1]
        file.write_bytes(good)
    assert [step for step, _ in checkpoints.complete(tmp_path)] == [1, 2]


@pytest.mark.parametrize("name", NAMES)
def test_a_missing_file_is_refused_by_name(saved: Path, name: str):
    (saved / name).unlink()
    with pytest.raises(UserError, match=f"{name} is missing"):
        files.verify(saved, full=False)


@pytest.mark.parametrize("raw", [b"", b"{}", b"[]", b"null", b"\xff", b"[" * 100_000, b'{"version": 1, "files": 3}'])
def test_a_garbled_manifest_is_refused_and_not_overwritten(saved: Path, raw: bytes):
    (saved / files.MANIFEST).write_bytes(raw)
    with pytest.raises(UserError, match=r"manifest\.json is damaged"):
        files.verify(saved)
    with pytest.raises(UserError, match=r"manifest\.json is damaged"):
        save(saved)


def test_another_version_of_the_format_is_refused(saved: Path):
    file = saved / files.MANIFEST
    file.write_bytes(file.read_bytes().replace(b'"version": 1', b'"version": 2'))
    with pytest.raises(UserError, match="has version 2; this longwave reads version 1"):
        files.verify(saved)


def test_an_extra_weight_file_is_refused_and_another_extra_file_is_not(saved: Path):
    (saved / "notes.txt").write_text("mine")
    assert files.verify(saved)
    (saved / "optimizer" / "more.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match=r"more\.safetensors was not saved"):
        files.verify(saved, full=False)


def test_weights_in_a_subfolder_of_somebody_else_are_none_of_ours(saved: Path):
    (saved / "checkpoint-5").mkdir()
    (saved / "checkpoint-5" / "model.safetensors").write_bytes(b"")
    assert files.verify(saved)


def test_files_join_a_folder_that_holds_others(saved: Path, tmp_path: Path):
    (saved / "notes.txt").write_text("mine")
    for path in (saved, tmp_path / "new"):
        with files.add_to(path) as staging:
            storage.disk.write(staging / "config.json", b"other")
        assert (path / "config.json").read_bytes() == b"other"
        assert hidden(tmp_path) == []
    assert os.listdir(tmp_path / "new") in (["config.json", "manifest.json"], ["manifest.json", "config.json"])
    assert (saved / "notes.txt").read_text() == "mine"
    assert (saved / "optimizer/part-0").read_bytes() == content("optimizer/part-0", 0)
    with pytest.raises(UserError, match=r"model\.safetensors was not saved with this folder"):
        files.verify(saved)  # the files before were nobody's to keep track of
    (saved / "model.safetensors").unlink()
    assert files.verify(saved)


def test_sizes_alone_do_not_read_content(saved: Path):
    (saved / "config.json").write_bytes(content("config.json", 0).swapcase())
    assert files.verify(saved, full=False)
    with pytest.raises(UserError, match=r"config\.json is damaged"):
        files.verify(saved)


# --- a machine that fails ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EIO])
def test_a_failing_operation_is_one_line_and_changes_nothing(code: int, tmp_path: Path):
    """Each operation fails once: before the swap the old folder stands, after it the new one; nothing lies around."""
    for operation in range(1000):
        path = tmp_path / str(operation) / "model"
        save(path)
        storage.disk = disk = FailingDisk(operation, code)
        outcome = outcome_of_saving(path, code)
        storage.disk = storage.Disk()
        assert version_of(path) == (0 if "nothing was changed" in outcome else 1)
        if "nothing was changed" in outcome:
            assert hidden(path.parent) == []
        files.sweep(path.parent)
        assert hidden(path.parent) == []
        if disk.count <= operation:
            break
    assert operation > 15
    assert outcome == "saved"


def outcome_of_saving(path: Path, code: int) -> str:
    try:
        save(path, version=1)
    except MachineError as error:
        message = str(error)
    else:
        return "saved"
    assert "\n" not in message
    assert str(path) in message
    assert os.strerror(code) in message
    assert ("nothing was changed" in message) != ("the new folder is in place" in message)
    return message


FULL = {
    "in the caller's write": "(staging / 'model.safetensors').write_bytes(bytes(100_000))",
    "in safetensors": "import numpy, safetensors.numpy as st; "
    "st.save_file({'x': numpy.zeros(100_000)}, staging / 'model.safetensors')",
    "in the manifest": "[(staging / f'{i}').write_bytes(b'x') for i in range(400)]",
}


@pytest.mark.parametrize("write", FULL.values(), ids=FULL.keys())
def test_a_file_that_the_machine_cannot_hold(saved: Path, write: str):
    """A real failure: the process may not write files of more than 20,000 bytes."""
    code = (
        "import resource, sys; from pathlib import Path; from longwave import files, errors\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))\n"
        "try:\n"
        "    with files.folder(sys.argv[1]) as staging:\n"
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
    for failure in (KeyboardInterrupt, FileNotFoundError, ValueError):
        with pytest.raises(failure), files.folder(saved) as staging:  # noqa: PT012
            (staging / "config.json").write_text("half")
            raise failure
    assert version_of(saved) == 0
    assert hidden(saved.parent) == []


# --- what may be overwritten, and what may be in it -------------------------------------------------------------------


def test_a_foreign_folder_is_unverified_and_never_overwritten(tmp_path: Path):
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text("{}")
    assert files.verify(tmp_path / "hf") is False
    with pytest.raises(UserError, match="longwave did not write"):
        save(tmp_path / "hf")
    assert os.listdir(tmp_path) == ["hf"]
    assert os.listdir(tmp_path / "hf") == ["config.json"]


def test_a_folder_that_became_foreign_during_the_save_is_not_overwritten(tmp_path: Path):
    with pytest.raises(UserError, match="longwave did not write"), files.folder(tmp_path / "out"):  # noqa: PT012
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
    with pytest.raises(UserError, match="it exists"), files.folder(saved, overwrite=False):
        raise AssertionError("it is refused before anything is written")
    assert version_of(saved) == 0


def test_overwriting_replaces_the_whole_folder_and_follows_links(saved: Path):
    link = saved.with_name("link")
    link.symlink_to(saved)
    with files.folder(link) as staging:
        (staging / "only.txt").write_text("new")
    assert sorted(os.listdir(saved)) == [files.MANIFEST, "only.txt"]
    assert link.is_symlink()
    assert hidden(saved.parent) == []


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600), (0o027, 0o640)])
def test_files_have_the_rights_that_the_umask_gives(tmp_path: Path, umask: int, mode: int):
    """Also those that were written for the owner alone, as safetensors does."""
    before = os.umask(umask)
    try:
        with files.folder(tmp_path / "saved") as staging:
            (staging / "sub").mkdir()
            for name in ("model.safetensors", "sub/one"):
                os.close(os.open(staging / name, os.O_CREAT, 0o600))
    finally:
        os.umask(before)
    found = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "saved").rglob("*") if path.is_file()}
    assert found == {"model.safetensors": mode, "one": mode, files.MANIFEST: mode}


def test_a_link_that_is_pruned_leaves_what_it_leads_to(tmp_path: Path):
    """Checkpoints kept elsewhere, and linked to from the folder of the run."""
    for step in (1, 2):
        save(tmp_path / "run" / f"step-{step:08d}", 0)
    (tmp_path / "run" / "step-00000001").rename(tmp_path / "kept")
    (tmp_path / "run" / "step-00000001").symlink_to(tmp_path / "kept")
    assert [step for step, _ in checkpoints.prune(tmp_path / "run", keep=1)] == [1]
    assert os.listdir(tmp_path / "run") == ["step-00000002"]
    assert files.verify(tmp_path / "kept")


def test_a_leftover_of_any_name_is_swept(tmp_path: Path):
    for name in ("plain", "two\nlines", "a.partial-1-b", "é", ".hidden"):
        (tmp_path / f".{name}.partial-999999999-0123456789ab").mkdir()
    files.sweep(tmp_path)
    assert os.listdir(tmp_path) == []


def test_a_writer_of_another_container_with_the_same_number_is_left_alone(tmp_path: Path, monkeypatch):
    """Its staging folder is held; once it is killed, nothing is, and the folder is swept."""
    code = (
        "import sys, time; from longwave import files\n"
        "with files.folder(sys.argv[1]) as staging: print(staging, flush=True); time.sleep(60)"
    )
    writer = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "a")], stdout=subprocess.PIPE, text=True)
    assert writer.stdout is not None
    staging = Path(writer.stdout.readline().strip())
    monkeypatch.setattr("longwave.files.leftovers.os.getpid", lambda: writer.pid)
    files.sweep(tmp_path)
    assert staging.is_dir()
    writer.kill()
    writer.wait()
    files.sweep(tmp_path)
    assert not staging.exists()


def test_parents_are_made(tmp_path: Path):
    save(tmp_path / "a" / "b" / "c")
    assert version_of(tmp_path / "a" / "b" / "c") == 0


def test_only_plain_files_can_be_saved(tmp_path: Path):
    with pytest.raises(UserError, match="link: it is not a plain file"), files.folder(tmp_path / "out") as staging:
        (staging / "link").symlink_to("/etc/hostname")
    with pytest.raises(UserError, match="the name is that of longwave"), files.folder(tmp_path / "out") as staging:
        (staging / files.MANIFEST).write_text("{}")
    assert os.listdir(tmp_path) == []


def test_a_folder_that_is_not_there(tmp_path: Path):
    with pytest.raises(UserError, match="there is no folder"):
        files.verify(tmp_path / "nothing")
    assert checkpoints.complete(tmp_path / "nothing") == []
    assert checkpoints.newest(tmp_path / "nothing") is None


# --- one file ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_a_file_is_written_whole_or_not_at_all(code: int, tmp_path: Path):
    """Each operation fails once: before the rename the old file stands, after it the new one; nothing lies around."""
    for operation in range(1000):
        path = tmp_path / str(operation) / "new" / "results.json"
        files.write_file(path, b"old")
        storage.disk = disk = FailingDisk(operation, code)
        outcome = ""
        try:
            files.write_file(path, b"new")
        except MachineError as error:
            outcome = str(error)
        storage.disk = storage.Disk()
        assert path.read_bytes() == (b"old" if "nothing was changed" in outcome else b"new")
        assert os.listdir(path.parent) == ["results.json"]
        if disk.count <= operation:
            break
    assert operation > 3
    assert outcome == ""


def test_a_file_is_not_written_over_a_folder(saved: Path):
    with pytest.raises(UserError, match="it is a folder, not a file"):
        files.write_file(saved, b"new")
    assert version_of(saved) == 0
    assert hidden(saved.parent) == []


def test_what_a_dead_writer_left_of_a_file_is_swept(tmp_path: Path):
    left = tmp_path / ".results.json.partial-999999999-0123456789ab"
    left.write_bytes(b"half")
    files.write_file(tmp_path / "results.json", b"whole")
    assert os.listdir(tmp_path) == ["results.json"]


# --- the living -------------------------------------------------------------------------------------------------------


def test_leftovers_of_the_dead_are_swept_and_those_of_the_living_are_not(tmp_path: Path):
    with subprocess.Popen(["sleep", "60"]) as living:
        for kind in ("partial", "trash", "old"):
            leftover = tmp_path / f".model.{kind}-{living.pid}-0123456789ab"
            leftover.mkdir()
            (leftover / "part").write_text("x")
        (tmp_path / ".cache").mkdir()
        files.sweep(tmp_path)
        assert len(hidden(tmp_path)) == 4
        living.kill()
    files.sweep(tmp_path)
    assert os.listdir(tmp_path) == [".cache"]


def test_a_save_under_way_in_this_process_is_not_swept_and_one_of_an_earlier_life_is(tmp_path: Path):
    earlier = tmp_path / f".model.partial-{os.getpid()}-0123456789ab"  # a restarted container has the same process id
    earlier.mkdir()
    with files.folder(tmp_path / "model") as staging:
        assert not earlier.exists()
        (staging / "config.json").write_text("{}")
        files.sweep(tmp_path)
        assert (staging / "config.json").exists()
    assert os.listdir(tmp_path) == ["model"]


@pytest.mark.parametrize("pid", [999999999, None], ids=["no number here", "our own number"])
def test_a_save_in_another_container_is_not_swept(tmp_path: Path, pid: int | None):
    """There a living process has a number that here is nobody's, or one's own; it holds a lock on what it writes."""
    leftover = tmp_path / f".model.partial-{pid or os.getpid()}-0123456789ab"
    leftover.mkdir()
    code = "import fcntl, os, sys; fcntl.flock(os.open(sys.argv[1], os.O_RDONLY), fcntl.LOCK_SH); print(); input()"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", code, str(leftover)], **pipes) as other:
        assert other.stdout is not None
        other.stdout.readline()
        files.sweep(tmp_path)
        assert leftover.exists()
        other.kill()
    files.sweep(tmp_path)
    assert not leftover.exists()


def test_a_folder_that_is_written_is_held(tmp_path: Path):
    with files.folder(tmp_path / "model") as staging:
        assert leftovers.being_written(tmp_path / "model")
        (staging / "config.json").write_text("{}")
        code = "import sys; from longwave import files; files.sweep(sys.argv[1])"
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(leftovers, "_ACTIVE", set())  # as another process sees it that has our number
            assert leftovers.being_written(tmp_path / "model")
        subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)
        assert staging.exists()
    assert not leftovers.being_written(tmp_path / "model")


def test_leftovers_with_odd_names_are_swept(tmp_path: Path):
    for name in ("two\nlines", "a.b", "ключ", os.fsdecode(b"\xff\xfe")):
        (tmp_path / f".{name}.partial-999999999-0123456789ab").mkdir()
    files.sweep(tmp_path)
    assert os.listdir(tmp_path) == []


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
    assert files.recover(saved) is False
    writer.join()
    assert version_of(saved) == 1
    assert old.exists()


def test_a_reader_puts_back_what_a_stuck_writer_displaced(saved: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(leftovers, "_PATIENCE", 0.05)
    displaced(saved, os.getppid())
    assert version_of(saved) == 0


@pytest.mark.parametrize("tidy", [files.recover, lambda saved: files.sweep(saved.parent)], ids=["recover", "sweep"])
def test_what_a_dead_writer_displaced_is_put_back_and_not_swept(saved: Path, tidy: Callable[[Path], object]):
    displaced(saved, 999999999)
    tidy(saved)
    assert os.listdir(saved.parent) == [saved.name]
    assert version_of(saved) == 0


def test_a_half_deleted_old_folder_is_not_put_back(saved: Path):
    (displaced(saved, 999999999) / files.MANIFEST).unlink()
    assert files.recover(saved) is False
    with pytest.raises(UserError, match="there is no folder"):
        files.verify(saved)
    files.sweep(saved.parent)
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
    assert checkpoints.step_folder("runs", 100) == Path("runs/step-00000100")
    for step in (100, 20, 100_000_000, 3):
        save(checkpoints.step_folder(tmp_path, step))
    save(tmp_path / "step-7")
    (tmp_path / "step-00000300").mkdir()
    (tmp_path / "step-00000400").write_text("a file")
    assert [step for step, _ in checkpoints.complete(tmp_path)] == [3, 20, 100, 100_000_000]
    assert checkpoints.newest(tmp_path) == (100_000_000, tmp_path / "step-100000000")


def test_prune_keeps_the_newest_complete_ones(tmp_path: Path):
    for step in range(1, 6):
        save(checkpoints.step_folder(tmp_path, step))
    (checkpoints.step_folder(tmp_path, 5) / "config.json").unlink()
    assert [step for step, _ in checkpoints.prune(tmp_path, keep=2)] == [1, 2]
    assert sorted(os.listdir(tmp_path)) == ["step-00000003", "step-00000004", "step-00000005"]
    assert checkpoints.prune(tmp_path, keep=2) == []
    with pytest.raises(UserError, match="keep = 0"):
        checkpoints.prune(tmp_path, keep=0)


@pytest.mark.parametrize("by_link", [False, True])
def test_what_is_no_regular_file_is_not_replaced_by_one(tmp_path: Path, by_link: bool):
    """A pipe stands for devices too: whoever may write to the folder of /dev/null would lose it to a page."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("pipe")
    with pytest.raises(UserError, match="a device or a pipe"):
        files.write_file(tmp_path / ("link" if by_link else "pipe"), b"content")
    assert (tmp_path / "pipe").is_fifo()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "pipe"]
