"""Times the products of few rows: kernels from several versions of few_rows.c, torch's product, and weights of int8.

    python tools/products_of_few_rows.py longwave/ops/linear/few_rows.c [OTHER.c ...]

Every source is built as the package builds its own. There are so many weights of each size that no cache holds them,
and every call takes the next, so that none finds what the one before it has read. All ways take turns, on one thread.
`op` is the package's own op, which weights of int8 are to be compared with. Prints a line of JSON for each size with
the median microseconds, and first the bandwidth that one core reads, as `longwave bench` measures it.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import subprocess
import tempfile
import time
from collections.abc import Callable
from itertools import cycle
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from longwave.benchmarks.measure.roofline import measure_peaks
from longwave.ops import compiled
from longwave.ops.linear import few_rows, int8

SIZES = ((768, 768), (2048, 768), (768, 2048), (4096, 4096))  # outputs, inputs
ROWS, REPEATS, HELD = (1, 2, 4, 8, 16, 24, 32, 64), 15, 200_000_000


def main() -> None:
    """Measures every size, number of rows and type."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sources", nargs="+", type=Path)
    parser.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16")
    options = parser.parse_args()
    torch.set_num_threads(1)
    dtype = torch.bfloat16 if options.dtype == "bf16" else torch.float32
    print(json.dumps({"bytes_a_second": measure_peaks(dtype).bandwidth}), flush=True)
    kernels = {source.stem: built(source) for source in options.sources}
    for outputs, inputs in SIZES:
        copies = max(1, HELD // (outputs * inputs * dtype.itemsize))
        weights = [torch.randn(outputs, inputs).to(dtype) for _ in range(copies)]
        packed = [int8.pack(weight) for weight in weights]
        for rows in ROWS:
            hidden = torch.randn(rows, inputs).to(dtype)
            turns, packed_turns = cycle(weights), cycle(packed)
            ways = {name: way(kernel, hidden, turns) for name, kernel in kernels.items()} | of_torch(hidden, turns)
            ways |= of_int8(hidden, packed_turns) if dtype == torch.bfloat16 else {}
            print(json.dumps({"size": [outputs, inputs], "rows": rows, "us": timed(ways)}), flush=True)


def built(source: Path) -> Any:
    """The kernel of a source, which may lie anywhere; the headers are the package's."""
    folder = Path(compiled.__file__).parent
    with tempfile.TemporaryDirectory() as place:
        made = Path(place) / "kernel.so"
        text = source.read_text().replace("../compiled/vectors.h", str(folder / "vectors.h"))
        command = ["cc", *compiled._FLAGS, "-x", "c", "-", "-o", str(made), "-lm"]
        subprocess.run(command, input=text, text=True, check=True)
        function = ctypes.CDLL(str(made)).longwave_linear
    function.restype = None
    function.argtypes = [ctypes.c_void_p] * 4 + [ctypes.c_int] + [ctypes.c_int64] * 3 + [ctypes.c_int]
    return function


def way(kernel: Any, hidden: Tensor, weights: cycle[Tensor]) -> Callable[[], object]:
    """A product by a kernel, with an output of its own as the op has it."""

    def run() -> None:
        weight = next(weights)
        output = hidden.new_empty(hidden.shape[0], weight.shape[0])
        sizes = (hidden.shape[0], weight.shape[1], weight.shape[0])
        is_bf16 = hidden.dtype == torch.bfloat16
        kernel(hidden.data_ptr(), weight.data_ptr(), None, output.data_ptr(), is_bf16, *sizes, 1)

    return run


def of_torch(hidden: Tensor, weights: cycle[Tensor]) -> dict[str, Callable[[], object]]:
    """torch's product, (W x^T)^T, and the package's op."""
    return {
        "op": lambda: few_rows.linear(hidden, next(weights), None),
        "F.linear": lambda: F.linear(hidden, next(weights)),
        "(W x^T)^T": lambda: torch.mm(next(weights), hidden.T).T.contiguous(),
    }


def of_int8(hidden: Tensor, packed: cycle[int8.Packed]) -> dict[str, Callable[[], object]]:
    """Weights of int8 by the kernel, by torch's own, and widened first."""
    widened = lambda one: F.linear(hidden, one.weight.to(hidden.dtype)) * one.scale.to(hidden.dtype)  # noqa: E731
    kernel = torch.ops.aten._weight_int8pack_mm
    return {
        "int8": lambda: int8.few_rows(hidden, *next(packed), None),
        "int8 by torch": lambda: (lambda one: kernel(hidden, one.weight, one.scale.to(hidden.dtype)))(next(packed)),
        "int8 widened": lambda: widened(next(packed)),
    }


@torch.no_grad()
def timed(ways: dict[str, Callable[[], object]]) -> dict[str, float]:
    """The median microseconds of each, by turns."""
    found: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(REPEATS + 1):  # the first round warms up
        for name, run in ways.items():
            began = time.perf_counter()
            run()
            found[name].append(1e6 * (time.perf_counter() - began))
    return {name: round(median(times[1:]), 1) for name, times in found.items()}


if __name__ == "__main__":
    main()
