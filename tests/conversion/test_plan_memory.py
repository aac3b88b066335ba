"""The memory that a plan says an alignment takes is what it takes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import runs

from longwave import checkpoints
from longwave.config import ModelConfig, build
from longwave.data.tokenizer import Tokenizer
from longwave.model import Decoder

CHILD = Path(__file__).resolve().parents[1] / "support/align_memory_child.py"
WIDE: dict[str, Any] = {"hidden_size": 512, "context_window": 512, "attention": {"heads": 8, "kv_heads": 2}}


@pytest.mark.slow  # four processes of some seconds each, with half a gigabyte
@pytest.mark.parametrize("layers", [4, 8])
def test_the_plan_of_an_alignment_is_within_a_tenth_of_what_it_takes(tmp_path: Path, layers: int):
    shape = runs.values("llama")["model"] | WIDE | {"mlp": {"size": 1408}, "layout": f"{layers}F"}
    model = Decoder(build(ModelConfig, shape, "model"), seed=3)
    checkpoints.save(model, tmp_path / "llama", tokenizer=Tokenizer.load(runs.prepared()), format="llama")
    recipe = {
        "data": {"folder": str(runs.prepared())},
        "training": {"window": 256, "batch_windows": 8, "precision": "bf16", "evaluate_windows": 2},
        "optimizer": runs.OPTIMIZERS["adamw"],
        "schedule": {"kind": "cosine", "warmup_steps": 1},
        "stages": {"align": {"error": "relative", "training": {"steps": 6}}},
    }
    (tmp_path / "recipe.toml").write_text("\n".join(runs._toml(recipe)) + "\n")
    planned, taken = (child(tmp_path, what) for what in ("plan", "run"))
    assert planned == pytest.approx(taken, rel=0.1)


def child(folder: Path, what: str) -> int:
    """The bytes that the script in a new process says."""
    asked = [sys.executable, str(CHILD), str(folder / "llama"), str(folder / "recipe.toml"), what]
    done = subprocess.run(asked, capture_output=True, text=True, check=True)
    return int(done.stdout.split()[-1])
