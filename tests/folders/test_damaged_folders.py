"""Damaged and odd folders: a clean error that names the file or the tensor, or else exactly what the folder says.

Under a manifest nothing but the folder that was saved is ever loaded. Without one, what is loaded must be what the
safetensors library reads from the same files. A bit that is flipped inside a tensor's data cannot be seen there.
"""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

import pytest
import torch
from model_folders import small, theirs
from mutations import mutated
from published_hybrids import SALA, publish
from runs import VOCABULARY, prepared
from safetensors.torch import load_file
from torch import Tensor

import longwave
from longwave import cli
from longwave.checkpoints import load, save
from longwave.checkpoints.families import TABLE
from longwave.checkpoints.foreign import disassemble
from longwave.checkpoints.names import flat_names
from longwave.data.tokenizer import Tokenizer
from longwave.errors import MachineError, UserError
from longwave.files import CARD
from longwave.model import Decoder
from longwave.streams import Stream

FAST, ALL = 150, 1000
SECONDS = 10.0  # no folder keeps a reader busy for longer, however odd it is


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of every kind, with a tokenizer: longwave's own, three foreign ones that it saved, one in shards."""
    home, tokenizer = tmp_path_factory.mktemp("whole"), Tokenizer.load(prepared())
    shape = {"vocab_size": VOCABULARY, "context_window": 64}
    save(small("F subllm(0.5: F) W", window={"size": 4}, **shape), home / "own", tokenizer=tokenizer)
    yarn = {"kind": "yarn", "factor": 2.0, "original_window": 32}
    llama = small("2F", tie_embeddings=True, rotary={"scaling": yarn}, **shape)
    save(llama, home / "llama", format="llama", tokenizer=tokenizer)
    qwen = small("F W", attention={"heads": 2, "qk_norm": True}, window={"size": 4}, **shape)
    save(qwen, home / "qwen3", format="qwen3", tokenizer=tokenizer)
    publish(home / "published", SALA | {"vocab_size": VOCABULARY, "max_position_embeddings": 64})
    save(load(home / "published"), home / "sala", format="minicpm_sala", tokenizer=tokenizer)
    shutil.rmtree(home / "published")
    theirs(home / "shards", "qwen3", shard="20KB", max_position_embeddings=64, vocab_size=VOCABULARY)
    tokenizer.save(home / "shards")
    return {path.name: path for path in sorted(home.iterdir())}


def outcome(folder: Path) -> Decoder | str:
    """The model in a folder, or the clean error that refuses it; anything else fails the test."""
    try:
        model = longwave.load(folder)
        with torch.no_grad():
            model(torch.arange(5) % model.config.vocab_size, Stream.of([5]))
    except (UserError, MachineError) as error:
        return str(error)
    return model


def stored(model: Decoder) -> dict[str, Tensor]:
    """The weights under the names of the folder they came from."""
    if not model.resamplers:
        return disassemble(model, TABLE)
    names = flat_names(model)
    return {names[name]: tensor for name, tensor in model.state_dict().items()}


def is_what_the_files_say(model: Decoder, folder: Path) -> bool:
    listed = folder / "model.safetensors.index.json"
    names = set(json.loads(listed.read_text())["weight_map"].values()) if listed.exists() else {"model.safetensors"}
    expected = {name: one for file in names for name, one in load_file(folder / file).items()}
    found = stored(model)
    return found.keys() == expected.keys() and all(
        torch.equal(found[name].nan_to_num(7), tensor.to(found[name].dtype).nan_to_num(7))
        for name, tensor in expected.items()
    )


