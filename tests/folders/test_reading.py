"""Reading a folder: while it is written over, and with anything but regular files of reasonable size in it."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from model_folders import small
from overwriting_child import models
from safetensors.torch import save_file

import longwave
from longwave import files
from longwave.checkpoints import load, load_config, save
from longwave.errors import UserError
from longwave.files.jsonfile import object_in
from longwave.model import Decoder

ROOT = Path(__file__).resolve().parents[2]
WAYS = ["exchange", "rename", "merge"]

# --- while it is written over -----------------------------------------------------------------------------------------


def told(model: Decoder, way: str) -> tuple[Any, ...]:
    """All that a folder says of a model; what `save_pretrained` leaves alone (a tokenizer) is left out."""
    weights = tuple(round(float(weight.detach().double().sum()), 6) for weight in model.parameters())
    own = (model.config, weights, json.dumps(model.origin.generation))
    if way == "merge" or model.tokenizer is None:
        return own[:2]
    return (*own, model.tokenizer.fingerprint, model.tokenizer.chat_template)


def overwritten(folder: Path, times: int, way: str) -> dict[str, int]:
    """Loads a folder again and again while another process saves over it; counts of what was found."""
    originals = []
    for at, (model, tokenizer) in enumerate(models()):
        save(model, folder.with_name(f"original-{at}"), tokenizer=tokenizer)
        originals.append(told(longwave.load(folder.with_name(f"original-{at}")), way))
    counts = {"first": 0, "second": 0}
    command = [sys.executable, str(ROOT / "tests/support/overwriting_child.py"), str(folder), str(times), way]
    with subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(ROOT)}) as writer:
        while not folder.exists():
            time.sleep(0.001)
        while writer.poll() is None:
            found = told(longwave.load(folder), way)
            assert found in originals, "torn"
            counts["second" if found == originals[1] else "first"] += 1
            assert load_config(folder) in (originals[0][0], originals[1][0])
    assert writer.returncode == 0
    return counts


@pytest.mark.parametrize("way", WAYS)
def test_every_read_of_a_folder_that_is_written_over_is_one_model(tmp_path: Path, way: str):
    counts = overwritten(tmp_path / "m", 25, way)
    assert sum(counts.values()) > 2, counts


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_every_read_during_5000_overwrites_is_one_model(tmp_path: Path, way: str):
    counts = overwritten(tmp_path / "m", 5000, way)
    print(way, counts)
    assert sum(counts.values()) > 1000


def test_a_folder_that_is_gone_for_a_moment_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Hidden by the first of a writer's two renames, after a reader has seen that it is there."""
    save(small("2F"), tmp_path / "m")
    opened, hidden = os.open, tmp_path / f".m.old-{os.getpid()}-0123456789ab"

    def renamed_first(path: Any, *arguments: Any, **more: Any) -> int:
        if Path(path) == tmp_path / "m" and not hidden.exists() and (tmp_path / "m").exists():
            (tmp_path / "m").rename(hidden)
            monkeypatch.setattr(os, "open", opened)
        return opened(path, *arguments, **more)

    monkeypatch.setattr(os, "open", renamed_first)
    with files.OpenFolder(tmp_path / "m") as folder:
        assert "config.json" in folder
    with pytest.raises(UserError, match=r"there is no folder .*never"):
        files.OpenFolder(tmp_path / "never")


def test_a_folder_that_changes_while_it_is_read_is_read_again(tmp_path: Path):
    """By somebody who writes into the files themselves, as `transformers` does; and refused if that never ends."""
    (tmp_path / "a.json").write_text('{"version": 1}')
    reads = list[int]()

    def read(folder: files.OpenFolder) -> int:
        version = folder.object("a.json")["version"]
        reads.append(version)
        if len(reads) < 3:
            time.sleep(0.02)
            (tmp_path / "a.json").write_text(json.dumps({"version": version + 1}))
        return version

    assert files.read_whole(tmp_path, read) == 3
    assert reads == [1, 2, 3]


def test_what_is_wrong_with_a_folder_that_nobody_writes_to_is_said_at_once(tmp_path: Path):
    save(small(), tmp_path / "m")
    (tmp_path / "m/config.json").write_text("{}")
    begin = time.monotonic()
    with pytest.raises(UserError, match=r"config\.json has 2 bytes"):
        load(tmp_path / "m")
    assert time.monotonic() - begin < 1


