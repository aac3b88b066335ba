"""Importing longwave and asking for help stay light: nothing heavy is loaded, and little time is spent."""

import subprocess
import sys

import pytest

HEAVY = ("torch", "transformers", "accelerate", "datasets", "tokenizers", "matplotlib", "peft", "pydantic", "pandas")
HELP = "from contextlib import suppress\nwith suppress(SystemExit): import longwave.cli; longwave.cli.main(['--help'])"


def last_line(program: str) -> str:
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    return done.stdout.splitlines()[-1]


@pytest.mark.parametrize("code", ["import longwave", "import longwave.cli", HELP], ids=["import", "cli", "help"])
def test_nothing_heavy_is_loaded(code: str):
    assert last_line(f"{code}\nimport sys; print([name for name in {HEAVY!r} if name in sys.modules])") == "[]"


@pytest.mark.parametrize(("code", "limit"), [("import longwave", 0.3), (HELP, 0.5)], ids=["import", "help"])
def test_seconds_beyond_importing_torch(code: str, limit: float):
    """Of the fastest of three processes, since a busy machine only ever adds to it."""
    clock = "import torch, time; began = time.perf_counter()"
    program = f"{clock}\n{code}\nprint(time.perf_counter() - began)"
    assert min(float(last_line(program)) for _ in range(3)) < limit
