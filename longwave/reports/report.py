"""The report about trained models: from typed data to one self-contained `report.html`.

A report holds any number of models with any number of runs each. One model is the baseline of all comparisons.
`content` has the data, `curves` the means and intervals over seeds, `words` the sentences.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from longwave import files
from longwave.files.jsonfile import finite
from longwave.reports.content import ModelRun, Report, RetentionLevel, SeedRun
from longwave.reports.curves import (
    AXES,
    Axis,
    end_together,
    final_gap,
    gap_curve,
    held_out_curve,
    mean_over_seeds,
    spans,
    training_curve,
)
from longwave.reports.growth import growth_words
from longwave.reports.page import Kind
from longwave.reports.words import cell, headline

_PAGE = Kind("report", ("passage",))
_DIGITS = 6  # significant digits of numbers in the page: more than it shows


def write_report(data: Report, path: Path) -> None:
    """Writes the page of `data` to `path`; a reader sees the old page or the whole new one."""
    files.write_file(path, _PAGE.render(data.title, _payload(data)).encode())


def _payload(data: Report) -> dict[str, Any]:
    plain = [field.name for field in dataclasses.fields(data) if field.name != "models"]
    columns = data.speed.columns
    payload = {
        "report": {name: getattr(data, name) for name in plain},
        "headline": [figure._asdict() for figure in headline(data)],
        "models": [_model(model, data) for model in data.models],
        "axes": [{"key": axis, "together": end_together(data.models, axis)} for axis in _axes(data)],
        "growth_words": growth_words(data),
        "columns": list(columns.values()),
        "cells": [
            [cell(row.figures[key], row.figures.get(data.baseline), row.kind) for key in columns]
            for row in data.speed.rows
        ],
    }
    return finite(short(payload))


def _axes(data: Report) -> Sequence[Axis]:
    """The axes along which the runs tell what they spent; tokens where they tell nothing."""
    ends = [run.end for model in data.models for run in model.runs if run.end]
    return [axis for axis in AXES if any(getattr(end, axis) > 0 for end in ends)] or AXES[:1]


def _model(model: ModelRun, data: Report) -> dict[str, Any]:
    baseline, comparable = data.yardstick, data.loss_comparable
    others = [] if model is baseline else [(axis, gap_curve(model, baseline, axis, comparable)) for axis in AXES]
    ends = [run.end for run in model.runs if run.end]
    return {
        **{field: getattr(model, field) for field in ("key", "name", "setting", "layout", "parameters", "selection")},
        **{axis: fmean(getattr(end, axis) for end in ends) if ends else None for axis in AXES},
        "seeds": [_seed(run) for run in model.runs],
        "loss": mean_over_seeds([run.final_loss for run in model.runs]),
        "bits": mean_over_seeds([run.bits_per_byte for run in model.runs]),
        "perplexity": _perplexity(model),
        "gap": None if model is baseline else final_gap(model, baseline, comparable),
        "train": [point[:4] for point in training_curve(model, comparable)],
        "held_out": held_out_curve(model, comparable),
        "gaps": dict(others),
        "levels": [_level(level) for level in model.levels],
        "selected_loss": model.selected_loss,
        "generations": model.generations,
    }


def _seed(run: SeedRun) -> dict[str, Any]:
    return {"seed": run.seed, "loss": run.final_loss, "bits": run.bits_per_byte}


def _perplexity(model: ModelRun) -> float | None:
    """e to the mean loss; None where that is beyond all numbers."""
    loss = fmean(run.final_loss for run in model.runs)
    return math.exp(loss) if loss < 700 else None


def _level(level: RetentionLevel) -> dict[str, Any]:
    """A level with its curves averaged over neighbouring steps to at most 300 points."""
    curves = {field: getattr(level, field) for field in ("steps", "kept", "live", "falsely_kept", "falsely_dropped")}
    groups = spans(len(level.steps))
    thin = {field: [fmean(values[start:stop]) for start, stop in groups] for field, values in curves.items()}
    return {"name": level.name, "target": level.target, "final": level.final, **thin}


def short(value: Any) -> Any:
    """Plain values with dataclasses as tables, and floats of six significant digits, whole ones as integers."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return short(dataclasses.asdict(value))
    if isinstance(value, dict):
        return {key: short(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [short(item) for item in value]
    if not isinstance(value, float):
        return value
    rounded = float(f"{value:.{_DIGITS}g}")
    return int(rounded) if rounded.is_integer() else rounded
