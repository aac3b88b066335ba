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


def test_seconds_beyond_importing_torch():
    """Of the fastest of three processes, since a busy machine only ever adds to it."""
    clock = "time.perf_counter() - began"
    program = f"import torch, time; began = time.perf_counter()\nimport longwave; first = {clock}\n{HELP}\n"
    runs = [last_line(f"{program}print(first, {clock})").split() for _ in range(3)]
    importing, helping = (min(map(float, times)) for times in zip(*runs, strict=True))
    assert importing < 0.3
    assert helping < 0.5


def test_every_lazy_name_is_there_and_shown():
    import longwave

    assert [name for name in longwave.__all__ if name not in dir(longwave)] == []
    assert all(getattr(longwave, name) is not None for name in longwave.__all__)
    assert set(longwave._HOMES) < set(longwave.__all__)
