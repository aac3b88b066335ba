"""`longwave bench`: options in; tables, bars and files out; and the results as plain values."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from rich.table import Table

from longwave import files
from longwave.benchmarks.context.options import ContextOptions
from longwave.benchmarks.context.picture import draw_growth
from longwave.benchmarks.context.run import ContextResults, Run, Traces
from longwave.benchmarks.context.tables import context_tables as context_views
from longwave.benchmarks.measure.profile import Profiler as Watch
from longwave.benchmarks.measure.profile import Spent
from longwave.benchmarks.models import BenchOptions, run
from longwave.benchmarks.ops import OpsOptions, ops_options, run_ops
from longwave.benchmarks.results.compare import compare, compared_table, read
from longwave.benchmarks.results.picture import check_picture, draw
from longwave.benchmarks.results.results import Options, Results
from longwave.benchmarks.results.table import show, tables, where_time_went
from longwave.config import build
from longwave.errors import MachineError, require
from longwave.plan import parse_bytes, parse_sizes
from longwave.training.recipe import recipe_path

DEFAULT_MODEL = "bench-sala-million"


def bench_models(options: argparse.Namespace) -> dict[str, Any]:
    """`bench inference` and `bench training`; `--against none` is alone."""
    other = None if options.against == "none" else options.against
    chosen = build(BenchOptions, _chosen(options, BenchOptions), "bench")
    return _measure(options, chosen, lambda: run(options.kind, options.model, other, chosen, bool(options.profile)))


def bench_ops(options: argparse.Namespace) -> dict[str, Any]:
    """`bench ops`."""
    chosen = ops_options(options.model, _chosen(options, OpsOptions))
    return _measure(options, chosen, lambda: run_ops(chosen, bool(options.profile)))


def bench_context(options: argparse.Namespace) -> dict[str, Any]:
    """`bench context`; what is finished is saved at once, and shown if the run is interrupted."""
    values = _chosen(options, ContextOptions)
    chosen = build(ContextOptions, values | _bytes(values), "bench context")
    _check_files(options)
    model, traces = options.model or recipe_path(DEFAULT_MODEL), Traces()
    with chosen.running():
        run = Run(model, None if options.against == "none" else options.against, chosen)
        results, interrupted = _last(run.results(traces.add if options.profile else None), options)
    if options.profile and traces.spent:
        traces.write(Path(options.profile))
    show(*context_views(results), *_where(traces.spent))
    if options.plot is not None:
        draw_growth(results, options.plot)
    if interrupted and options.json:
        print(json.dumps(results.plain()))
    if interrupted:
        raise KeyboardInterrupt("interrupted: the contexts above were finished")
    return results.plain()


def _last(found: Iterator[ContextResults], options: argparse.Namespace) -> tuple[ContextResults, bool]:
    """The last results, each saved as it came, and whether an interrupt has cut them short."""
    results = None
    try:
        for results in found:
            _save(results, options)
    except KeyboardInterrupt:
        if results is None or not results.rows:
            raise
        return results, True
    assert results is not None
    return results, False


def _bytes(values: Mapping[str, Any]) -> dict[str, int]:
    return {"memory": parse_bytes(values["memory"])} if "memory" in values else {}


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
    sizes = {name: parse_sizes(chosen[name]) for name in ("contexts", "batches") if name in chosen}
    return chosen | sizes


def _measure(
    options: argparse.Namespace, chosen: Options, measure: Callable[[], tuple[Results, Watch]]
) -> dict[str, Any]:
    """Runs, shows and keeps; whatever would stop a file from being written is found before anything is timed."""
    _check_files(options)
    with chosen.running():
        results, watch = measure()
        spent = watch.write(Path(options.profile)) if options.profile else {}
    show(*tables(results), *_where(spent))
    if options.plot is not None:
        draw(results, options.plot)
    _save(results, options)
    return results.plain()


def _check_files(options: argparse.Namespace) -> None:
    """UserError for what could not be written."""
    for path in (options.save, options.profile, options.plot):
        if path is not None:
            _check_file(Path(path))
    if options.plot is not None:
        check_picture(options.plot)


def _where(spent: Mapping[str, dict[str, Spent]]) -> list[Table]:
    return [where_time_went(title, kinds) for title, kinds in spent.items()]


def _save(results: Results, options: argparse.Namespace) -> None:
    if options.save is not None:
        files.write_file(options.save, (json.dumps(results.plain(), indent=1) + "\n").encode())


def _check_file(path: Path) -> None:
    """UserError for a path that no file can be written to."""
    require(not path.is_dir(), f"{path} is a folder; give the name of a file")
    nearest = next(folder for folder in path.resolve().parents if folder.exists())
    require(nearest.is_dir() and os.access(nearest, os.W_OK), f"{path}: nothing can be written to {nearest}")
