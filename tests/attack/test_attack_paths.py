"""Paths that no command can use, or whose names are no text, wherever a command takes a path: right, or one line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import runs
from attacks import Attacker

LOOPS = ("loop", "loop/below", "there", "chain-0")
ODD_NAME = "ключ-\udcff"  # as Python reads a name of bytes that are no UTF-8
SHORT = ("--contexts", "16", "--repeats", "1")


def commands(path: str, model: Path, recipe: Path) -> list[tuple[object, ...]]:
    """A command line for every place at which a verb takes a path."""
    text = recipe  # any file of UTF-8
    return [
        ("generate", path, "--prompt", "x"),
        ("generate", model, "--prompt-file", path),
        ("plan", path),
        ("eval", path, runs.prepared()),
        ("eval", model, path),
        ("eval", model, "--tasks", path),
        ("inspect", path, "--text", "x"),
        ("inspect", model, path),
        ("inspect", model, "--text", "x", "--output", path),
        ("inspect", model, "--text", "x", "--against", path),
        ("init", path),
        ("init", "new.toml", "--from", path),
        ("prepare", path, "out"),
        ("prepare", text, path, "--vocab-size", "300"),
        ("prepare", text, "out", "--tokenizer", path),
        ("train", path, "--output", "run"),
        ("train", recipe, "--output", path),
        ("train", recipe, "--output", "run", f"data.folder={path}"),
        ("train", recipe, "--output", "run", f"training.start_from={path}"),
        ("quickstart", path, "--output", "quick"),
        ("quickstart", text, "--output", path),
        ("bench", "inference", path, *SHORT),
        ("bench", "inference", model, *SHORT, "--against", path),
        *(("bench", "inference", model, *SHORT, option, path) for option in ("--save", "--plot", "--profile")),
        ("bench", "training", path, *SHORT),
        ("bench", "ops", path),
        ("bench", "ops", *SHORT, "--save", path),
        ("bench", "context", path, *SHORT),
        ("bench", "context", model, *SHORT, "--against", path),
        ("bench", "context", model, *SHORT, "--text", path),
        ("bench", "context", model, *SHORT, "--save", path),
        ("bench", "compare", path, recipe),
        ("compare", path, "--tokens", "1k", "--output", "compared"),
        ("compare", recipe, "--tokens", "1k", "--output", path),
        ("compare", recipe, "--tokens", "1k", "--output", "compared", f"data.folder={path}"),
        ("compare", "--from", path, "--output", "compared"),
    ]


@pytest.fixture
def work(attacker: Attacker) -> Path:
    """The folder of the commands, empty."""
    shutil.rmtree(attacker.work, ignore_errors=True)
    attacker.work.mkdir()
    return attacker.work


@pytest.mark.parametrize("path", [LOOPS[0], *(pytest.param(one, marks=pytest.mark.attack) for one in LOOPS[1:])])
def test_links_without_an_end(attacker: Attacker, model: Path, recipe: Path, work: Path, path: str):
    """To themselves, below one, to each other, and through more than the system follows."""
    for link, target in {"loop": "loop", "there": "back", "back": "there"}.items():
        (work / link).symlink_to(target)
    for number in range(99):
        (work / f"chain-{number}").symlink_to(f"chain-{number + 1}")
    (work / "chain-99").mkdir()
    outcomes = [attacker.run(*words) for words in commands(path, model, recipe)]
    wrong = [str(outcome) for outcome in outcomes if outcome.wrong or outcome.code != 2]
    assert not wrong, "\n".join(wrong)
    assert all((work / link).is_symlink() for link in ("loop", "there", "back"))


def test_names_that_are_no_text(attacker: Attacker, recipe: Path, work: Path):
    """Whatever is written of them (the model card, the recipe of a checkpoint, a page) is right, and is read again."""
    data, run = f"{ODD_NAME}/data", f"{ODD_NAME}/run"
    text = shutil.copytree(runs.corpus(), work / ODD_NAME / "text")
    for words in (
        ("prepare", text, data, "--vocab-size", str(runs.VOCABULARY), "--held-out", "0.3"),
        ("init", f"{ODD_NAME}.toml", "--from", recipe),
        ("train", f"{ODD_NAME}.toml", "--output", run, f"data.folder={data}"),
        ("train", f"{ODD_NAME}.toml", "--output", run, f"data.folder={data}"),
        ("train", recipe, "--output", "next", f"data.folder={data}", f"training.start_from={run}/model"),
        ("plan", f"{run}/model"),
        ("eval", f"{run}/model", data),
        ("generate", f"{run}/model", "--prompt", "x", "--max-new-tokens", "2"),
        ("inspect", f"{run}/model", "--text", "x", "--output", f"{ODD_NAME}.html"),
    ):
        outcome = attacker.run(*words)
        assert (outcome.wrong, outcome.code) == ("", 0), str(outcome)
    shutil.move(work / data, work / f"{ODD_NAME}-data")
    again = attacker.run("train", recipe, "--output", "named", f"data.folder={ODD_NAME}-data")
    assert (again.wrong, again.code) == ("", 0), str(again)
    assert "\\udcff-data" in (work / "named/model/README.md").read_text(encoding="utf-8")
    assert json.loads((work / "named/model/config.json").read_text())["training"]["data"] == f"{ODD_NAME}-data"
