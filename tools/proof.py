"""The conversion proof, part by part: `python tools/proof.py teacher cut` runs the commands of these parts.

The commands stand in docs/conversion.md, in blocks titled `proof: PART`, and run in the folder in which this begins.
Stopped or killed at any moment, the same command goes on where it was: trainings and conversions continue by
themselves, what was prepared stays, and what an evaluation found is kept in `proof/results.json`, by its command.
Standard library only.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

PAGE = Path(__file__).resolve().parents[1] / "docs/conversion.md"
RESULTS = Path("proof/results.json")
_BLOCK = re.compile(r'^```sh title="proof: ([\w-]+)"\n(.*?)^```$', re.MULTILINE | re.DOTALL)


def parts(page: str) -> dict[str, list[str]]:
    """The commands of every part, in the order of the page."""
    found: dict[str, list[str]] = {}
    for name, body in _BLOCK.findall(page):
        found.setdefault(name, []).extend(line for line in body.splitlines() if line.strip())
    return found


def read_results() -> dict[str, Any]:
    """What evaluations found, by their commands."""
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else {}


def keep(command: str, result: Mapping[str, Any]) -> None:
    """Writes the results with one more, whole or not at all."""
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    staging = RESULTS.with_suffix(".new")
    staging.write_text(json.dumps({**read_results(), command: result}, indent=1) + "\n")
    os.replace(staging, RESULTS)


def is_done(command: str) -> bool:
    """Whether a command has nothing left to do: an evaluation that was kept, or a folder that was prepared."""
    words = shlex.split(command)
    prepared = [word for word in words[2:] if not word.startswith("-")][1:2] if words[1] == "prepare" else []
    return command in read_results() or any(Path(folder).exists() for folder in prepared)


def run(command: str) -> int:
    """Runs a command of longwave and keeps what an evaluation found; its exit code."""
    words = shlex.split(command)
    evaluates = words[1] == "eval"
    asked = [sys.executable, "-m", "longwave", *words[1:], *(["--json"] if evaluates else [])]
    done = subprocess.run(asked, stdout=subprocess.PIPE if evaluates else None, text=True, check=False)
    if evaluates and done.returncode == 0:
        keep(command, without_hits(json.loads(done.stdout.splitlines()[-1])))
    return done.returncode


def without_hits(result: dict[str, Any]) -> dict[str, Any]:
    """An evaluation without the outcome of every single sample, which would be most of it."""
    recall = [{name: value for name, value in one.items() if name != "hits"} for one in result["recall"]]
    return result | {"recall": recall}


def commands(known: Mapping[str, Sequence[str]], asked: Sequence[str]) -> Iterator[str]:
    """The commands of the parts that are asked for; a line and exit code 2 for one that the page does not have."""
    strange = [name for name in asked if name not in known]
    if strange or not asked:
        print(f"proof: {' '.join(strange) or 'no part'}: the parts are {', '.join(known)}", file=sys.stderr)
        raise SystemExit(2)
    for name in asked:
        yield from known[name]


def main(asked: Sequence[str]) -> int:
    """Runs what is not done yet of these parts, up to the first command that fails."""
    for command in commands(parts(PAGE.read_text(encoding="utf8")), asked):
        if is_done(command):
            continue
        print(f"$ {command}", flush=True)
        began = time.monotonic()
        if code := run(command):
            return code
        print(f"  {(time.monotonic() - began) / 60:.1f} minutes", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
