"""`longwave bench context`: one sequence of real text that grows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import starmap
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from longwave.cli.bench.measuring import Running, check_files, chosen, save
from longwave.cli.options import argument, option
from longwave.cli.output import json_line
from longwave.cli.parser import Verb

if TYPE_CHECKING:
    from longwave.benchmarks.context.options import ContextOptions
    from longwave.benchmarks.context.run import ContextResults, Traces

DEFAULT_MODEL = "bench-sala-million"


@dataclass(frozen=True, kw_only=True)
class Context(Running):
    """Options of `longwave bench context`."""

    model: str | None = argument("a recipe (random weights) or a model folder (a small SALA)", default=None)
    against: str = option("another recipe or folder, none, or its dense twin", default="dense")
    contexts: str = option("token counts, ascending", default="4k,16k,64k,256k,1M")
    chunk: int = option("tokens that are run at a time", default=4096)
    decode_steps: int = option("tokens decoded at each context", default=16)
    limit: float = option("after which a model is stopped", default=600, metavar="SECONDS")
    memory: str | None = option("most beyond the weights, such as 8G (what is free)", metavar="BYTES")
    retention: Literal["forced", "real"] = option("forced: thresholds at nominal", default="real")
    text: str | None = option("a text file or folder; the Python standard library by default")
    repeats: int = option("passes over the whole sequence, of which medians are taken", default=1)


def run(options: Context) -> dict[str, Any]:
    """Measures and shows; results are saved after every context, and shown if the run is interrupted."""
    from longwave.benchmarks.context.options import ContextOptions
    from longwave.benchmarks.context.run import Traces
    from longwave.config import build

    config = build(ContextOptions, chosen(options, ContextOptions), "bench context")
    check_files(options)
    traces = Traces()
    with config.running():
        results, interrupted = _last(_measured(options, config, traces), options)
    _show(results, traces, options)
    if interrupted and options.json:
        print(json_line(results.plain()))
    if interrupted:
        raise KeyboardInterrupt("interrupted: the contexts above were finished")
    return results.plain()


def _measured(options: Context, config: ContextOptions, traces: Traces) -> Iterator[ContextResults]:
    from longwave.benchmarks.context.run import Run
    from longwave.recipes import recipe_path

    other = None if options.against == "none" else options.against
    growing = Run(options.model or recipe_path(DEFAULT_MODEL), other, config)
    return growing.results(traces.add if options.profile else None)


def _last(found: Iterator[ContextResults], options: Context) -> tuple[ContextResults, bool]:
    """The last results, each saved as it came, and whether an interrupt has cut them short."""
    results = None
    try:
        for results in found:
            save(results, options)
    except KeyboardInterrupt:
        if results is None or not results.rows:
            raise
        return results, True
    assert results is not None
    return results, False


def _show(results: ContextResults, traces: Traces, options: Context) -> None:
    """Prints the tables, and writes the trace and the picture that were asked for."""
    from longwave.benchmarks.context.picture import draw_growth
    from longwave.benchmarks.context.tables import context_tables
    from longwave.benchmarks.results.table import show, where_time_went

    if options.profile and traces.spent:
        traces.write(Path(options.profile))
    show(*context_tables(results), *starmap(where_time_went, traces.spent.items()))
    if options.plot is not None:
        draw_growth(results, options.plot)


VERB = Verb(
    "context",
    "stream real text of growing length through a model, beside a dense one: time, memory, how they grow",
    Context,
    run,
)
