"""Runs command lines in forks of one process that has imported everything: a try costs milliseconds, not seconds.

    python zygote.py    # one JSON request a line on stdin, one JSON answer a line on stdout

Each try has its own standard streams, folder and environment, and is bounded: 5 s of processor time, a minute of the
clock, and so many GiB of address space more than the zygote has; or it is killed after so many seconds (`kill -9`). A
program of Python (`NAME.py`) stands in place of a command line where its file is the first word. `attacks.py` is the
other side. POSIX only.
"""

from __future__ import annotations

import io
import json
import os
import resource
import runpy
import signal
import sys
import time
import traceback
from typing import Any, NoReturn

CPU_SECONDS, CLOCK_SECONDS, ADDRESS_BYTES = 5.0, 60.0, 6 << 30
_PRELOADED = (
    *("longwave.api", "longwave.evaluation.held_out", "longwave.inspection.inspect", "longwave.training.loop"),
    *("longwave.data.shards", "longwave.data.chat", "longwave.planning", "longwave.reports.inspect", "rich.table"),
    *("longwave.hf", "transformers.models.auto.tokenization_auto", "transformers.tokenization_utils_tokenizers"),
)


def attempt(request: dict[str, Any]) -> dict[str, Any]:
    """Runs a command line in a fork. code: its exit code, negative for the signal that killed it."""
    before = resident_bytes()
    pid = os.fork()
    if pid == 0:
        _child(request)
    if request["killed_after"] is not None:
        _kill_after(pid, request["killed_after"])
    _, status, used = os.wait4(pid, 0)
    seconds = used.ru_utime + used.ru_stime
    return {"code": os.waitstatus_to_exitcode(status), "seconds": seconds, "grown": used.ru_maxrss * 1024 - before}


def _kill_after(pid: int, seconds: float) -> None:
    """Kills a process once so many seconds have passed, unless it has ended before."""
    deadline = time.monotonic() + seconds
    while os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        if time.monotonic() > deadline:
            return os.kill(pid, signal.SIGKILL)
        time.sleep(0.001)


def resident_bytes() -> int:
    """The resident bytes that a fork has from its beginning: all but those of mapped files."""
    with open("/proc/self/statm", encoding="ascii") as file:
        _, resident, shared, *_ = map(int, file.read().split())
    return (resident - shared) * resource.getpagesize()


def _child(request: dict[str, Any]) -> NoReturn:
    code = 70
    try:
        if request["killed_after"] is None:
            _bound()
        _streams(request)
        os.environ.update(request["environment"])
        os.chdir(request["folder"])
        code = _called(request["words"])
        code = _ended(code)
    finally:
        os._exit(code)


def _bound() -> None:
    for timer, number, seconds in (
        (signal.ITIMER_PROF, signal.SIGPROF, CPU_SECONDS),
        (signal.ITIMER_REAL, signal.SIGALRM, CLOCK_SECONDS),
    ):
        signal.signal(number, signal.SIG_DFL)
        signal.setitimer(timer, seconds)
    with open("/proc/self/statm", encoding="ascii") as file:
        held = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (held + ADDRESS_BYTES, held + ADDRESS_BYTES))


def _streams(request: dict[str, Any]) -> None:
    """The standard streams as Python makes them when it starts: files, or None where one is closed."""
    for number, (name, path, mode) in enumerate(
        (("stdin", request["stdin"], "r"), ("stdout", request["stdout"], "w"), ("stderr", request["stderr"], "w"))
    ):
        if path is None:
            os.close(number)
            setattr(sys, name, None)
            continue
        flags = os.O_RDONLY if mode == "r" else os.O_WRONLY | os.O_CREAT | os.O_TRUNC
        opened = _broken_pipe() if path == "broken" else os.open(path, flags)
        os.dup2(opened, number)
        os.close(opened)
        errors = "backslashreplace" if name == "stderr" else "strict"
        raw = os.fdopen(number, f"{mode}b", closefd=False)
        stream = io.TextIOWrapper(raw, encoding=request["encoding"], errors=errors, line_buffering=number == 2)
        setattr(sys, name, stream)


def _broken_pipe() -> int:
    reader, writer = os.pipe()
    os.close(reader)
    return writer


def _program(words: list[str]) -> int:
    sys.argv, sys.path[:0] = words, [os.path.dirname(words[0])]
    runpy.run_path(words[0], run_name="__main__")
    return 0


def _called(words: list[str]) -> int:
    from longwave.cli import main

    try:
        return _program(words) if words[0].endswith(".py") else main(words)
    except SystemExit as exit:
        return exit.code if isinstance(exit.code, int) else 0 if exit.code is None else 1
    except BaseException:
        traceback.print_exc()
        return 1


def _ended(code: int) -> int:
    """What Python does at its end: it writes what is left, and exits with 120 where it cannot."""
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except (OSError, ValueError):
            code = 120
    return code


def main() -> None:
    from importlib import import_module

    import torch

    torch.set_num_threads(1)
    for name in _PRELOADED:
        import_module(name)
    requests, answers = os.fdopen(os.dup(0), encoding="ascii"), os.fdopen(os.dup(1), "w", encoding="ascii")
    for line in requests:
        print(json.dumps(attempt(json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    main()
