"""A comparison of models at equal budgets, over several seeds, in a folder with which the same command goes on."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from pydantic import ConfigDict, TypeAdapter, ValidationError

from longwave import files
from longwave.comparison.budgets import Budget
from longwave.comparison.grid import Choice, Grid, choose
from longwave.comparison.page import report_of
from longwave.comparison.processes import run_all
from longwave.comparison.progress import Watch
from longwave.comparison.results import COMPARISON, Result, read_result
from longwave.comparison.runs import Candidate, Line, Plan, Setting
from longwave.comparison.speed import speed_of
from longwave.comparison.summary import Comparison, summarised
from longwave.comparison.worker import finished, measure_pace, train_line
from longwave.errors import UserError, require
from longwave.files.jsonfile import to_json
from longwave.progress import say
from longwave.reports.report import write_report

_SETUP = "setup.json"
_PACE_SECONDS, _ROUGH_SECONDS = 8.0, 3.0  # for which the speed of a model is measured: for a budget, for an estimate
_AS_WRITTEN = Setting()


@dataclass(frozen=True)
class Options:
    """How a comparison is run.

    seeds: of every model. grid: values to try first, with the first seed and the largest budget. jobs: runs side by
    side, each with its share of the processor's threads. progress: whether stderr tells of it.
    """

    seeds: tuple[int, ...] = (0,)
    grid: Grid | None = None
    jobs: int = 1
    progress: bool = False

    def __post_init__(self) -> None:
        require(bool(self.seeds), "--seeds: give one or more")
        double = [seed for seed in self.seeds if self.seeds.count(seed) > 1]
        require(not double, f"--seeds: {double[:1]} stands there twice")
        cores = os.cpu_count() or 1
        require(1 <= self.jobs <= cores, f"--jobs {self.jobs}: 1 to {cores}, as many as this machine has processors")


@dataclass(frozen=True)
class Setup:
    """What a comparison was begun with and goes on with, so that a killed one gives the same numbers.

    threads: of every run. pace: seconds of a training step by model, from which minutes were made steps.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    threads: int
    pace: Mapping[str, float] = dataclasses.field(default_factory=dict[str, float])


@dataclass(frozen=True)
class Expected:
    """What the runs of a model at one budget take, each of them: seconds at the speed measured here."""

    model: str
    budget: Budget
    runs: int
    steps: int
    tokens: int
    flops: float
    seconds: float


@dataclass(frozen=True)
class Expectation:
    """What a comparison takes, before it is paid. flops, seconds: of all runs, one after the other."""

    models: tuple[Expected, ...]
    flops: float
    seconds: float


