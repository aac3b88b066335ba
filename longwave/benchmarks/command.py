"""`longwave bench`: options in, a table out, and the results as plain values."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from rich.console import Console

from longwave.benchmarks.bench import BenchOptions, run
from longwave.benchmarks.table import tables, to_json
from longwave.config import build
from longwave.plan import parse_sizes

_FILE_WIDTH = 160


def bench_command(options: argparse.Namespace) -> dict[str, Any]:
    """Runs what the command line asks for, prints the table and gives the JSON object; `--against none` is alone."""
    chosen = {
        "contexts": parse_sizes(options.contexts),
        "batches": parse_sizes(options.batch),
        "dtype": options.dtype,
        "retention": options.retention,
        "repeats": options.repeats,
        "decode_steps": options.decode_steps,
    }
    against = None if options.against == "none" else options.against
    results = run(options.kind, options.model, against, build(BenchOptions, chosen, "bench"))
    Console(width=None if sys.stdout.isatty() else _FILE_WIDTH).print(tables(results))
    return to_json(results)
