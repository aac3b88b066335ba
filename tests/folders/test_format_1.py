"""Folders and runs that an older longwave wrote: format 1, in which a sliding window was a key of `attention`.

`format_1.json` holds what version 0.1.0 wrote of every case that it knew: `config.json`, and a checksum of the names,
shapes and types of the tensors.
"""

from __future__ import annotations

import json
import re
import shutil
import zlib
from pathlib import Path
from typing import Any

import pytest
import runs
import torch
from contract import CASES, WINDOW, alone, decoder
from model_folders import small
from safetensors.torch import load_file

from longwave import files
from longwave.checkpoints import load, native, save
from longwave.config import build
from longwave.errors import UserError
from longwave.files import MANIFEST
from longwave.mixers import WindowConfig
from longwave.training.loop import Interrupted, Trainer
from longwave.training.recipe import Recipe

WRITTEN: dict[str, Any] = json.loads((Path(__file__).resolve().parents[1] / "support" / "format_1.json").read_text())
TOKENS = [(7 * place * place + 3 * place) % 61 for place in range(24)]


# --- models -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", WRITTEN)
def test_a_folder_of_format_1_is_the_same_model(tmp_path: Path, name: str):
    model = decoder(CASES[name])
    save(model, tmp_path / "model")
    assert checksum(load_file(tmp_path / "model/model.safetensors")) == WRITTEN[name]["tensors"]
    (tmp_path / "model/config.json").write_text(json.dumps(WRITTEN[name]["config"]))
    (tmp_path / "model" / MANIFEST).unlink()
    loaded = load(tmp_path / "model")
    assert loaded.config == CASES[name].config()
    assert torch.equal(alone(loaded, TOKENS), alone(model, TOKENS))


def checksum(tensors: dict[str, torch.Tensor]) -> int:
    lines = [f"{name} {list(tensor.shape)} {tensor.dtype}" for name, tensor in sorted(tensors.items())]
    return zlib.crc32("\n".join(lines).encode())


def test_a_window_of_format_1_becomes_a_table():
    config = native.config_from(WRITTEN["block W"]["config"], "config.json")
    assert config.window == WindowConfig(WINDOW)
    assert native.config_from(WRITTEN["block F"]["config"], "config.json").window is None


def test_the_key_of_format_1_is_unknown_in_format_2():
    values = {**WRITTEN["block W"]["config"], "longwave_format": 2}
    with pytest.raises(UserError, match=r"^config\.json: unknown key attention\.window = 5; it is now window\.size$"):
        native.config_from(values, "config.json")


@pytest.mark.parametrize("number", [3, 0, -1, 1.0, True, "2", None])
def test_another_format_is_refused_in_one_line(tmp_path: Path, number: Any):
    save(small(), tmp_path / "model")
    values = json.loads((tmp_path / "model/config.json").read_text())
    assert values["longwave_format"] == 2
    (tmp_path / "model/config.json").write_text(json.dumps({**values, "longwave_format": number}))
    (tmp_path / "model" / MANIFEST).unlink()
    message = re.escape(f"/config.json: longwave_format = {number!r}; this longwave reads formats 1 to 2")
    with pytest.raises(UserError, match=f"{message}$"):
        load(tmp_path / "model")


# --- runs -------------------------------------------------------------------------------------------------------------


def windowed(size: int = 5) -> Recipe:
    values = runs.values("causal")
    return build(
        Recipe,
        {**values, "model": {**values["model"], "layout": "F subllm(0.64: W) F", "window": {"size": size}}},
        "tests",
    )


def in_format_1(folder: Path) -> None:
    """Rewrites a checkpoint as the older version wrote it."""
    texts = {name: json.loads((folder / name).read_text()) for name in ("config.json", "trainer.json")}
    texts["config.json"]["longwave_format"] = 1
    for holder in (texts["config.json"], texts["trainer.json"]["recipe"]):
        model = holder["model"]
        size = model.pop("window")["size"]
        del model["blocks"]
        holder["model"] = {
            **model,
            "attention": {**model["attention"], "window": size},
            "lightning": None,
            "infllm": None,
        }
    with files.folder(folder) as staging:
        shutil.copytree(folder, staging, ignore=shutil.ignore_patterns(MANIFEST), dirs_exist_ok=True)
        for name, text in texts.items():
            (staging / name).write_text(json.dumps(text))


def test_a_run_of_format_1_goes_on_to_the_bit(tmp_path: Path):
    straight = runs.trained(windowed(), tmp_path / "straight")
    with pytest.raises(Interrupted):
        runs.trained(windowed(), tmp_path / "old", runs.StopAt(3))
    in_format_1(tmp_path / "old/checkpoints/step-00000003")
    resumed = Trainer(windowed(), tmp_path / "old")
    assert resumed.step == 3
    resumed.run()
    assert runs.differing(runs.contents(resumed), runs.contents(straight)) == []
    assert runs.losses(tmp_path / "old") == runs.losses(tmp_path / "straight")


def test_a_run_of_format_1_with_another_window_is_another_run(tmp_path: Path):
    with pytest.raises(Interrupted):
        runs.trained(windowed(), tmp_path, runs.StopAt(3))
    in_format_1(tmp_path / "checkpoints/step-00000003")
    with pytest.raises(UserError, match=r"a checkpoint of another run \(model\.window\.size = 5 there, 6 here\)"):
        Trainer(windowed(6), tmp_path)
