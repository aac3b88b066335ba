"""C kernels for the CPU, built once per machine by its own C compiler and called through ctypes.

They are there for two uses (docs/log.md): decoding, which does little arithmetic on much memory, and in which torch's
CPU kernels reach a third to a half of the bandwidth; and block-sparse attention, for which torch has no kernel. Without
a compiler, or with LONGWAVE_COMPILED=0, the ops run their torch forms, and `longwave doctor` says so.

- Built at first use (a few seconds) into the user's cache folder, under a name that hashes sources, flags, compiler
  and processor; a build appears whole or not at all.
- The kernels are plain C in GCC's and Clang's vector extension, with OpenMP; no header of torch or Python.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

_OPS = Path(__file__).parent.parent
_FLAGS = ("-O3", "-march=native", "-ffp-contract=fast", "-fno-math-errno", "-fopenmp", "-shared", "-fPIC")
_SWITCH = "LONGWAVE_COMPILED"


class Unavailable(RuntimeError):
    """The compiled kernels cannot be used; the message says why."""


def is_available() -> bool:
    """Whether the kernels can be used; builds them if they have never been built on this machine."""
    return why_not() is None


@cache
def why_not() -> str | None:
    """The reason why the kernels cannot be used, or None; builds them like `is_available`."""
    try:
        library()
    except Unavailable as error:
        return str(error)
    return None


@cache
def library() -> ctypes.CDLL:
    """The loaded kernels. Raises Unavailable where they cannot be built or loaded."""
    if os.environ.get(_SWITCH) == "0":
        raise Unavailable(f"{_SWITCH}=0")
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        raise Unavailable("no C compiler (cc, gcc or clang)")
    sources = sorted(_OPS.glob("*/*.c"))
    target = _cache_folder() / f"kernels-{_fingerprint(compiler, sources)}.so"
    if not target.exists():
        _build(compiler, sources, target)
    try:
        return ctypes.CDLL(str(target))
    except OSError as error:
        raise Unavailable(f"{target} cannot be loaded: {error}") from None


def _build(compiler: str, sources: list[Path], target: Path) -> None:
    """Compiles into a temporary folder and renames the result, so that processes that build at once do not collide."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            built = Path(folder) / target.name
            command = [compiler, *_FLAGS, *map(str, sources), "-o", str(built), "-lm"]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                lines = done.stderr.strip().splitlines() or ["no message"]
                raise Unavailable(f"{compiler} failed: {lines[-1]}")
            built.replace(target)
    except OSError as error:
        raise Unavailable(f"{target.parent}: {error.strerror or error}") from None


def _cache_folder() -> Path:
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "longwave"


def _fingerprint(compiler: str, sources: list[Path]) -> str:
    """A hash of all that a build depends on: sources, headers, flags, compiler and the processor's features."""
    version = subprocess.run([compiler, "--version"], capture_output=True, check=False).stdout
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
