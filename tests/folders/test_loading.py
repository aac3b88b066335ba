"""Reading weights: one pass with its checksums, memory of the model's own, the same results to the bit; and hub ids."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import zlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError
from hypothesis import given
from hypothesis import strategies as st
from model_folders import TOKENS, logits, same, small, theirs
from safetensors.torch import save_file

import longwave
from longwave import cli, files, planning
from longwave.checkpoints import load, load_config, save, weights
from longwave.checkpoints.weights import WeightFiles
from longwave.config import ModelConfig
from longwave.data.tokenizer import Tokenizer
from longwave.errors import UserError
from longwave.files.checksum import joined
from longwave.layers.mlp import MLPConfig
from longwave.mixers import AttentionConfig
from longwave.model import Decoder


@given(st.lists(st.binary(max_size=300), min_size=1, max_size=6))
def test_joined_checksums_are_those_of_the_whole(pieces: list[bytes]):
    checksum = 0
    for piece in pieces:
        checksum = joined(checksum, zlib.crc32(piece), len(piece))
    assert checksum == zlib.crc32(b"".join(pieces))


def test_joined_checksums_of_gigabytes():
    """Against zlib over zeros, which are read as quickly as they are made."""
    zeros, checksum = bytes(1 << 20), zlib.crc32(b"head")
    for _ in range(64):
        checksum = zlib.crc32(zeros, checksum)
    assert joined(zlib.crc32(b"head"), zlib.crc32(bytes(64 << 20)), 64 << 20) == checksum


@pytest.fixture
def stored(tmp_path: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    """A folder with tensors of every kind: large and tiny, scalar and empty, at odd places in the file."""
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "large": torch.randn(1100, 1001, generator=generator),  # more than a huge page, and no multiple of a block
        "half": torch.randn(7, 3, generator=generator).bfloat16(),
        "odd": torch.randn(5, generator=generator).to(torch.float16),
        "scalar": torch.tensor(3.5, dtype=torch.float64),
        "count": torch.tensor([1, -2], dtype=torch.int64),
        "flags": torch.tensor([True, False, True]),
        "empty": torch.zeros(0, 4),
    }
    with files.folder(tmp_path / "saved") as staging:
        save_file(tensors, staging / "model.safetensors")
    return tmp_path / "saved", tensors


@pytest.mark.parametrize("block", [1 << 20, 1000])
def test_tensors_come_as_they_were_saved(stored: Any, monkeypatch: pytest.MonkeyPatch, block: int):
    folder, tensors = stored
    monkeypatch.setattr(weights, "_BLOCK", block)
    saved = WeightFiles(files.OpenFolder(folder))
    assert saved.names() == tensors.keys()
    read = saved.load(saved.names())
    same(read, tensors)
    assert all(tensor.data_ptr() % 64 == 0 for tensor in read.values())
    assert len({tensor.untyped_storage().data_ptr() for tensor in read.values() if tensor.numel()}) == len(tensors) - 1


def test_a_part_is_read_alone_and_in_another_dtype(stored: Any):
    folder, tensors = stored
    read = WeightFiles(files.OpenFolder(folder)).read({"large": torch.bfloat16, "scalar": torch.float32})
    same(read, {"large": tensors["large"].bfloat16(), "scalar": tensors["scalar"].float()})


def test_every_damaged_byte_is_refused_whatever_is_read(stored: Any):
    """In the header, in what is read, and in what is not."""
    folder, _ = stored
    path = folder / "model.safetensors"
    whole, saved = path.read_bytes(), WeightFiles(files.OpenFolder(folder))
    places = {"header": 5 + 8 * 3, **{name: found.begin for name, found in saved.found.items() if found.bytes}}
    for place in places.values():
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        with pytest.raises(UserError, match=r"model\.safetensors is damaged: its crc32 is"):
            saved.load(["odd"])
    path.write_bytes(whole[:-9])
    with pytest.raises(UserError, match=r"cut while it was being read"):
        saved.load(["odd"])
    path.write_bytes(whole)
    saved.load(["odd"])


def test_without_a_manifest_what_is_not_wanted_is_not_read(stored: Any):
    folder, tensors = stored
    (folder / files.MANIFEST).unlink()
    path = folder / "model.safetensors"
    saved = WeightFiles(files.OpenFolder(folder))
    place = saved.found["large"].begin
    path.write_bytes(path.read_bytes()[:place] + b"\xff" + path.read_bytes()[place + 1 :])
    same(saved.load(["odd"]), {"odd": tensors["odd"]})


@pytest.mark.parametrize("format", ["longwave", "llama"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_results_are_the_same_to_the_bit_before_and_after(tmp_path: Path, format: str, dtype: torch.dtype):
    """Odd sizes, so that tensors lie at odd places in the file."""
    model = small("3F", hidden_size=34, attention={"heads": 1}, mlp={"size": 37}, vocab_size=31).to(dtype)
    save(model, tmp_path / "m", format=format)
    again = load(tmp_path / "m")
    same(again.state_dict(), model.state_dict())
    for length in (1, 5, len(TOKENS)):
        assert torch.equal(logits(again, TOKENS[:length]), logits(model, TOKENS[:length]))


@pytest.mark.slow
@pytest.mark.parametrize("format", ["longwave", "llama"])
def test_a_gigabyte_is_loaded_in_its_own_space_at_the_speed_of_the_page_cache(tmp_path: Path, format: str):
    """Peak memory at most 1.1 times the weights; at least 0.8 times the speed of reading them into new memory."""
    config = ModelConfig(32000, 2048, "8F", attention=AttentionConfig(16, 8), mlp=MLPConfig(5504))
    with torch.device("meta"):
        model = Decoder(config).to(torch.bfloat16)
    model = model.to_empty(device="cpu")
    with torch.no_grad():
        for weight in model.parameters():
            weight.fill_(0.01)
    save(model, tmp_path / "m", format=format)
    del model
    measured = json.loads(child("loading_child.py", str(tmp_path / "m")))
    assert measured["gigabytes"] > 1
    assert measured["peak"] <= 1.1, measured
    assert measured["load"] >= 0.8 * measured["fresh"], measured


def child(script: str, *arguments: str) -> str:
    root = Path(__file__).resolve().parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    command = [sys.executable, str(root / "tests" / "support" / script), *arguments]
    return subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout


# --- hub ids ----------------------------------------------------------------------------------------------------------


COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """`snapshot_download` as it is where there is a network: it puts the files that the patterns name into a cache."""

    def __init__(self, cache: Path, repositories: dict[str, Path]) -> None:
        self.cache, self.repositories, self.asked = cache, repositories, list[str]()

    def __call__(
        self, name: str, *, allow_patterns: list[str], ignore_patterns: list[str], revision: str | None = None
    ) -> str:
        from huggingface_hub.utils import filter_repo_objects

        self.asked.append(name if revision is None else f"{name}@{revision}")
        source = self.repositories[name]
        files = [path.relative_to(source).as_posix() for path in source.rglob("*") if path.is_file()]
        wanted = filter_repo_objects(files, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns)
        return str(self.put(name, source, list(wanted)))

    def folder(self, name: str) -> Path:
        return self.cache / f"models--{name.replace('/', '--')}" / "snapshots" / COMMIT

    def put(self, name: str, source: Path, wanted: list[str]) -> Path:
        """Files as the library's cache has them: links to blobs that are named by their content."""
        folder = self.folder(name)
        blobs = folder.parents[1] / "blobs"
        for home in (folder, blobs):
            home.mkdir(parents=True, exist_ok=True)
        for file in wanted:
            content = (source / file).read_bytes()
            blob = hashlib.sha256(content).hexdigest()
            (blobs / blob).write_bytes(content)
            (folder / file).unlink(missing_ok=True)
            (folder / file).symlink_to(f"../../blobs/{blob}")
        return folder


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    theirs(tmp_path / "qwen", "qwen3", shard="20KB", vocab_size=280)
    tokenizer = Tokenizer.train(["some text of some words"], 280)
    tokenizer.save(tmp_path / "qwen")
    save(small(vocab_size=280), tmp_path / "own", tokenizer=tokenizer)
    (tmp_path / "qwen/original").mkdir()
    for name in ("consolidated.safetensors", "pytorch_model.bin", "README.md", "original/model.safetensors"):
        (tmp_path / "qwen" / name).write_bytes(b"tens of gigabytes")
    hub = Hub(tmp_path / "cache", {"org/qwen": tmp_path / "qwen", "org/own": tmp_path / "own"})
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub)
    return hub