class Comparing:
    """A comparison of recipes in an output folder."""

    def __init__(self, models: Sequence[Candidate], budgets: Sequence[Budget], output: Path, options: Options) -> None:
        self.models, self.budgets, self.output, self.options = models, budgets, output, options
        self._setup = self._read_setup()
        for model in models:  # what cannot be run is refused before anything is
            for setting in options.grid.settings if options.grid else (_AS_WRITTEN,):
                self._plan(dict.fromkeys([one.name for one in models], 1e-3)).line(model, setting, 0)

    def expected(self) -> Expectation:
        """What the comparison would take; speeds are measured now, and nothing is kept."""
        pace = self._paces(self.models, _ROUGH_SECONDS)
        found = [one for model in self.models for one in self._expected(self._plan(pace), model, pace[model.name])]
        return Expectation(
            tuple(found), sum(one.runs * one.flops for one in found), sum(one.runs * one.seconds for one in found)
        )

    def _expected(self, plan: Plan, model: Candidate, pace: float) -> Iterator[Expected]:
        settings = self.options.grid.settings if self.options.grid else (_AS_WRITTEN,)
        for run in plan.line(model, settings[0], self.options.seeds[0]).runs:
            tried = len(settings) - 1 if run.budget == plan.budgets[-1] else 0
            steps, recipe = run.recipe.steps, run.recipe
            flops = recipe.training.flops or steps * recipe.step_flops
            tokens = steps * recipe.training.batch_windows * recipe.training.window
            runs = len(self.options.seeds) + tried
            yield Expected(model.name, run.budget, runs, steps, tokens, flops, steps * pace)

    def run(self) -> tuple[list[Result], list[Choice]]:
        """Runs, or goes on with, all that has no result yet: the results at each model's setting, and the choices."""
        with files.locked(self.output):
            self._prepare()
            plan = self._plan(self._setup.pace)
            choices = self._choices(plan, self.options.grid) if self.options.grid else []
            best = {one.model: Setting(one.key, one.best) for one in choices}
            lines = [
                plan.line(model, best.get(model.name, _AS_WRITTEN), seed)
                for seed in self.options.seeds
                for model in self.models
            ]
            return self._results(lines), choices

    def _plan(self, pace: Mapping[str, float]) -> Plan:
        return Plan(self.output, self.models, self.budgets, pace)

    def _choices(self, plan: Plan, grid: Grid) -> list[Choice]:
        """The best value of the grid for each model; it is widened once for those whose best lies at its edge."""
        last, seed = dataclasses.replace(plan, budgets=plan.budgets[-1:]), self.options.seeds[0]
        tried = self._results([last.line(model, one, seed) for model in self.models for one in grid.settings])
        choices = [choose(model.name, grid.key, tried) for model in self.models]
        further = list[Line]()
        for model, choice in zip(self.models, choices, strict=True):
            if choice.at_edge and (beyond := grid.beyond(choice.best)) is not None:
                say(f"{choice.words()}; trying {beyond.words()}, too")
                further.append(last.line(model, beyond, seed))
        tried += self._results(further)
        return [choose(model.name, grid.key, tried) for model in self.models]

    def _results(self, lines: Sequence[Line]) -> list[Result]:
        watch = Watch(lines, self.options.progress)
        missing = list[Line]()
        for line in lines:
            found = [run for run in line.runs if finished(run)]
            for run in found:
                watch.finished(run)
            missing += [line] if len(found) < len(line.runs) else []
        names = [line.runs[0].words() for line in missing]
        tasks = [partial(train_line, line) for line in missing]
        try:
            run_all(tasks, names, self.options.jobs, self._setup.threads, watch)
        except KeyboardInterrupt:
            raise KeyboardInterrupt("stopped; every run is saved, and the same command continues") from None
        finally:
            watch.close()
        return [read_result(run.folder) for line in lines for run in line.runs]

    # What it was begun with --------------------------------------------------------------------------------------

    def _read_setup(self) -> Setup:
        path = self.output / _SETUP
        if not path.is_file():
            return Setup(max(1, (os.cpu_count() or 1) // self.options.jobs))
        try:
            return TypeAdapter(Setup).validate_json(path.read_bytes())
        except ValidationError:
            raise UserError(f"{path}: not what a comparison writes; remove it, or give another --output") from None

    def _prepare(self) -> None:
        """Measures the pace of models whose budget is minutes, and writes down what the comparison goes on with."""
        new = [model for model in self.models if model.name not in self._setup.pace]
        if self.budgets[0].unit == "minutes" and new:
            self._setup = dataclasses.replace(self._setup, pace={**self._setup.pace, **self._paces(new, _PACE_SECONDS)})
        files.write_file(self.output / _SETUP, TypeAdapter(Setup).dump_json(self._setup, indent=1) + b"\n")

    def _paces(self, models: Sequence[Candidate], seconds: float) -> dict[str, float]:
        """Seconds of a training step of each model, beside as many others as runs will have beside them."""
        say(f"measuring the speed of {', '.join(model.name for model in models)}")
        setting = self.options.grid.settings[0] if self.options.grid else _AS_WRITTEN
        tasks = [partial(measure_pace, model.recipe(setting, 0, {"steps": 1 << 20}), seconds) for model in models]
        names = [model.name for model in models]
        paces = run_all(tasks, names, self.options.jobs, self._setup.threads, lambda *_: None)
        return dict(zip(names, paces, strict=True))


def compared(
    models: Sequence[Candidate],
    budgets: Sequence[Budget],
    output: Path,
    options: Options,
    trained: Sequence[Result] = (),
) -> Comparison:
    """Runs a comparison, or goes on with it, sums it up and times its models. trained: results that were there before.

    Raises UserError for what cannot be compared, MachineError where the machine fails.
    """
    results, choices = Comparing(models, budgets, output, options).run() if models else ([], [])
    found = summarised([*trained, *results], choices)
    with files.locked(output):
        return dataclasses.replace(found, speed=speed_of(found.results, output))


def write_files(found: Comparison, output: Path, command: str) -> None:
    """Writes `comparison.json`, and `report.html` where a run came to its end. command: that makes them again."""
    output.mkdir(parents=True, exist_ok=True)
    content = TypeAdapter(Comparison).dump_python(found, mode="json")
    files.write_file(output / COMPARISON, (to_json(content, indent=1) + "\n").encode())
    if any(one.loss is not None for one in found.results):
        write_report(report_of(found, command), output / "report.html")
