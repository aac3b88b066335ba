"""The work of a process of a comparison: it trains the runs of a line, one after the other, and evaluates each."""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from longwave import files, machine, trial
from longwave.comparison.results import FORMAT, RESULT, Result, curve_of, levels_of, read_result, write_result
from longwave.comparison.runs import Line, Run
from longwave.data.packed import PackedTokens
from longwave.data.prepared import PreparedInfo
from longwave.errors import UserError, require
from longwave.evaluation.held_out import HeldOut, bits_per_byte, held_out_loss
from longwave.model import Decoder
from longwave.training import checkpoints
from longwave.training.clock import TIMES, read_seconds
from longwave.training.divergence import RunEnded
from longwave.training.loop import Trainer
from longwave.training.metrics import METRICS, read_metrics, write_metrics
from longwave.training.next_token import NextToken
from longwave.training.pace import step_seconds
from longwave.training.progress import adopt, completed
from longwave.training.recipe import Recipe, flat

Report = Callable[[Run, dict[str, Any]], None]
_PLACE = "data.folder"  # of which only the content counts
_FEW = 2  # windows of an evaluation in a trial run
_PATIENCE = 20.0  # seconds for which a folder may still be held by the process of a comparison that was killed


def train_line(line: Line, report: Report) -> list[Result]:
    """Trains every run of a line that has no result yet, and returns all results. report: told of every step."""
    followers = [*line.runs[1:], None]
    return [finished(run) or _trained(run, later, report) for run, later in zip(line.runs, followers, strict=True)]


def finished(run: Run) -> Result | None:
    """The result in the folder of a run; UserError if it is one of another recipe, or of other data."""
    if not (run.folder / RESULT).exists():
        return None
    found = read_result(run.folder)
    theirs, ours = flat(completed(dict(found.recipe))), flat(_plain(run.recipe))
    different = [name for name in sorted({*ours, *theirs} - {_PLACE}) if ours.get(name) != theirs.get(name)]
    if different:
        name = different[0]
        values = f"{name} = {theirs.get(name)!r} there, {ours.get(name)!r} here"
        raise UserError(f"{run.folder}: a finished run of another comparison ({values}); give another --output")
    folder = run.recipe.data.folder
    same = dict(found.data) == _data_of(PreparedInfo.read(folder), folder)
    require(same, f"{run.folder}: a finished run of other data than {folder} holds; give another --output")
    return found


def _trained(run: Run, later: Run | None, report: Report) -> Result:
    _wait_for(run.folder)
    trainer = Trainer(run.recipe, run.folder)
    trainer.watch(_Reporter(run, report))
    try:
        if later is not None and not later.folder.exists():
            _hand_on(trainer, later)
        trainer.run()
    except RunEnded as error:
        if error.__cause__ is not None:  # the machine's fault, and none of the run's own
            raise
        return _written(result_of(run, trainer, str(error)), run)
    return _written(result_of(run, trainer), run)


def _written(result: Result, run: Run) -> Result:
    write_result(result, run.folder)
    return result


def _wait_for(folder: Path) -> None:
    """Waits while the process of a comparison that was killed lets go of the folder."""
    until = time.monotonic() + _PATIENCE
    while folder.exists() and time.monotonic() < until:
        with suppress(UserError), files.locked(folder):
            return
        time.sleep(0.1)


class _Reporter:
    """An observer that passes on what people want to see of a step."""

    def __init__(self, run: Run, report: Report) -> None:
        self._run, self._report = run, report

    def record(self, entry: dict[str, Any]) -> None:
        self._report(self._run, entry)

    def close(self) -> None:
        return


# One beginning for several budgets ------------------------------------------------------------------------------------


def _hand_on(trainer: Trainer, later: Run) -> None:
    """Trains as long as the learning rate is that of a later run, too, whose first checkpoint this then becomes."""
    ours, theirs = trainer.recipe, later.recipe

    def parted(position: float) -> bool:
        rates = (one.schedule.scale(position, trainer.tokens, one.steps) for one in (ours, theirs))
        return len(set(rates)) > 1

    if any(parted(step) for step in range(math.floor(trainer.position))):
        return  # it has gone on without the other before
    trainer.run_until(lambda: parted(trainer.position))
    newest = checkpoints.newest(trainer.output / "checkpoints")
    if newest is None or newest.step != trainer.step:
        return
    with TemporaryDirectory(dir=_made(later.folder.parent), prefix=".begun-") as staging:
        begun = Path(staging) / "run"
        adopt(newest, theirs, begun / "checkpoints")
        entries = read_metrics(trainer.output / METRICS)
        write_metrics(begun / METRICS, [entry for entry in entries if entry["step"] <= newest.step])
        shutil.copyfile(trainer.output / TIMES, begun / TIMES)
        begun.rename(later.folder)


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


# Results --------------------------------------------------------------------------------------------------------------


def result_of(run: Run, trainer: Trainer, ended: str = "") -> Result:
    """The result of a run that is over; ended: why, where that is too early."""
    entries = read_metrics(trainer.output / METRICS)
    found, by_training = (None, None) if ended else _evaluated(trainer.model.eval(), run.recipe)
    info = PreparedInfo.read(run.recipe.data.folder)
    return Result(
        format=FORMAT,
        model=run.model,
        setting={run.setting.key: run.setting.value} if run.setting.key else {},
        seed=run.seed,
        budget=run.budget,
        recipe=_plain(run.recipe),
        layout=trainer.model.config.layout,
        parameters=sum(weight.numel() for weight in trainer.model.parameters()),
        steps=trainer.step,
        tokens=trainer.tokens,
        flops=trainer.flops,
        seconds=read_seconds(trainer.output),
        threads=torch.get_num_threads(),
        loss=None if found is None else found.loss,
        bits_per_byte=None if found is None else bits_per_byte(found, info),
        training_loss=None if by_training is None else by_training.loss,
        retention=() if found is None else found.retention,
        curve=curve_of(entries),
        levels=levels_of(entries, [float(level.retention) for level in trainer.model.resamplers]),
        data=_data_of(info, run.recipe.data.folder),
        machine=machine.facts(),
        ended=ended,
        folder=str(trainer.output),
    )


def _data_of(info: PreparedInfo, folder: str) -> dict[str, str]:
    """What tells prepared data apart, wherever they lie."""
    return {"tokenizer": info.tokenizer, "tokens": files.checksums(folder)["meta.json"]}


def _evaluated(model: Decoder, recipe: Recipe) -> tuple[HeldOut, HeldOut | None]:
    """The loss on all held-out text as the model runs at inference, and with training's selection where it selects."""
    data = PackedTokens(recipe.data.folder, "held_out", recipe.training.window, keep_last=True)
    windows = trial.at_most(len(data), _FEW)
    found = held_out_loss(model, data, windows=windows)
    if not model.resamplers:
        return found, None
    model.set_step(recipe.steps, recipe.training.seed)
    return found, held_out_loss(model, data, windows=windows, selection="training")


def _plain(recipe: Recipe) -> dict[str, Any]:
    """The recipe as JSON gives it back."""
    return json.loads(json.dumps(recipe.to_dict()))


# The speed of training ------------------------------------------------------------------------------------------------


def measure_pace(recipe: Recipe, seconds: float, report: Report) -> float:
    """Seconds of a training step (`training.pace`)."""
    return step_seconds(recipe, NextToken, seconds)
