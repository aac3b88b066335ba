"""Models whose window was made longer, as Llama folders: transformers computes the same beyond the original window."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import runs
import torch
from runs import trained
from transformers import AutoModelForCausalLM

import longwave as lw
from longwave.config import build
from longwave.streams import Stream
from longwave.training.recipe import Recipe, read_recipe

WAYS: dict[str, dict[str, Any]] = {
    "linear": {"rotary.scaling.kind": "linear"},
    "llama3": {"rotary.scaling.kind": "llama3"},
    "yarn": {"rotary.scaling.kind": "yarn"},
    "yarn, not truncated": {"rotary.scaling.kind": "yarn", "rotary.scaling.truncate": False},
    "base": {"rotary.base": 5e5},
}


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An ordinary Llama folder with a window of 64 tokens."""
    folder = tmp_path_factory.mktemp("start")
    values = runs.values("llama", "adamw")
    values["model"]["init"] = {"std": 0.2}  # large enough for attention to look at something
    model = lw.load(trained(build(Recipe, values, "tests"), folder / "run").result().model)
    lw.save(model, folder / "llama", format="llama")
    return folder / "llama"


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_a_tuned_model_is_a_llama_of_transformers_beyond_its_original_window(
    tmp_path: Path, start: Path, way: dict[str, Any]
):
    values = runs.values("llama", "adamw", start_from=str(start), steps=3, window=128)
    (tmp_path / "r.toml").write_text("\n".join(runs._toml({k: v for k, v in values.items() if k != "model"})))
    changes = {f"model.{name}": value for name, value in {"context_window": 320, **way}.items()}
    model = lw.load(trained(read_recipe(tmp_path / "r.toml", changes), tmp_path / "run").result().model)
    lw.save(model, tmp_path / "llama", format="llama")
    require_equal(tmp_path / "llama", start)


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_so_is_one_that_was_extended_from_python(tmp_path: Path, start: Path, way: dict[str, Any]):
    options = {name.split(".")[-1]: value for name, value in way.items()}
    lw.save(lw.extend(lw.load(start), 320, **options), tmp_path / "llama", format="llama")
    require_equal(tmp_path / "llama", start)


def require_equal(folder: Path, start: Path) -> None:
    """The folder holds a window of 320 tokens, and both libraries compute the same at every one; its start does not."""
    ours, theirs = lw.load(folder).double(), AutoModelForCausalLM.from_pretrained(folder).double().eval()
    assert ours.config.context_window == 320
    tokens = torch.randint(0, runs.VOCABULARY, (320,), generator=torch.Generator().manual_seed(0))
    stream = Stream.of([320])
    with torch.no_grad():
        found, wanted = ours.eval()(tokens, stream), theirs(tokens[None]).logits[0]
        before = lw.load(start).double().eval()(tokens, stream)
    assert (found - wanted).abs().max() < 1e-5
    assert (before - wanted)[64:].abs().max() > 1e-2
