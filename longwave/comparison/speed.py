"""The speed of the models of a comparison: timed in turn once they are trained, and kept, so that it is timed once."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError

from longwave import files, trial
from longwave.api import load
from longwave.benchmarks.growth import Growth
from longwave.benchmarks.measure.others import OtherWork, other_work
from longwave.benchmarks.measure.roofline import measure_peaks
from longwave.benchmarks.models import BenchOptions, Longwave, TimedModel, bench_inference, bench_training
from longwave.benchmarks.results.results import Row
from longwave.comparison.results import Result
from longwave.machine import device_of, dtype_of
from longwave.model import Decoder
from longwave.progress import say
from longwave.reports.content import Bound, Figure, Missing, Speed, SpeedRow

SPEED = "speed.json"
DECODE_STEPS, REPEATS = 64, 5
_LABELS = {"prefill": "Prefill, {:,} tokens", "decode": "Per token, after {:,}", "training step": "Step, {:,} tokens"}
Models = Mapping[str, Decoder]
Beside = Callable[[Models], Sequence[TimedModel]]


@dataclasses.dataclass(frozen=True)
class Measurement:
    """The speed of models as it was measured, by their names in the comparison.

    when: the time of day. models: the checksums of their folders. growth: how times and states grow with the context,
    where that was measured.
    """

    when: str
    models: Mapping[str, Mapping[str, str]]
    speed: Speed
    growth: Growth | None = None


def now() -> str:
    """The time of day, as reports and measurements keep it."""
    return datetime.now().astimezone().isoformat(timespec="seconds")


def timed_folders(results: Sequence[Result]) -> dict[str, Path]:
    """A folder for every model of a comparison, of the first seed at the largest budget.

    Empty where models have different tokenizers, as they cannot be given the same tokens.
    """
    if len({one.data["tokenizer"] for one in results}) > 1:
        return {}
    last, found = max(one.budget for one in results), dict[str, Path]()
    for one in results:
        folder = Path(one.folder) / "model"
        if one.budget == last and one.folder and (folder / files.MANIFEST).exists():
            found.setdefault(one.model, folder)
    return found


def speed_of(results: Sequence[Result], output: Path) -> Speed:
    """The speed of the models of a comparison; an empty one where there are none to time, or not the same tokens."""
    folders = timed_folders(results)
    if not folders:
        return Speed({}, ())
    recipe = next(one.recipe for one in results if one.model in folders)
    return measured(folders, output / SPEED, lambda models: measure(models, recipe)).speed


def measured(folders: Mapping[str, Path], path: Path, measure: Callable[[Models], Measurement]) -> Measurement:
    """The speed of the models in their folders: as the file `path` has it of the same models, or measured now."""
    checksums = {name: files.checksums(folder) for name, folder in folders.items()}
    earlier = _earlier(path)
    if earlier is not None and earlier.models == checksums:
        return earlier
    found = dataclasses.replace(measure({name: load(folder) for name, folder in folders.items()}), models=checksums)
    files.write_file(path, TypeAdapter(Measurement).dump_json(found, indent=1) + b"\n")
    return found


def _earlier(path: Path) -> Measurement | None:
    """The content of the file; None for none, and for one that another version wrote."""
    try:
        return TypeAdapter(Measurement).validate_json(path.read_bytes())
    except (FileNotFoundError, ValidationError):
        return None


def time_models(models: Models, recipe: Mapping[str, Any], beside: Sequence[TimedModel] = ()) -> Speed:
    """Times prefill, decoding and the training step of all models in turn, once their outputs are checked.

    models: by name; the first is the baseline. recipe: plain values, whose window, precision and device are used.
    beside: models of other libraries, which come first in the table.
    """
    run = recipe["training"]
    device = device_of(run["device"])
    window = min([run["window"], *(model.config.context_window for model in models.values())])
    steps, repeats = min(DECODE_STEPS, window // 4), trial.at_most(REPEATS, 1)
    options = BenchOptions(contexts=(window - steps,), decode_steps=steps, repeats=repeats, device=run["device"])
    baseline, *others = [Longwave(name, model.to(device)) for name, model in models.items()]
    compared: list[TimedModel] = [*others, *beside, baseline]  # ratios and bounds are relative to the last
    trained = dataclasses.replace(options, contexts=(window,), dtype=run["precision"])
    peaks = {dtype: measure_peaks(dtype, device) for dtype in (torch.float32, dtype_of(run["precision"]))}
    with other_work() as busy:
        rows = bench_inference(compared, peaks[torch.float32], options)
        rows += bench_training(compared, peaks[dtype_of(run["precision"])], trained)
    columns = [one.name for one in (*beside, baseline, *others)]
    quantities = {row.quantity: [one for one in rows if one.quantity == row.quantity] for row in rows}
    shown = [_speed_row(found, columns, baseline.name) for found in quantities.values()]
    shown.append(_memory_row(quantities["decode"], columns))
    return Speed({name: name for name in columns}, shown, load_words(busy), busy.disturbs)


def load_words(others: OtherWork) -> str:
    """A sentence on how busy the machine was while it timed the models."""
    found = others.words()
    if not others.disturbs:
        return f"{found[0].upper()}{found[1:]}."
    return (
        f"This machine was busy: {found}. Ratios are taken within rounds and suffer least; times, shares of bounds and "
        "small differences are not to be trusted."
    )


def _speed_row(rows: Sequence[Row], columns: Sequence[str], baseline: str) -> SpeedRow:
    """One quantity of all models in milliseconds; of a model's several caches the fastest counts."""
    quantity, context = rows[0].quantity, rows[0].context
    figures = {name: _figure(_fastest(rows, name), name != baseline) for name in columns}
    kind: Any = quantity.split()[0]
    return SpeedRow(kind, _LABELS[quantity].format(context), context, figures)