def test_reading_leaves_no_descriptor_open(tmp_path: Path):
    save(small(), tmp_path / "m")
    load(tmp_path / "m")
    before = len(os.listdir("/dev/fd"))
    for _ in range(20):
        load(tmp_path / "m")
        with pytest.raises(UserError):
            load(tmp_path)
    assert len(os.listdir("/dev/fd")) == before


# --- what is no regular file ------------------------------------------------------------------------------------------

READ = ("config.json", "generation_config.json", "model.safetensors", "manifest.json", "model.safetensors.index.json")


def a_pipe(path: Path) -> None:
    os.mkfifo(path)


def a_device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def a_socket(path: Path) -> None:
    home = os.getcwd()
    os.chdir(path.parent)  # names of sockets are short
    with socket.socket(socket.AF_UNIX) as one:
        one.bind(path.name)
    os.chdir(home)


def a_loop(path: Path) -> None:
    path.symlink_to(path.name)


def a_link_to_nothing(path: Path) -> None:
    path.symlink_to("nothing")


def a_folder(path: Path) -> None:
    path.mkdir()


@pytest.mark.parametrize("kind", [a_pipe, a_device, a_socket, a_loop, a_link_to_nothing, a_folder])
@pytest.mark.parametrize("name", READ)
def test_only_regular_files_are_read(tmp_path: Path, name: str, kind: Callable[[Path], None]):
    save(small("2F"), tmp_path / "m", format="llama")
    if name != "manifest.json":
        (tmp_path / "m/manifest.json").unlink()
    if name.endswith("index.json"):
        (tmp_path / "m/model.safetensors").unlink()
    (tmp_path / "m" / name).unlink(missing_ok=True)
    kind(tmp_path / "m" / name)
    begin = time.monotonic()
    with pytest.raises(UserError, match=rf"m/{name} is ") as caught:
        load(tmp_path / "m")
    assert "\n" not in str(caught.value)
    assert time.monotonic() - begin < 2


def test_what_nobody_reads_may_be_anything(tmp_path: Path):
    save(small("2F"), tmp_path / "m", format="llama")
    a_pipe(tmp_path / "m/notes.txt")
    a_link_to_nothing(tmp_path / "m/training_args.bin")
    (tmp_path / "m/checkpoint-10").mkdir()
    load(tmp_path / "m")


# --- links ------------------------------------------------------------------------------------------------------------


def linked(folder: Path, name: str, target: Path) -> None:
    """Moves a file to another place, and leaves a link to it."""
    target.parent.mkdir(parents=True, exist_ok=True)
    (folder / name).rename(target)
    (folder / name).symlink_to(target)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "model.safetensors"])
@pytest.mark.parametrize("place", ["m/inner/file", "models--org--name/blobs/0123abcd", "shared/{name}"])
def test_links_are_followed_where_folders_have_them(tmp_path: Path, name: str, place: str):
    """Within the folder, into the cache of the hub, and to another folder's file of the same name."""
    model = small("2F")
    model.origin.generation = {"eos_token_id": 3}
    save(model, tmp_path / "m")
    linked(tmp_path / "m", name, tmp_path / place.format(name=name))
    assert load(tmp_path / "m").origin.generation == {"eos_token_id": 3}
    (tmp_path / "latest").symlink_to("m")
    load(tmp_path / "latest")


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_a_text_is_not_taken_from_somewhere_else(tmp_path: Path, name: str):
    """What says nothing of a model by itself, such as a key of somebody's, would be copied into what is saved."""
    model = small("2F")
    model.origin.generation = {"eos_token_id": 3}
    save(model, tmp_path / "m")
    linked(tmp_path / "m", name, tmp_path / "home/secret.json")
    with pytest.raises(UserError, match=rf"m/{name} is a link out of this folder; put a copy of the file there"):
        load(tmp_path / "m")


def test_a_text_below_a_folder_that_is_a_link_is_not_taken_from_somewhere_else(tmp_path: Path):
    save(small("2F"), tmp_path / "m")
    (tmp_path / "home").mkdir()
    (tmp_path / "home/notes.jinja").write_text("a secret")
    (tmp_path / "m/chat_templates").symlink_to(tmp_path / "home")
    with files.OpenFolder(tmp_path / "m") as folder:
        with pytest.raises(UserError, match=r"chat_templates/notes\.jinja is a link out of this folder"):
            folder.read("chat_templates/notes.jinja")
        (tmp_path / "m/chat_templates").unlink()
        (tmp_path / "home").rename(tmp_path / "m/chat_templates")
        assert folder.read("chat_templates/notes.jinja") == b"a secret"


