"""Measures the loading of a model folder in a process of its own: `python loading_child.py FOLDER [REPEATS]`.

Prints one JSON object: the gigabytes of weights; how fast they are read from the page cache into a buffer that is used
again (`cached`, the speed of `dd`), and into new memory (`fresh`, the least that any loader has to do); how fast
`longwave.load` is, checksums compared (`load`); all in GB/s, the best of some runs in a row, since others on a machine
(and a virtual machine's host, which has to find the memory) only ever slow one down. `peak` is how much the peak of
resident memory grew while a model was loaded, over the bytes of its weights. Linux only.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

import longwave
from longwave.model import Decoder


def main(folder: Path, repeats: int = 7) -> dict[str, float]:
    files = sorted(folder.glob("*.safetensors"))
    total = sum(path.stat().st_size for path in files)
    warm(files)
    before = peak_bytes()
    model = longwave.load(folder)
    peak = (peak_bytes() - before) / total
    assert isinstance(model, Decoder)
    del model
    ways: dict[str, Callable[[], object]] = {
        "cached": lambda: warm(files),
        "fresh": lambda: [fresh(path) for path in files],
        "load": lambda: longwave.load(folder),
    }
    best = {name: min(seconds(way) for _ in range(repeats)) for name, way in ways.items()}
    return {"gigabytes": total / 1e9, "peak": peak} | {name: total / 1e9 / one for name, one in best.items()}


def warm(files: list[Path]) -> None:
    buffer = memoryview(bytearray(1 << 20))
    for path in files:
        with open(path, "rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def fresh(path: Path) -> torch.Tensor:
    memory, at = torch.empty(path.stat().st_size, dtype=torch.uint8), 0
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(memory.numpy().data[at : at + (1 << 23)]):
            at += count
    return memory


def seconds(way: Callable[[], object]) -> float:
    begin = time.perf_counter()
    kept = way()
    taken = time.perf_counter() - begin
    del kept
    return taken


def peak_bytes() -> int:
    """The kernel's own mark; `getrusage` would count what the parent of this process held before it."""
    status = Path("/proc/self/status").read_text()
    return 1024 * next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM:"))


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), *map(int, sys.argv[2:]))))
