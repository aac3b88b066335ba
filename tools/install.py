"""Installs longwave in the environment of the Python that runs this: `python tools/install.py [EXTRA]`.

PyTorch goes first. Where there is no NVIDIA GPU its CPU build is taken from PyTorch's own index, if that answers; the
package index has the build with CUDA for Linux, which is many times as large. Standard library only.
"""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
import sys
import tomllib
from importlib.util import find_spec
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

ROOT = Path(__file__).resolve().parents[1]
SIZES = {  # to download, and on the disk
    "cpu": "longwave with PyTorch's CPU build: about 0.25 GB, 1.2 GB on the disk",
    "any": "longwave with PyTorch as the package index has it: with CUDA (Linux) several GB, else about 0.25 GB",
    "dev": "what tests, linters and the documentation need beside it: 1 GB more on the disk",
}


def wants_cpu_build(system: str, has_gpu: bool) -> bool:
    """Whether the CPU build is to be looked for: elsewhere than on Linux the package index has no other."""
    return system == "Linux" and not has_gpu


def has_gpu() -> bool:
    """Whether the driver of an NVIDIA GPU is here."""
    return shutil.which("nvidia-smi") is not None or Path("/proc/driver/nvidia/version").exists()


def answers(index: str, seconds: float = 5.0) -> bool:
    """Whether a package index answers quickly."""
    try:
        with urlopen(f"{index}/torch/", timeout=seconds) as response:
            return response.status == 200
    except (OSError, URLError, ValueError):
        return False


def torch_requirement() -> str:
    """PyTorch with the versions that pyproject.toml allows."""
    dependencies = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    return next(one for one in dependencies if re.match(r"torch\b", one))


def pip(*arguments: str) -> int:
    """Runs `pip install` in this environment."""
    return subprocess.call([sys.executable, "-m", "pip", "install", "--disable-pip-version-check", *arguments])


def install_torch(index: str | None) -> int:
    """Installs PyTorch unless it is there; from the package index where the given one does not have it."""
    if find_spec("torch") is not None:
        return 0
    if index and wants_cpu_build(platform.system(), has_gpu()) and answers(index):
        print(f"downloading {SIZES['cpu']}", flush=True)
        if pip("--index-url", index, torch_requirement()) == 0:
            return 0
    print(f"downloading {SIZES['any']}", flush=True)
    return pip(torch_requirement())


def main(extra: str = "", index: str | None = None) -> int:
    """Installs PyTorch, then longwave (editable) with an extra; returns pip's exit code."""
    if code := install_torch(index):
        return code
    if extra:
        print(f"downloading {SIZES['dev']}", flush=True)
    return pip("--quiet", "--editable", f"{ROOT}[{extra}]" if extra else str(ROOT))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
