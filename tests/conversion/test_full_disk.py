"""A conversion on a disk without room: one line, nothing half-written, and it goes on once there is room again."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import runs
from files_disk import FullDisk
from runs import differing

from longwave import checkpoints, files
from longwave.checkpoints import weights
from longwave.config import ModelConfig, build
from longwave.data.tokenizer import Tokenizer
from longwave.files import storage
from longwave.model import Decoder
from longwave.training.metrics import MetricsFile

TRAINING = {"window": 32, "batch_windows": 2, "log_every": 1, "checkpoint_every": 1, "evaluate_windows": 2}
STEPS = {"training": {"steps": 2}}
RECIPE: Mapping[str, Any] = {
    "data": {"folder": str(runs.prepared())},
    "student": {"select": {"keep": 1}},
    "training": TRAINING,
    "optimizer": runs.OPTIMIZERS["adamw"],
    "schedule": {"kind": "cosine", "warmup_steps": 1},
    "stages": {"align": STEPS, "distil": STEPS},
}


@pytest.fixture(autouse=True)
def real_disk() -> Iterator[None]:
    """Whatever a test did to the disk, the next one starts with the real one."""
    yield
    storage.disk = storage.Disk()


@pytest.fixture
def given(tmp_path: Path) -> tuple[Path, Path]:
    """A Llama of two layers, and the file of a recipe."""
    model = Decoder(build(ModelConfig, runs.values("llama")["model"] | {"layout": "2F"}, "model"), seed=3)
    checkpoints.save(model, tmp_path / "llama", tokenizer=Tokenizer.load(runs.prepared()), format="llama")
    (tmp_path / "recipe.toml").write_text("\n".join(runs._toml(dict(RECIPE))) + "\n")
    return tmp_path / "llama", tmp_path / "recipe.toml"


@pytest.fixture
def filled(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], FullDisk]:
    """Makes the disk one with so much room, for weights and metrics too, which are not written through it."""
    save, record = weights.save_file, MetricsFile.record

    def fill(room: float) -> FullDisk:
        storage.disk = disk = FullDisk(room)

        def saved(tensors: Any, path: Path, **others: Any) -> None:
            disk.take(path)
            save(tensors, path, **others)

        def recorded(self: MetricsFile, entry: dict[str, Any]) -> None:
            disk.take(Path(self._file.name))
            record(self, entry)

        monkeypatch.setattr(weights, "save_file", saved)
        monkeypatch.setattr(MetricsFile, "record", recorded)
        return disk

    return fill


def test_a_conversion_goes_on_when_there_is_room_again(
    longwave: Any, given: tuple[Path, Path], filled: Callable[[float], FullDisk], tmp_path: Path
):
    source, recipe = given
    disk = filled(math.inf)
    assert longwave("convert", source, tmp_path / "whole", "--recipe", recipe).code == 0
    most, attempts = disk.count, 0
    assert most > 20, "a conversion writes more than this, or the disk sees too little of it"
    for room in range(0, most, most // 7):
        filled(room)
        result = longwave("convert", source, tmp_path / "out", "--recipe", recipe)
        if result.code == 0:
            break
        attempts += 1
        assert (result.code, result.err.count("longwave: ")) == (1, 1), result.err
        assert "No space left on device" in result.err.splitlines()[-1]
        nothing_is_half_written(tmp_path / "out")
    assert attempts > 3, f"{attempts} attempts for {most}"
    filled(math.inf)
    assert longwave("convert", source, tmp_path / "out", "--recipe", recipe).code == 0
    ours, theirs = (checkpoints.load(tmp_path / one / "model").state_dict() for one in ("out", "whole"))
    assert differing(ours, theirs) == []


def nothing_is_half_written(folder: Path) -> None:
    """Every folder with a manifest is whole, every record can be read, and no hidden file is left."""
    assert [str(one) for one in folder.rglob(".*") if one.name != ".lock"] == []
    for manifest in folder.rglob("manifest.json"):
        files.verify(manifest.parent)
