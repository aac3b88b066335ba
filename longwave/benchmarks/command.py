"""`longwave bench`: options in; tables, bars and files out; and the results as plain values."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from longwave import durable
from longwave.benchmarks.bench import BenchOptions, run
from longwave.benchmarks.compare import compare, compared_table, read
from longwave.benchmarks.ops import OpsOptions, ops_options, run_ops
from longwave.benchmarks.picture import check_picture, draw
from longwave.benchmarks.profile import Watch
from longwave.benchmarks.results import Options, Results
from longwave.benchmarks.table import show, tables, where_time_went
from longwave.config import build, require
from longwave.errors import MachineError
from longwave.plan import parse_sizes


def bench_models(options: argparse.Namespace) -> dict[str, Any]:
    """`bench inference` and `bench training`; `--against none` is alone."""
    other = None if options.against == "none" else options.against
    chosen = build(BenchOptions, _chosen(options, BenchOptions), "bench")
    return _measure(options, chosen, lambda: run(options.kind, options.model, other, chosen, bool(options.profile)))


def bench_ops(options: argparse.Namespace) -> dict[str, Any]:
    """`bench ops`."""
    chosen = ops_options(options.model, _chosen(options, OpsOptions))
    return _measure(options, chosen, lambda: run_ops(chosen, bool(options.profile)))


def bench_compare(options: argparse.Namespace) -> dict[str, Any]:
    """`bench compare A B`; MachineError, after the table, if B is slower."""
    before, after = read(options.before), read(options.after)
    comparison = compare(before, after, options.threshold)
    show(*compared_table(comparison))
    plain = dataclasses.asdict(comparison)
    slower = [row for row in comparison.rows if row.verdict == "slower"]
    if slower:
        if options.json:
            print(json.dumps(plain))
        raise MachineError(f"{len(slower)} of {len(comparison.rows)} rows are slower in {options.after}")
    return plain


def _chosen(options: argparse.Namespace, kind: type) -> dict[str, Any]:
    """What the command line gives of the fields of a config; sizes and names are lists there."""
    given = {field.name: getattr(options, field.name, None) for field in dataclasses.fields(kind)}
    chosen = {name: value for name, value in given.items() if value is not None}
    for name in ("contexts", "batches"):
        chosen[name] = parse_sizes(chosen[name])
    return chosen


def _measure(
    options: argparse.Namespace, chosen: Options, measure: Callable[[], tuple[Results, Watch]]
) -> dict[str, Any]:
    """Runs, shows and keeps; whatever would stop a file from being written is found before anything is timed."""
    for path in (options.save, options.profile, options.plot):
        if path is not None:
            _check_file(Path(path))
    if options.plot is not None:
        check_picture(options.plot)
    with chosen.running():
        results, watch = measure()
        spent = watch.write(Path(options.profile)) if options.profile else {}
    show(*tables(results), *(where_time_went(title, kinds) for title, kinds in spent.items()))
    plain = results.plain()
    if options.plot is not None:
        draw(results, options.plot)
    if options.save is not None:
        durable.write_file(options.save, (json.dumps(plain, indent=1) + "\n").encode())
    return plain


def _check_file(path: Path) -> None:
    """UserError for a path that no file can be written to."""
    require(not path.is_dir(), f"{path} is a folder; give the name of a file")
    nearest = next(folder for folder in path.resolve().parents if folder.exists())
    require(nearest.is_dir() and os.access(nearest, os.W_OK), f"{path}: nothing can be written to {nearest}")
