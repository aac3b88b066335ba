"""Tiny runs: a little real text, prepared once per process, recipes over it, and ways to stop a run in the middle."""

from __future__ import annotations

import functools
import json
import shutil
import signal
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from longwave.config import build
from longwave.data.shards import prepare
from longwave.training.loop import Trainer
from longwave.training.metrics import read_metrics
from longwave.training.recipe import Recipe

VOCABULARY, WINDOW, STEPS = 300, 64, 8
FILES = ("textwrap.py", "bisect.py", "heapq.py", "json/encoder.py", "json/decoder.py", "shlex.py", "colorsys.py")
LAYOUT = "F subllm(0.64: F subllm(0.64: F) F) F"
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"layout": "3F"},
    "published": {"layout": LAYOUT, "subllm": {"balancer_steps": 6, "bypass_steps": 6}},
    "causal": {"layout": LAYOUT, "subllm": {"selection": "causal"}},
    "around a hybrid": {
        "layout": "S L subllm(0.64: S subllm(0.64: L) L) S",
        "subllm": {"selection": "causal"},
        "infllm": {
            "kernel_size": 4,
            "kernel_stride": 2,
            "block_size": 4,
            "window_size": 8,
            "topk": 2,
            "regime": "sparse",
        },
    },
}
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "scaled_adam": {"kind": "scaled_adam", "lr": 0.03},
    "adamw": {"kind": "adamw", "lr": 3e-3},
    "muon": {"kind": "muon", "lr": 3e-3},
}

_KEPT = tempfile.TemporaryDirectory(prefix="longwave-tests-")


@functools.cache
def corpus() -> Path:
    """A folder with a few files of the standard library."""
    folder = Path(_KEPT.name) / "text"
    for name in FILES:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(Path(sysconfig.get_path("stdlib")) / name, folder / name)
    return folder


@functools.cache
def prepared() -> Path:
    """The corpus as tokens, about an eighth of it held out."""
    folder = Path(_KEPT.name) / "data"
    prepare(corpus(), folder, vocab_size=VOCABULARY, held_out=0.3, seed=1)
    return folder


def values(model: str = "published", optimizer: str = "scaled_adam", **training: Any) -> dict[str, Any]:
    """The plain values of a tiny recipe."""
    shape = {"vocab_size": VOCABULARY, "hidden_size": 32, "context_window": WINDOW}
    run = {"steps": STEPS, "window": WINDOW, "batch_windows": 4, "log_every": 1, "evaluate_every": 4}
    return {
        "model": {**shape, "attention": {"heads": 2, "kv_heads": 1}, "mlp": {"size": 48}, **MODELS[model]},
        "data": {"folder": str(prepared())},
        "training": {**run, "evaluate_windows": 4, **training},
        "optimizer": OPTIMIZERS[optimizer],
        "schedule": {"kind": "cosine", "warmup_steps": 2},
    }


def recipe(model: str = "published", optimizer: str = "scaled_adam", **training: Any) -> Recipe:
    """A tiny recipe."""
    return build(Recipe, values(model, optimizer, **training), "tests")


def write_recipe(path: Path, model: str = "published", optimizer: str = "scaled_adam", **training: Any) -> Path:
    """A tiny recipe as a TOML file."""
    path.write_text("\n".join(_toml(values(model, optimizer, **training))) + "\n")
    return path


def _toml(table: dict[str, Any], name: str = "") -> list[str]:
    lines = [f"[{name}]"] if name else []
    lines += [f"{key} = {json.dumps(value)}" for key, value in table.items() if not isinstance(value, dict)]
    for key, value in table.items():
        if isinstance(value, dict):
            lines += _toml(value, f"{name}.{key}" if name else key)
    return lines


class StopAt:
    """An observer that sends this process a signal once a step is done."""

    def __init__(self, step: int, number: int = signal.SIGINT) -> None:
        self.step, self.number = step, number

    def record(self, entry: dict[str, Any]) -> None:
        if entry["step"] == self.step:
            signal.raise_signal(self.number)

    def close(self) -> None:
        pass


class CrashAt(StopAt):
    """An observer that breaks the run off after a step, with no chance to save anything."""

    def record(self, entry: dict[str, Any]) -> None:
        if entry["step"] == self.step:
            raise ConnectionAbortedError


def trained(recipe: Recipe, folder: Path, *observers: Any) -> Trainer:
    """A trainer that has run to its end, or been stopped by one of its observers."""
    trainer = Trainer(recipe, folder)
    for observer in observers:
        trainer.watch(observer)
    trainer.run()
    return trainer


def losses(folder: Path) -> list[dict[str, Any]]:
    """Every logged entry, without its pace and the time that had passed."""
    entries = read_metrics(folder / "metrics.jsonl")
    return [
        {
            name: value
            for name, value in entry.items()
            if name not in ("tokens_per_second", "seconds", "training_seconds")
        }
        for entry in entries
    ]


def contents(trainer: Trainer) -> dict[str, Tensor]:
    """Every tensor of the model and of the optimizer."""
    model = {f"model.{name}": tensor for name, tensor in trainer.model.state_dict().items()}
    return model | {f"optimizer.{name}": tensor for name, tensor in trainer.optimizer.tensors().items()}


def differing(one: dict[str, Tensor], other: dict[str, Tensor]) -> list[str]:
    """Names of the tensors that are not the same bit by bit."""
    assert one.keys() == other.keys()
    same = {name: one[name].dtype == other[name].dtype and torch.equal(one[name], other[name]) for name in one}
    return [name for name, equal in same.items() if not equal]


def in_double(run: Recipe, folder: Path) -> Trainer:
    """A trainer in fp64, in which rounding cannot be mistaken for a difference."""
    trainer = Trainer(run, folder)
    trainer.model.double()
    trainer.optimizer = run.optimizer.build(trainer.model)
    return trainer


def furthest(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """The largest difference of any entry of two sets of tensors."""
    return max(float((one[name].double() - other[name].double()).abs().max()) for name in one)