def test_a_hub_id_is_fetched_and_loaded(hub: Hub):
    model = longwave.load("org/qwen")
    same(model.state_dict(), load(hub.repositories["org/qwen"]).state_dict())
    assert model.tokenizer is not None
    kept = {path.name for path in hub.folder("org/qwen").iterdir()}
    own = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}
    assert {name for name in kept if not name.startswith("model")} == own
    assert not (hub.folder("org/qwen") / "original").exists()


def test_a_longwave_folder_on_the_hub_is_verified(hub: Hub):
    longwave.load("org/own")
    path = hub.repositories["org/own"] / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    with pytest.raises(UserError, match=rf"{COMMIT}/model\.safetensors is damaged"):
        longwave.load("org/own")


def test_only_the_config_is_fetched_for_a_plan(hub: Hub):
    assert load_config("org/qwen") == planning.model_config("org/qwen") == load(hub.repositories["org/qwen"]).config
    assert [path.name for path in hub.folder("org/qwen").iterdir()] == ["config.json"]


def test_a_folder_comes_before_a_hub_id(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    save(small(), "org/own")
    assert load("org/own").config.vocab_size == 29
    assert not hub.asked


def test_the_hub_is_named_before_it_is_asked_and_the_commit_afterwards(
    hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    model = longwave.load("hf:org/own@v1.0")
    said = capsys.readouterr().err.splitlines()
    assert said[0].startswith("fetching org/own at v1.0 from the Hugging Face hub")
    assert said[1] == f"org/own: commit {COMMIT}"
    assert hub.asked == ["org/own@v1.0"]
    assert model.origin.source == f"org/own@{COMMIT}"
    for format in ("longwave", "llama"):
        longwave.save(model, tmp_path / format, format=format)
        assert f"| weights of | org/own@{COMMIT} |" in (tmp_path / format / files.CARD).read_text()
    assert load(tmp_path / "longwave").origin.source == model.origin.source
    assert load(hub.folder("org/own")).origin.source == model.origin.source  # by the path of the cache, too


def test_every_verb_of_a_model_takes_a_revision(hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert cli.main(["plan", "org/qwen", "--revision", "v1.0", "--context", "64"]) == 0
    text = ["--prompt", "some", "--max-new-tokens", "1", "--device", "cpu"]
    assert cli.main(["generate", "org/qwen", "--revision", "refs/pr/1", *text]) == 0
    assert hub.asked == ["org/qwen@v1.0", "org/qwen@refs/pr/1"]
    for verb in ("plan", "generate"):
        assert cli.main([verb, str(tmp_path / "qwen"), "--revision", "v1.0"]) == 2
        assert "--revision v1.0: of a model of the hub, such as org/name" in capsys.readouterr().err
    for verb in (["eval"], ["inspect"], ["bench", "inference"], ["bench", "training"], ["bench", "context"]):
        with pytest.raises(SystemExit):
            cli.main([*verb, "--help"])
        assert "--revision REV" in capsys.readouterr().out


def test_a_mistyped_folder_is_not_asked_for(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    save(small(), "runs/tiny")
    for reader in (longwave.load, load_config):
        for path, near in (("runs/tniy", "did you mean runs/tiny? "), ("runs/x", "")):
            with pytest.raises(UserError) as caught:
                reader(path)
            assert str(caught.value) == f"{path}: no such folder; {near}for a model of the hub write hf:{path}"
    assert not hub.asked


RESPONSE: Any = SimpleNamespace(headers={}, request=None)
REFUSED = r"^org/name: no such folder, and as a hub id it could not be fetched: "


@pytest.mark.parametrize(
    "error",
    [
        LocalEntryNotFoundError("no network:\n name or service not known"),
        RepositoryNotFoundError("404\nno such repository", response=RESPONSE),
        OSError("disk"),
        RuntimeError("whatever its HTTP client raises"),
    ],
)
def test_a_hub_that_fails_is_one_line(monkeypatch: pytest.MonkeyPatch, error: Exception):
    def failing(*_: Any, **__: Any) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", failing)
    with pytest.raises(UserError, match=REFUSED) as caught:
        longwave.load("org/name")
    assert "\n" not in str(caught.value)


def test_offline_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """With the library itself, told that there is no network."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match=REFUSED):
        longwave.load("org/name")


@pytest.mark.parametrize(
    "path", ["nothing", "a/b/c", "./a/b", "/a/b", "org/", "-org/name", "org/name.toml", "ö/ä", "~"]
)
def test_what_is_neither_a_folder_nor_a_hub_id_is_one_line(path: str):
    for reader in (longwave.load, load_config):
        with pytest.raises(UserError, match=re.escape("no such folder, and no hub id (those read org/name)")):
            reader(path)


def test_a_file_is_no_folder(tmp_path: Path):
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match=r"model\.safetensors: a file; give a model folder"):
        longwave.load(tmp_path / "model.safetensors")
