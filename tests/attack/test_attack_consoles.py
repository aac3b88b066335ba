"""Standard streams that are closed, full, broken, or in an encoding that lacks what is written: nothing is lost."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import runs
from attacks import Attacker, Outcome, attack, series

ENCODINGS = ("utf-8", "ascii", "latin-1", "cp1252", "cp437", "koi8-r", "utf-16", "shift_jis")
SINKS = (None, "", "", "/dev/null", "/dev/full", "broken")
ODD_NAME = "ключ-日本-\udcff"  # as Python reads a name of bytes that are no UTF-8


@pytest.fixture(scope="module")
def work(model: Path, recipe: Path) -> dict[str, tuple[list[Any], str | None]]:
    """Commands by name, with what each leaves in its folder."""
    return {
        "doctor": (["doctor"], None),
        "plan": (["plan", model], None),
        "prepare": (["prepare", runs.corpus(), "data", "--vocab-size", "300", "--held-out", "0.3"], "data/meta.json"),
        "train": (["train", recipe, "--output", "run"], "run/model/config.json"),
        "eval": (["eval", model, runs.prepared()], None),
        "generate": (["generate", model, "--prompt", "日本 def f(", "--max-new-tokens", "9"], None),
        "inspect": (["inspect", model, "--text", "日本 def f(", "--output", "page.html"], "page.html"),
        "help": (["--help"], None),
        "a mistake": (["plan", ODD_NAME], None),
        "an odd name": (["inspect", model, "--text", "x", "--output", f"{ODD_NAME}.html"], f"{ODD_NAME}.html"),
    }


@series(600, cut=12)
def test_any_console(attacker: Attacker, work: dict[str, tuple[list[Any], str | None]], numbers: Sequence[int]):
    def attempt(draw: random.Random, number: int) -> Outcome:
        shutil.rmtree(attacker.work, ignore_errors=True)
        attacker.work.mkdir()
        words, left = work[draw.choice(sorted(work))]
        outcome = attacker.run(
            *words,
            *["--json"] * (draw.random() < 0.3 and words != ["--help"]),
            stdin=draw.choice([None, b"", b"x"]),
            stdout=draw.choice(SINKS),
            stderr=draw.choice(SINKS),
            encoding=draw.choice(ENCODINGS),
        )
        assert left is None or os.path.exists(os.fsencode(attacker.work / left)), f"{left} is lost: {outcome}"
        return outcome

    attack("consoles", numbers, attempt)


def test_a_closed_stdout_is_no_failure_and_takes_no_other_file(attacker: Attacker, work: dict[str, Any]):
    shutil.rmtree(attacker.work, ignore_errors=True)
    attacker.work.mkdir()
    for name in ("train", "prepare", "inspect", "eval"):
        outcome = attacker.run(*work[name][0], stdin=None, stdout=None, stderr=None)
        assert outcome.code == 0, name
    assert json.loads((attacker.work / "data/meta.json").read_text())


@pytest.mark.parametrize("sink", ["/dev/full", "broken"])
def test_what_cannot_be_written_is_an_error_after_the_work(attacker: Attacker, work: dict[str, Any], sink: str):
    shutil.rmtree(attacker.work / "data", ignore_errors=True)
    outcome = attacker.run(*work["prepare"][0], stdout=sink)
    assert outcome.code == 1
    assert (attacker.work / "data/meta.json").exists()
    assert "No space left" in outcome.err or sink == "broken"


CLOSINGS = ("", ">&-", "2>&-", "<&-", ">&- 2>&- <&-", ">/dev/full", "| true")
SLOW = [(encoding, closing) for encoding in ("utf-8", "ascii", "cp1252") for closing in CLOSINGS][:-1]


@pytest.mark.parametrize(
    ("encoding", "closing"), [("cp1252", "| true"), *(pytest.param(*one, marks=pytest.mark.attack) for one in SLOW)]
)
def test_a_real_process(model: Path, encoding: str, closing: str):
    """As a shell starts it, without the frame of the other tests."""
    command = f'"{sys.executable}" -m longwave generate "{model}" --prompt "日本 def f(" --max-new-tokens 9 {closing}'
    environment = {**os.environ, "PYTHONIOENCODING": encoding, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(["bash", "-c", command], capture_output=True, env=environment, timeout=120)
    shown = done.stderr.decode(encoding, "replace")
    assert done.returncode in (0, 1), shown
    assert "Traceback" not in shown
    assert "Exception ignored" not in shown
    assert shown.count("longwave: ") <= 1
