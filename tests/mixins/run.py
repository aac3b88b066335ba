"""Runs the test mixins of `transformers` on longwave's classes: `make test-mixins`, two minutes on one core.

The mixins lie in the source distribution of transformers, which pip fetches once into `.cache/` (11 MB). Those of
generation are not in it: `GENERATION=path/to/tests/generation/test_utils.py`, from transformers' repository at the tag
of the installed version, runs them too. `LAYOUTS="2F, F W"` runs some layouts alone.

A layout of F and W blocks has to pass what transformers' own Llama passes, but for the names that
`docs/transformers.md` lists with their reasons; exit code 1 if it does not.
"""

from __future__ import annotations

import importlib
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections import defaultdict
from pathlib import Path

import pytest
import torch
import transformers

ROOT = Path(__file__).parents[2]
CACHE = ROOT / ".cache" / f"transformers-{transformers.__version__}"
TESTER, DOCUMENT = "test_longwave_layouts.py", ROOT / "docs/transformers.md"
# What the mixins import from files that the source distribution leaves out.
STUBS = {
    "exporters/test_export.py": "class ExportTesterMixin:\n    pass\n",
    "generation/test_utils.py": "class GenerationTesterMixin:\n    pass\n",
    "utils/test_configuration_utils.py": "config_common_kwargs = {'output_hidden_states': True}\n",
}


class Outcomes:
    """A plugin of pytest that notes the outcome of every test, by its class; a failed subtest fails its test."""

    def __init__(self) -> None:
        self.found: dict[str, dict[str, str]] = defaultdict(dict)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        _, made, test = report.nodeid.split("::")[:3]
        before = self.found[made].get(test)
        if report.failed:
            self.found[made][test] = "failed"
        elif report.when == "call" and before != "failed":
            self.found[made][test] = before if before == "skipped" else report.outcome
        elif report.skipped:
            self.found[made][test] = "skipped"

    def names(self, made: str, outcome: str) -> set[str]:
        return {test for test, one in self.found[made].items() if one == outcome}


def fetch() -> None:
    """Puts the mixins of the installed version into the cache, unless they are there."""
    if (CACHE / "tests/test_modeling_common.py").exists():
        return
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    source = f"transformers=={transformers.__version__}"
    print(f"fetching the source distribution of {source} (11 MB) into {CACHE.relative_to(ROOT)} ...")
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([*pip, "download", "--no-deps", "--no-binary", "transformers", source, "-d", folder], check=True)
        with tarfile.open(next(Path(folder).glob("*.tar.gz"))) as archive:
            inside = [member for member in archive.getmembers() if member.name.split("/")[1:2] == ["tests"]]
            archive.extractall(folder, members=inside, filter="data")
        subprocess.run([*pip, "install", "--target", str(CACHE / "site"), "parameterized"], check=True)
        shutil.copytree(next(Path(folder).glob("*/tests")), CACHE / "tests", dirs_exist_ok=True)


def prepare() -> None:
    """Puts longwave's tester beside the mixins, and stubs where the source distribution has nothing."""
    for file, text in STUBS.items():
        path = CACHE / "tests" / file
        path.parent.mkdir(exist_ok=True)
        (path.parent / "__init__.py").touch()
        path.write_text(text)
    if generation := os.environ.get("GENERATION"):
        shutil.copy(generation, CACHE / "tests/generation/test_utils.py")
    (CACHE / "tests/__init__.py").touch()
    (CACHE / "pytest.ini").write_text("[pytest]\n")
    shutil.copy(Path(__file__).with_name("layouts.py"), CACHE / "tests" / TESTER)


def chosen() -> dict[str, str]:
    """The test class of every layout that is to run."""
    layouts = list(importlib.import_module(f"tests.{TESTER.removesuffix('.py')}").LAYOUTS)
    asked = [name.strip() for name in os.environ.get("LAYOUTS", ", ".join(layouts)).split(",")]
    return {name: f"Layout{layouts.index(name)}Test" for name in asked}


def excused() -> dict[str, str]:
    """The tests that a layout of F and W need not pass, and why, as the document lists them."""
    return dict(re.findall(r"^\| `(test_\w+)` \| (.+) \|$", DOCUMENT.read_text(), re.MULTILINE))


def report(outcomes: Outcomes, classes: dict[str, str]) -> int:
    """Prints how many tests pass, and for F and W which do not though they should; the exit code."""
    theirs, reasons, wrong = outcomes.names("LlamaTest", "passed"), excused(), 0
    print(f"\ntransformers {transformers.__version__}, torch {torch.__version__}: tests passed, failed, skipped")
    for name, made in {"transformers' Llama": "LlamaTest", **classes}.items():
        counts = [len(outcomes.names(made, outcome)) for outcome in ("passed", "failed", "skipped")]
        print(f"  {name:<22}", *(f"{count:>5}" for count in counts))
        missed = theirs - outcomes.names(made, "passed") if made != "LlamaTest" else set()
        if re.fullmatch(r"[\dFW ]+(tied)?", name) and (left := missed - set(reasons)):
            print("    without a reason in docs/transformers.md:", *sorted(left))
            wrong += len(left)
        elif os.environ.get("VERBOSE"):
            print("    not passed:", *sorted(missed))
    return 1 if wrong or not theirs else 0


def main() -> int:
    fetch()
    prepare()
    sys.path[:0] = [str(ROOT), str(CACHE), str(CACHE / "site")]
    os.chdir(CACHE)
    classes, outcomes = chosen(), Outcomes()
    wanted = " or ".join(["LlamaTest", *classes.values()])
    pytest.main(
        ["-q", "--tb=line", "-p", "no:cacheprovider", "-W", "ignore", f"tests/{TESTER}", "-k", wanted],
        plugins=[outcomes],
    )
    return report(outcomes, classes)


if __name__ == "__main__":
    sys.exit(main())
