"""Trial runs cut what is long, and nothing else; installing chooses the build of PyTorch."""

from __future__ import annotations

import importlib.util
import socket
import time
from pathlib import Path
from types import ModuleType

import pytest
import runs
from doc_blocks import ROOT

from longwave import trial
from longwave.data.sources import Document, documents
from longwave.training.recipe import read_recipe


@pytest.fixture
def on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LONGWAVE_TRIAL", "1")


def long_text() -> list[Document]:
    return [Document(str(number), "x" * (trial.CHARACTERS // 4)) for number in range(10)]


@pytest.mark.parametrize("value", ["", "0"])
def test_it_is_off_unless_asked_for(value: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("LONGWAVE_TRIAL", value)
    assert len(list(documents(lambda: iter(long_text())))) == 10
    assert read_recipe("quickstart-llama").training.steps == 130
    assert trial.contexts((4096, 65536)) == (4096, 65536)
    assert trial.at_most(5, 3) == 5


@pytest.mark.usefixtures("on")
def test_it_cuts_texts_runs_and_measurements():
    assert len(list(documents(lambda: iter(long_text())))) == 4
    assert trial.contexts((16, 4096, 8192, 65536)) == (64, 128, 1024)
    assert trial.at_most(5, 3) == 3


@pytest.mark.usefixtures("on")
@pytest.mark.parametrize("name", ["quickstart-llama", "quickstart-sala-subllm", "subllm-1.3b"])
def test_a_model_keeps_its_shape(name: str, monkeypatch: pytest.MonkeyPatch):
    short = read_recipe(name)
    monkeypatch.delenv("LONGWAVE_TRIAL")
    whole = read_recipe(name)
    assert short.model == whole.model
    assert (short.training.steps, short.training.window, short.training.batch_windows) == (2, 128, 2)
    assert short.optimizer == whole.optimizer


@pytest.mark.usefixtures("on")
def test_what_is_refused_is_refused_all_the_same(refuses, tmp_path: Path):
    path = runs.write_recipe(tmp_path / "a.toml")
    assert refuses("train", path, "training.nothing=1", says=["training.nothing"])


@pytest.mark.usefixtures("on")
def test_every_command_says_so(longwave):
    assert longwave("recipes").err.splitlines()[0] == trial.NOTE


def install() -> ModuleType:
    """The script that `make` installs with."""
    spec = importlib.util.spec_from_file_location("install", ROOT / "tools/install.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("system", "gpu", "answers", "indexes"),
    [
        ("Linux", False, True, ["cpu", None]),  # None: what pip finds, should the first one fail
        ("Linux", False, False, [None]),
        ("Linux", True, True, [None]),
        ("Darwin", False, True, [None]),
    ],
)
def test_which_build_of_torch_is_installed(system, gpu, answers, indexes, monkeypatch, capsys):
    script, asked = install(), []
    monkeypatch.setattr(script, "find_spec", lambda name: None)
    monkeypatch.setattr(script.platform, "system", lambda: system)
    monkeypatch.setattr(script, "has_gpu", lambda: gpu)
    monkeypatch.setattr(script, "answers", lambda index: answers)
    monkeypatch.setattr(script, "pip", lambda *words: asked.append(words) or 1)
    assert script.install_torch("cpu") == 1
    assert [words[1] if words[0] == "--index-url" else None for words in asked] == indexes
    assert all("torch>=" in words[-1] for words in asked)
    assert len(capsys.readouterr().out.splitlines()) == len(indexes), "what is downloaded is said before, each time"


def test_an_index_that_does_not_answer_is_given_up_soon():
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        began = time.monotonic()
        assert not install().answers(f"http://127.0.0.1:{silent.getsockname()[1]}", seconds=0.3)
        assert time.monotonic() - began < 5