def test_weights_may_be_linked_from_anywhere(tmp_path: Path):
    save(small("2F"), tmp_path / "m")
    linked(tmp_path / "m", "model.safetensors", tmp_path / "annex/SHA256-1234")
    load(tmp_path / "m")


# --- sizes ------------------------------------------------------------------------------------------------------------


def grown(path: Path, size: int) -> None:
    """A file of so many bytes, which takes no room on the disk."""
    path.unlink(missing_ok=True)
    with open(path, "wb") as file:
        file.truncate(size)


@pytest.mark.parametrize("name", READ)
def test_a_text_of_gigabytes_is_refused_before_it_is_read(tmp_path: Path, name: str):
    save(small("2F"), tmp_path / "m")
    if name != "manifest.json":
        (tmp_path / "m/manifest.json").unlink()
    if name.endswith("index.json"):
        (tmp_path / "m/model.safetensors").unlink()
    if name.endswith(".safetensors"):
        (tmp_path / "m" / name).write_bytes((40 << 20).to_bytes(8, "little") + b" " * (1 << 10))
        with open(tmp_path / "m" / name, "r+b") as file:
            file.truncate(1 << 40)
    else:
        grown(tmp_path / "m" / name, 1 << 40)
    tracemalloc.start()
    begin = time.monotonic()
    with pytest.raises(UserError, match=rf"m/{name}: .* at most [0-9,]+ are read"):
        load(tmp_path / "m")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert time.monotonic() - begin < 2
    assert peak < 20 << 20


def test_a_key_that_stands_twice_is_found_in_time(tmp_path: Path):
    keys = ", ".join(f'"k{at}": 0' for at in range(200_000))
    begin = time.monotonic()
    with pytest.raises(UserError, match="the key 'k199999' stands there twice"):
        object_in(f'{{{keys}, "k199999": 1}}'.encode(), tmp_path)
    assert time.monotonic() - begin < 3


# --- who may read what is saved ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_files_are_saved_as_the_umask_has_it(tmp_path: Path, umask: int, mode: int):
    before = os.umask(umask)
    try:
        save(small("2F"), tmp_path / "m")
    finally:
        os.umask(before)
    assert {oct(path.stat().st_mode & 0o777) for path in (tmp_path / "m").iterdir()} == {oct(mode)}


def test_weights_of_another_user_are_told_as_what_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The system's words, which are not that the file is missing."""
    save(small("2F"), tmp_path / "m")
    there, opened = tmp_path / "m/model.safetensors", os.open

    def denied(path: Any, *arguments: Any, **more: Any) -> int:
        if str(path) == there.name:
            raise PermissionError(13, "Permission denied", there.name)
        return opened(path, *arguments, **more)

    monkeypatch.setattr(os, "open", denied)
    with pytest.raises(longwave.MachineError, match=r"Permission denied \(model\.safetensors\)"):
        load(tmp_path / "m")


# --- one level up -----------------------------------------------------------------------------------------------------


def test_the_folder_of_a_run_names_its_model(tmp_path: Path):
    save(small("2F"), tmp_path / "run/model")
    save(small("2F"), tmp_path / "run/checkpoints/step-00000001")
    save(small("2F"), tmp_path / "run/checkpoints/step-00000002")
    for below, meant in (("run", "run/model"), ("run/checkpoints", "run/checkpoints/step-00000002")):
        with pytest.raises(UserError) as caught:
            longwave.load(tmp_path / below)
        said = f"{tmp_path / below}: no config.json; give a model folder; did you mean {tmp_path / meant}?"
        assert str(caught.value) == said


def test_torch_and_saved_files_agree(tmp_path: Path):
    """The paths by which libraries open an opened file again lead to that file, also when its name leads elsewhere."""
    save_file({"a": torch.arange(3)}, tmp_path / "a.safetensors")
    with files.OpenFolder(tmp_path) as folder:
        (tmp_path / "a.safetensors").unlink()
        from safetensors import safe_open

        with safe_open(folder.reopened("a.safetensors"), framework="pt") as again:
            assert again.get_tensor("a").tolist() == [0, 1, 2]
