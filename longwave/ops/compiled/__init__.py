"""C kernels for the CPU, built once per machine by its own C compiler and called through ctypes.

They are there for two uses (docs/log.md): decoding, which does little arithmetic on much memory, and in which torch's
CPU kernels reach a third to a half of the bandwidth; and block-sparse attention, for which torch has no kernel. Without
a compiler, or with LONGWAVE_COMPILED=0, the ops run their torch forms, and `longwave doctor` says so.

- Built at first use (a few seconds) into the user's cache folder (`cache.py`), under a name that hashes sources, flags,
  compiler and processor.
- Whatever goes wrong is a reason why there are no compiled forms, and never ends a command.
- The kernels are plain C in GCC's and Clang's vector extension, with OpenMP; no header of torch or Python.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

from longwave.errors import cut
from longwave.ops.compiled import cache
from longwave.ops.compiled.cache import Unavailable

_OPS = Path(__file__).parent.parent
_FLAGS = ("-O3", "-march=native", "-ffp-contract=fast", "-fno-math-errno", "-fopenmp", "-shared", "-fPIC")
_SWITCH = "LONGWAVE_COMPILED"
_LONGEST_BUILD, _LONGEST_ANSWER = 300.0, 20.0  # seconds: a build takes a few, on a busy machine a minute


def is_available() -> bool:
    """Whether the kernels can be used; builds them if they have never been built on this machine."""
    return why_not() is None


@functools.cache
def why_not() -> str | None:
    """The reason why the kernels cannot be used, or None; builds them like `is_available`."""
    try:
        library()
    except (Unavailable, OSError) as error:  # OSError: a compiler that cannot be started, a full disk
        return " ".join(str(error).split())
    return None


@functools.cache
def library() -> ctypes.CDLL:
    """The loaded kernels. Raises Unavailable where they cannot be built or loaded."""
    if os.environ.get(_SWITCH) == "0":
        raise Unavailable(f"{_SWITCH}=0")
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        raise Unavailable("no C compiler (cc, gcc or clang)")
    sources = sorted(_OPS.glob("*/*.c"))
    name = f"kernels-{_fingerprint(compiler, sources)}"
    path = cache.find(name) or cache.keep(name, _build(compiler, sources))
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise Unavailable(f"{path} cannot be loaded: {error}") from None


def _build(compiler: str, sources: list[Path]) -> bytes:
    """The shared library of the sources; a line on stderr says why the first use of a machine takes longer."""
    if sys.stderr is not None:  # as in a process without standard streams
        with suppress(OSError, ValueError):  # a stream that is closed: what is said here decides nothing
            print("building longwave's C kernels for this machine, once: some seconds", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory(dir=cache.folder(), ignore_cleanup_errors=True) as folder:
        built = Path(folder) / "kernels.so"
        done = _run([compiler, *_FLAGS, *map(str, sources), "-o", str(built), "-lm"], _LONGEST_BUILD)
        if done.returncode:
            lines = done.stderr.decode(errors="replace").strip().splitlines() or ["no message"]
            raise Unavailable(f"{compiler} failed: {cut(lines[-1])}")
        return built.read_bytes()


def _run(command: list[str], seconds: float) -> subprocess.CompletedProcess[bytes]:
    """Runs the compiler, which gets no input, and is stopped with all that it has started after so many seconds."""
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
    ) as process:
        try:
            output, problems = process.communicate(timeout=seconds)
        except BaseException as error:  # an interrupt, too: the session of its own would not see it
            os.killpg(process.pid, signal.SIGKILL)
            if isinstance(error, subprocess.TimeoutExpired):
                raise Unavailable(f"{command[0]} did not end within {seconds:.0f} seconds") from None
            raise
    return subprocess.CompletedProcess(command, process.returncode, output, problems)


def _fingerprint(compiler: str, sources: list[Path]) -> str:
    """A hash of all that a build depends on: sources, headers, flags, compiler and the processor's features."""
    version = _run([compiler, "--version"], _LONGEST_ANSWER).stdout
    parts = [" ".join(_FLAGS).encode(), version, platform.machine().encode(), _processor()]
    parts += [path.read_bytes() for path in [*sources, *sorted(_OPS.glob("*/*.h"))]]
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()[:16]


def _processor() -> bytes:
    """The processor's model and features, since `-march=native` makes a build of its own for each."""
    try:
        lines = Path("/proc/cpuinfo").read_bytes().splitlines()
    except OSError:
        return platform.processor().encode()
    return b"".join(line for line in dict.fromkeys(lines) if line.startswith((b"flags", b"Features", b"model")))
