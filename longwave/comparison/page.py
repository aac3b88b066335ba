"""The report of a comparison: its models at the largest budget, and all that may be said of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from longwave.comparison.grid import Choice
from longwave.comparison.results import Level, Point, Result
from longwave.comparison.speed import now
from longwave.comparison.summary import Comparison, Row
from longwave.reports import content
from longwave.reports.page import Fact
from longwave.units import short

_SHARES = {"kept": "positive", "live": "live", "falsely_kept": "false_keep", "falsely_dropped": "false_drop"}


def report_of(found: Comparison, command: str) -> content.Report:
    """The content of the page; runs that diverged have no place in it but in the sentences."""
    last = max(row.budget for row in found.rows)
    rows = [row for row in found.rows if row.budget == last]
    models = [model for row in rows if (model := _model(row, _runs(found, row))) is not None]
    shown = {model.key for model in models}
    first = next(one for one in found.results if one.budget == last)
    return content.Report(
        title="longwave compare",
        subtitle=f"{len(models)} models, {last.words()} each.",
        created=now(),
        models=models,
        baseline=models[0].key,
        statements=found.statements,
        speed=found.speed,
        grids=[_grid(choice) for choice in found.choices if choice.model in shown and _is_numeric(choice)],
        notes=found.notes,
        curve_note=curve_note(first.recipe),
        run=[Fact(label, value) for label, value in run_facts(first).items()],
        machine=[Fact(label, value) for label, value in first.machine.items()],
        command=command,
        loss_comparable=found.measure == "loss",
    )


def _runs(found: Comparison, row: Row) -> list[Result]:
    return [one for one in found.results if (one.model, one.budget) == (row.model, row.budget)]


def _model(row: Row, results: Sequence[Result]) -> content.ModelRun | None:
    runs = [run for one in results if (run := _seed_run(one)) is not None]
    if not runs:
        return None
    first = next(one for one in results if one.loss is not None)
    subllm = first.recipe["model"].get("subllm") or {}
    return content.ModelRun(
        key=row.model,
        name=row.model,
        parameters=row.parameters,
        layout=row.layout,
        runs=runs,
        levels=[_level(number, level, first) for number, level in enumerate(first.levels)],
        selection="threshold" if subllm.get("selection") == "causal" else "top-k",
        selected_loss=first.training_loss,
        setting=row.setting,
    )


def _seed_run(result: Result) -> content.SeedRun | None:
    if result.loss is None or result.bits_per_byte is None:
        return None
    train = [_point(one, one.loss) for one in result.curve]
    held_out = [_point(one, one.held_out) for one in result.curve if one.held_out is not None]
    return content.SeedRun(result.seed, train, held_out, result.loss, result.bits_per_byte)


def _point(point: Point, loss: float | None) -> content.LossPoint:
    return content.LossPoint(point.step, point.tokens, point.flops, point.seconds, loss)


def _level(number: int, level: Level, result: Result) -> content.RetentionLevel:
    """The curves of a level; steps of which a figure is not finite are left out."""
    shares = {name: level.shares.get(key, ()) for name, key in _SHARES.items()}
    whole = [at for at in range(len(level.steps)) if all(one[at] is not None for one in shares.values())]
    curves: dict[str, Any] = {name: [one[at] for at in whole] for name, one in shares.items()}
    steps = [level.steps[at] for at in whole]
    return content.RetentionLevel(f"level {number + 1}", level.target, steps, **curves, final=result.retention[number])


def _is_numeric(choice: Choice) -> bool:
    return all(isinstance(value, int | float) for value in choice.values)


def _grid(choice: Choice) -> content.Grid:
    return content.Grid(choice.model, choice.key, choice.values, choice.losses, choice.best, choice.at_edge)


def curve_note(recipe: Mapping[str, Any]) -> str:
    """Why the last points of the held-out curves are not the final figures, where they are not."""
    run = recipe["training"]
    reasons = [f"of the first {run['evaluate_windows']} held-out windows"] if run["evaluate_windows"] else []
    reasons += [f"computed in {run['precision']}"] if run["precision"] != "fp32" else []
    words = "The held-out curves and the gap are {}; the table, the cards and longwave eval take all, in fp32."
    return words.format(" and ".join(reasons)) if reasons else ""


def run_facts(result: Result) -> dict[str, str]:
    """What the runs have in common, as the first one says it."""
    run, shape = result.recipe["training"], result.recipe["model"]
    return {
        "budget": f"{result.budget.words()} a model",
        "training": f"{result.steps:,} steps of {run['batch_windows']} windows of {run['window']:,} tokens, "
        f"{run['precision']}, {result.threads} thread{'s' if result.threads > 1 else ''} a run",
        "tokens": f"{result.tokens:,} a run",
        "FLOPs": f"{short(result.flops)} in the first run",
        "optimizer": f"{result.recipe['optimizer']['kind']}, {result.recipe['schedule']['kind']}",
        "shape": f"hidden {shape['hidden_size']}, vocabulary {shape['vocab_size']:,}",
    }
