"""Measures the loading of a model folder in a process of its own: `python tests/loading_child.py FOLDER [REPEATS]`.

Prints one JSON object: the gigabytes of weights; how fast they are read from the page cache into a buffer that is used
again (`cached`, the speed of `dd`), and into new memory (`fresh`, the least that any loader has to do); how fast
`longwave.load` is, checksums compared (`load`), all in GB/s, medians of interleaved runs; and how much the peak of
resident memory grew while one model was loaded, over the bytes of its weights (`peak`). Give it a warm page cache.
"""

from __future__ import annotations

import json
import resource
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

import longwave
from longwave.model import Decoder


def main(folder: Path, repeats: int = 5) -> dict[str, float]:
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
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, way in ways.items():
            times[name].append(seconds(way))
    return {"gigabytes": total / 1e9, "peak": peak} | {
        name: total / 1e9 / statistics.median(one) for name, one in times.items()
    }


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
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), *map(int, sys.argv[2:]))))
