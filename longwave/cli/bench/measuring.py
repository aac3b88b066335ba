"""Options that measurements share, and the files they leave."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from dataclasses import dataclass
from itertools import starmap
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from longwave import trial
from longwave.cli.options import OfModel, OnDevice, option
from longwave.errors import require
from longwave.files.jsonfile import to_json
from longwave.files.paths import resolved
from longwave.units import parse_bytes, parse_sizes

if TYPE_CHECKING:
    from longwave.benchmarks.measure.profile import Profiler
    from longwave.benchmarks.results import results


@dataclass(frozen=True, kw_only=True)
class Running(OnDevice, OfModel):
    """Place of a measurement, and the files it leaves."""

    dtype: Literal["fp32", "bf16"] = option("of activations", default="fp32")
    threads: int | None = option("threads of the CPU (as PyTorch takes them)")
    save: str | None = option("keep the results, for bench compare", metavar="FILE.json")
    plot: str | None = option("a picture (takes the extra 'plot')", metavar="FILE.svg|png")
    profile: str | None = option("a trace of one more run of each, for Perfetto", metavar="FILE.json[.gz]")


@dataclass(frozen=True, kw_only=True)
class Measuring(Running):
    """Contexts and batches of a measurement, and its repeats."""

    contexts: str | None = option("token counts, such as 2048,64k (2048,8192, as far as the model's window goes)")
    batches: str = option("batch sizes, such as 1,8", default="1", name="--batch")
    repeats: int = option("interleaved rounds, of which medians are taken", default=5)


def _words(text: str) -> list[str]:
    return text.split(",")


_READ: dict[str, Callable[[str], Any]] = {  # fields that a command line gives as text
    "contexts": parse_sizes,
    "batches": parse_sizes,
    "memory": parse_bytes,
    "ops": _words,
    "forms": _words,
}


_TRIED: dict[str, Callable[[Any], Any]] = {  # what a trial run makes of fields
    "contexts": trial.contexts,
    "repeats": lambda rounds: trial.at_most(rounds, 3),
    "decode_steps": lambda steps: trial.at_most(steps, 4),
}


def chosen(options: Running, config: type) -> dict[str, Any]:
    """Values of the fields of a config, as far as the options have them."""
    given = {field.name: getattr(options, field.name, None) for field in dataclasses.fields(config)}
    read = {name: _READ.get(name, _same)(value) for name, value in given.items() if value is not None}
    return {name: _TRIED.get(name, _same)(value) for name, value in read.items()}


def _same(value: Any) -> Any:
    return value


def measured(
    options: Running, config: results.Options, measure: Callable[[], tuple[results.Results, Profiler]]
) -> dict[str, Any]:
    """Measures, shows and keeps; whatever would stop a file from being written is found before anything is timed."""
    from longwave.benchmarks.measure.others import other_work
    from longwave.benchmarks.results.picture import draw
    from longwave.benchmarks.results.table import show, tables, where_time_went
    from longwave.progress import say

    check_files(options)
    with config.running():
        with other_work() as others:
            found, profiler = measure()
        if others.disturbs:
            say(f"this machine was busy: {others.words()}; measure again when it is not, before times are trusted")
        spent = profiler.write(Path(options.profile)) if options.profile else {}
    show(*tables(found), *starmap(where_time_went, spent.items()))
    if options.plot is not None:
        draw(found, options.plot)
    save(found, options)
    return found.plain()


def check_files(options: Running) -> None:
    """UserError for a file that could not be written."""
    from longwave.benchmarks.results.picture import check_picture

    for path in (options.save, options.profile, options.plot):
        if path is not None:
            _check_file(Path(path))
    if options.plot is not None:
        check_picture(options.plot)


def _check_file(path: Path) -> None:
    require(not path.is_dir(), f"{path} is a folder; give the name of a file")
    nearest = next(folder for folder in resolved(path).parents if folder.exists())
    require(nearest.is_dir() and os.access(nearest, os.W_OK), f"{path}: nothing can be written to {nearest}")


def save(found: results.Results, options: Running) -> None:
    """Keeps the results for `bench compare`, if asked to."""
    from longwave import files

    if options.save is not None:
        files.write_file(options.save, (to_json(found.plain(), indent=1) + "\n").encode())
