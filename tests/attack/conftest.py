"""What attacks begin from: a small model of two kinds of blocks and a level, a recipe, and prepared data."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import runs
from attacks import Attacker

import longwave as lw
from longwave.config import build
from longwave.data.tokenizer import Tokenizer
from longwave.model import Decoder
from longwave.training.recipe import Recipe


@pytest.fixture(scope="session")
def attacker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Attacker]:
    attacker = Attacker(tmp_path_factory.mktemp("attacks"))
    yield attacker
    attacker.close()


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder with a tokenizer; nobody changes it."""
    folder = tmp_path_factory.mktemp("attacked") / "model"
    model = Decoder(build(Recipe, runs.values("causal"), "tests").model, seed=1)
    model.tokenizer = Tokenizer.load(runs.prepared())
    lw.save(model, folder)
    return folder


@pytest.fixture(scope="session")
def llama(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same as `transformers` writes it: a Llama."""
    folder = tmp_path_factory.mktemp("attacked") / "llama"
    model_of = Decoder(build(Recipe, runs.values("llama"), "tests").model, seed=1)
    model_of.tokenizer = Tokenizer.load(model)
    lw.save(model_of, folder, format="llama")
    return folder


@pytest.fixture(scope="session")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe of three steps."""
    path = tmp_path_factory.mktemp("attacked") / "tiny.toml"
    return runs.write_recipe(path, "causal", steps=3, evaluate_windows=1, evaluate_every=3)
