"""tools/proof.py: the commands of a page, run once each, going on where they were stopped; tools/proof_page.py."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = """
```sh title="proof: teacher"
longwave prepare stdlib proof/text --vocab-size 2048
longwave train some-recipe --output proof/teacher
longwave eval proof/teacher/model --tasks single
```

```sh
longwave recipes
```

```sh title="proof: cut"
longwave convert proof/teacher/model proof/cut --recipe proof-cut
longwave eval proof/cut/model --tasks single
```
"""


def script_of(name: str) -> ModuleType:
    """A script of the folder `tools`."""
    spec = importlib.util.spec_from_file_location(name, ROOT / f"tools/{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def proof(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script, with the page above, in an empty folder, where commands only leave a line in a list."""
    module = script_of("proof")
    (tmp_path / "page.md").write_text(PAGE)
    monkeypatch.setattr(module, "PAGE", tmp_path / "page.md")
    monkeypatch.chdir(tmp_path)
    return module


def started(proof: ModuleType, monkeypatch: pytest.MonkeyPatch, fails: str = "nothing") -> list[str]:
    """The verbs of the commands that are started from now on; one of them fails."""
    verbs: list[str] = []

    def run(words: list[str], **others: Any) -> SimpleNamespace:
        verbs.append(words[3])
        if words[3] == "prepare":
            Path(words[5]).mkdir(parents=True, exist_ok=True)
        found = {"recall": [{"task": "single", "accuracy": 0.5, "hits": [True, False]}]}
        return SimpleNamespace(returncode=5 if words[3] == fails else 0, stdout=f"a table\n{json.dumps(found)}\n")

    monkeypatch.setattr(proof.subprocess, "run", run)
    return verbs


def test_parts_run_in_order_and_go_on_behind_what_failed(proof: ModuleType, monkeypatch: pytest.MonkeyPatch):
    first = started(proof, monkeypatch, fails="convert")
    assert proof.main(["teacher", "cut"]) == 5
    assert first == ["prepare", "train", "eval", "convert"]
    second = started(proof, monkeypatch)
    assert proof.main(["teacher", "cut"]) == 0
    assert second == ["train", "convert", "eval"], "trainings and conversions know themselves that they are finished"


def test_evaluations_are_kept_by_their_commands(proof: ModuleType, monkeypatch: pytest.MonkeyPatch):
    started(proof, monkeypatch)
    proof.main(["teacher"])
    kept = json.loads(Path("proof/results.json").read_text())
    assert kept == {
        "longwave eval proof/teacher/model --tasks single": {"recall": [{"task": "single", "accuracy": 0.5}]}
    }


@pytest.mark.parametrize("asked", [[], ["cutt"], ["teacher", "cutt"]])
def test_a_part_that_is_not_there_is_one_line(proof: ModuleType, asked: list[str], capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as stopped:
        proof.main(asked)
    assert stopped.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_the_page_has_every_part_that_the_makefile_names(proof: ModuleType):
    known = proof.parts((ROOT / "docs/conversion.md").read_text(encoding="utf8"))
    assert {"teacher", "cut"} <= known.keys()
    assert all(command.startswith("longwave ") for lines in known.values() for command in lines)


def test_the_tables_of_the_page_are_those_of_its_figures():
    page = (ROOT / "docs/conversion.md").read_text(encoding="utf8")
    script = script_of("proof_page")
    assert page.count("<!-- table: ") > 2
    assert script.filled(page) == page, "run python tools/proof_page.py"