def examine(numbers: range, whole: dict[str, Path], home: Path) -> dict[str, int]:
    """Mutates and loads; counts what was refused and what was loaded, and is to be loaded."""
    counts = {"refused": 0, "loaded": 0}
    for number in numbers:
        kind = sorted(whole)[number // 2 % len(whole)]
        done, sealed = mutated(number, whole[kind], home / "mutated")
        begin = time.monotonic()
        found, what = outcome(home / "mutated"), f"mutation {number} of {kind}: {done}"
        assert time.monotonic() - begin < SECONDS, what
        if isinstance(found, str):
            counts["refused"] += 1
            assert "\n" not in found, what
            assert len(found) < 1000, what
            assert str(home) in found, f"{what}: names no file: {found}"
        else:
            counts["loaded"] += 1
            unchanged = same_files(home / "mutated", whole[kind])
            assert not sealed or unchanged, f"{what}: loaded in spite of its manifest"
            assert is_what_the_files_say(found, home / "mutated"), what
    return counts


def same_files(one: Path, other: Path) -> bool:
    files = [path.relative_to(other) for path in other.rglob("*") if path.is_file() and path.name != CARD]
    return all((one / file).is_file() and (one / file).read_bytes() == (other / file).read_bytes() for file in files)


def test_whole_folders_are_loaded(whole: dict[str, Path]):
    for folder in whole.values():
        found = outcome(folder)
        assert isinstance(found, Decoder), found
        assert is_what_the_files_say(found, folder)


def test_a_mutated_folder_is_refused_or_what_it_says(whole: dict[str, Path], tmp_path: Path):
    counts = examine(range(FAST), whole, tmp_path)
    assert counts["refused"] > FAST / 2
    assert counts["loaded"] > 0, "oddities without effect are loaded"


@pytest.mark.slow
def test_a_thousand_mutated_folders_are_refused_or_what_they_say(whole: dict[str, Path], tmp_path: Path):
    counts = examine(range(FAST, FAST + ALL), whole, tmp_path)
    print(counts)
    assert sum(counts.values()) == ALL
    assert counts["refused"] > ALL / 2


VERBS = {
    "plan": lambda folder: ["plan", folder, "--context", "64"],
    "generate": lambda folder: ["generate", folder, "--prompt", "def f", "--max-new-tokens", "3", "--device", "cpu"],
    "eval": lambda folder: ["eval", folder, str(prepared()), "--window", "32", "--device", "cpu"],
}


def run_verbs(numbers: range, whole: dict[str, Path], home: Path, capsys: pytest.CaptureFixture[str]) -> set[int]:
    """Exit codes; a traceback would end the test as it would end the command."""
    codes = set()
    for number in numbers:
        kind, verb = sorted(whole)[number // 2 % len(whole)], sorted(VERBS)[number % len(VERBS)]
        done, _ = mutated(number, whole[kind], home / "mutated")
        code = cli.main(VERBS[verb](str(home / "mutated")))
        error = capsys.readouterr().err
        assert code in (0, 1, 2), f"{verb} on mutation {number} of {kind}: {done}"
        assert code == 0 or error.splitlines()[-1].startswith("longwave: "), f"mutation {number}: {error}"
        codes.add(code)
    return codes


def test_the_command_line_says_it_in_one_line(
    whole: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert {0, 2} <= run_verbs(range(60), whole, tmp_path, capsys)


@pytest.mark.slow
def test_the_command_line_never_fails_otherwise(
    whole: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert {0, 2} <= run_verbs(range(60, 460), whole, tmp_path, capsys)


def test_a_bit_inside_a_tensor_is_seen_under_a_manifest_and_nowhere_else(whole: dict[str, Path], tmp_path: Path):
    """The limit that docs name: safetensors has no checksum of its own."""
    for kind, folder in whole.items():
        shutil.copytree(folder, tmp_path / kind)
        path = max((tmp_path / kind).glob("*.safetensors"), key=lambda one: one.stat().st_size)
        content = bytearray(path.read_bytes())
        content[-3] ^= 1
        path.write_bytes(content)
        found = outcome(tmp_path / kind)
        if kind == "shards":
            assert isinstance(found, Decoder)
        else:
            assert isinstance(found, str)
            assert found.startswith(f"{path} is damaged")