def _fastest(rows: Sequence[Row], name: str) -> Row:
    own = [row for row in rows if row.subject == name or row.subject.startswith(f"{name}, ")]
    return min(own, key=lambda row: row.timing.median)


def _figure(row: Row, bounded: bool) -> Figure:
    """bounded: whether the figure has a bound, which says something where the model's work is not the baseline's."""
    timing, bound = row.timing, None
    if bounded and row.bound_ratio and abs(row.bound_ratio - 1) > 1e-9:
        bound = Bound(1 / row.bound_ratio, f"least FLOPs and bytes{_kept_words(row)}")
    rounds = [1e3 * seconds for seconds in timing.seconds]
    return Figure(1e3 * timing.median, 1e3 * timing.low, 1e3 * timing.high, bound, rounds)


def _kept_words(row: Row) -> str:
    """The retention that a bound is of, in words: measured, but for training, whose work follows from the layout."""
    shares = " and ".join(f"{share:.0%}" for share in row.retention)
    if not shares:
        return ", at the retention in the layout" if row.quantity == "training step" else ""
    if row.quantity == "decode":
        return f"; of all tokens that were timed {shares} came to the levels"
    return f"; of the text that was timed each level kept {shares} of what entered it"


def _memory_row(rows: Sequence[Row], columns: Sequence[str]) -> SpeedRow:
    """The bytes of each model's state after the context; layers within a level hold only the tokens that it keeps."""
    used = {name: _fastest(rows, name).state_used for name in columns}
    figures = {name: Missing("not counted") if n is None else Figure(n, n, n) for name, n in used.items()}
    return SpeedRow("memory", f"State, {rows[0].context:,} tokens", rows[0].context, figures)


def measure(models: Models, recipe: Mapping[str, Any]) -> Measurement:
    """The speed of the models of a comparison."""
    say(f"timing {', '.join(models)}")
    return Measurement(now(), {}, time_models(models, recipe))
