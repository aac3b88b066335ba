"""The frame of the attacks: a command line is tried in bounds, and its outcome is right or one line.

    attacker = Attacker(folder)
    outcome = attacker.run("plan", path)
    assert outcome.wrong == ""

Every try is made from its number alone, so that one that went wrong can be made again: `longwave` runs it in the order
that the failing test prints. The time is that of the processor, since others may work on the same machine.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
MOST_SECONDS, MOST_BYTES, LONGEST_LINE = 5.0, 1 << 30, 4096
GOOD_CODES = (0, 1, 2)


@dataclass(frozen=True)
class Outcome:
    """What a try gave. grown: bytes of resident memory beyond those of the imports. heard: whether stderr was read."""

    words: tuple[str, ...]
    code: int
    out: str
    err: str
    seconds: float
    grown: int
    heard: bool = True

    @property
    def wrong(self) -> str:
        """Why this is not an answer that anybody should get; empty where it is one."""
        lines = [line for line in self.err.splitlines() if line.startswith("longwave: ")]
        faults = {
            f"exit code {self.code}": self.code not in GOOD_CODES,
            "a traceback": "Traceback" in self.err or 'File "' in self.err,
            f"{len(lines)} lines of errors": len(lines) > 1 or (self.code == 0 and bool(lines)),
            "no line of an error": self.heard and self.code == 2 and not lines,
            "a line too long": any(len(line) > LONGEST_LINE for line in lines),
            f"{self.seconds:.1f} s": self.seconds > MOST_SECONDS,
            f"{self.grown >> 20} MiB": self.grown > MOST_BYTES,
        }
        return ", ".join(fault for fault, is_so in faults.items() if is_so)

    def __str__(self) -> str:
        end = " | ".join(self.err.splitlines()[-3:])
        return f"{' '.join(self.words)!r:.300}: {self.wrong or self.code}: {end[-600:]}"


@dataclass
class Attacker:
    """Runs command lines in forks of a process that has imported everything (`zygote.py`).

    home: a folder of its own, in which the commands run.
    """

    home: Path
    _zygote: subprocess.Popen[str] = field(init=False)

    def __post_init__(self) -> None:
        self.work = self.home / "work"
        self.work.mkdir(parents=True, exist_ok=True)
        settings = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
        environment = {**os.environ, **settings, "PYTHONPATH": str(HERE.parents[1])}
        self._zygote = subprocess.Popen(
            [sys.executable, str(HERE / "zygote.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )

    def run(
        self,
        *words: object,
        stdin: bytes | str | None = b"",
        stdout: str | None = "",
        stderr: str | None = "",
        encoding: str = "utf-8",
        killed_after: float | None = None,
        **environment: str,
    ) -> Outcome:
        """Runs one command line, or a program of Python whose file is the first word.

        stdin: its content, or the path of a file or FIFO. stdout, stderr: where they go, in place of a file that is
        read back: a path, `broken` for a pipe without a reader. None for a stream that is closed.
        killed_after: seconds after which it is killed, if it still runs; it has no other bounds then.
        """
        files = {name: self.home / name for name in ("stdin", "stdout", "stderr")}
        for name in ("stdout", "stderr"):
            files[name].write_bytes(b"")
        if isinstance(stdin, bytes):
            files["stdin"].write_bytes(stdin)
            stdin = str(files["stdin"])
        request = {
            "words": list(map(str, words)),
            "folder": str(self.work),
            "environment": environment,
            "encoding": encoding,
            "killed_after": killed_after,
            "stdin": stdin,
            "stdout": str(files["stdout"]) if stdout == "" else stdout,
            "stderr": str(files["stderr"]) if stderr == "" else stderr,
        }
        answer = self._ask(request)
        shown = {name: files[name].read_bytes().decode(encoding, "replace") for name in ("stdout", "stderr")}
        heard = stderr == ""
        return Outcome(tuple(map(str, words)), out=shown["stdout"], err=shown["stderr"], heard=heard, **answer)

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self._zygote.stdin is not None
        assert self._zygote.stdout is not None
        print(json.dumps(request), file=self._zygote.stdin, flush=True)
        line = self._zygote.stdout.readline()
        assert line, "the process that runs the tries has ended"
        return json.loads(line)

    def close(self) -> None:
        self._zygote.communicate()


Try = Callable[[random.Random, int], Outcome]


def series(count: int, cut: int, size: int = 25) -> Any:
    """Parametrizes a test by the numbers of its tries: `cut` of them always, all `count` under `make test-attack`."""
    rest = [range(first, min(first + size, count)) for first in range(cut, count, size)]
    marked = [pytest.param(numbers, marks=pytest.mark.attack) for numbers in rest]
    return pytest.mark.parametrize("numbers", [range(cut), *marked], ids=lambda one: f"{one.start}-{one.stop}")


def attack(name: str, numbers: Sequence[int], attempt: Try) -> None:
    """Makes tries of these numbers, each from a generator of its own; fails with every one that went wrong."""
    outcomes = {number: attempt(random.Random(f"{name} {number}"), number) for number in numbers}
    wrong = [f"try {number}: {outcome}" for number, outcome in outcomes.items() if outcome.wrong]
    most = max(outcomes.values(), key=lambda one: one.seconds), max(outcomes.values(), key=lambda one: one.grown)
    print(f"{name}: at most {most[0].seconds:.2f} s ({most[0]}) and {most[1].grown >> 20} MiB ({most[1]})")
    assert not wrong, "\n".join([f"{len(wrong)} of {len(numbers)} tries", *wrong])
