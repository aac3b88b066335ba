"""The training loop: runs a recipe, and continues an interrupted run so that the result is the same to the bit.

- `Run` is the loop: the folder, its checkpoints, signals, observers, the clock and the optimizer. All that depends on
  what is learned is its objective (`training.objective`).
- `Trainer` is the run of a language model, whose objective is the next token (`training.next_token`).
- A checkpoint is the objective's weights, the optimizer's tensors and a few integers, step and tokens among them. There
  is no random generator to save: the position in the data and the learning rate follow from the integers, and random
  draws are keyed by the step.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic

import torch
from torch import Tensor

from longwave import files
from longwave.checkpoints.weights import WeightFiles, write
from longwave.errors import MachineError, require
from longwave.files.jsonfile import finite
from longwave.machine import device_of, fast_bf16
from longwave.model import Decoder
from longwave.training import checkpoints
from longwave.training.clock import Clock, Seconds, read_seconds
from longwave.training.data import TrainingData
from longwave.training.divergence import RunEnded, buffers_kept, not_finite
from longwave.training.freezing import freeze, freeze_notes
from longwave.training.metrics import METRICS, MetricsFile, Observer, TensorBoard, read_metrics
from longwave.training.next_token import HELD_OUT, NextToken
from longwave.training.objective import AnyObjective, Maker, StepLoss
from longwave.training.optimizers import StepReport
from longwave.training.process import deterministic, stop_signals
from longwave.training.progress import Progress, read_progress, write_progress
from longwave.training.recipe import Recipe, start_notes
from longwave.units import counted


class Interrupted(KeyboardInterrupt):
    """The run was stopped by a signal, after a checkpoint of `step`; the same command continues from there."""

    def __init__(self, step: int) -> None:
        super().__init__(f"stopped after step {step}; the same command continues from there")


class Run(Generic[AnyObjective]):
    """A training run in an output folder: `checkpoints/`, `metrics.jsonl`, `times.json`, and at the end `model/`.

    A folder with checkpoints of the same recipe is continued. make: gives the objective. Raises UserError for data that
    does not fit the model, for checkpoints that are damaged or of another run, and for a folder to which another run is
    writing.
    """

    def __init__(self, recipe: Recipe, output: str | Path, make: Maker[AnyObjective]) -> None:
        self.recipe, self.output = recipe, Path(output)
        self.device = device_of(recipe.training.device)
        self.data = TrainingData(recipe)
        self.progress = Progress()
        with files.locked(self.output) if self.output.exists() else nullcontext():
            self.objective = make(recipe, self.data, self._newest())
            freeze(self.objective.weights(), recipe.training.freeze)
            self.optimizer = recipe.optimizer.build(self.objective.trained)
            self._resume_optimizer()
        self._observers: list[Observer] = []
        self._last: dict[str, Any] = {}  # the entry of the last step

    def watch(self, observer: Observer) -> None:
        """Adds an observer, which is given the entry of every step."""
        self._observers.append(observer)

    @property
    def step(self) -> int:
        """Number of steps that have been run."""
        return self.progress.step

    @property
    def tokens(self) -> int:
        """Number of tokens that have been trained on."""
        return self.progress.tokens

    @property
    def flops(self) -> int:
        """Number of FLOPs that have been spent, at the tokens that every level really kept."""
        return self.progress.flops

    @property
    def position(self) -> float:
        """How far the run is, for schedules: in steps, or in the FLOPs of an expected step where it ends by FLOPs."""
        return self.step if self.recipe.training.flops is None else self.flops / self.recipe.step_flops

    @property
    def finished(self) -> bool:
        """Whether the run is at its end."""
        budget = self.recipe.training.flops
        return self.step >= self.recipe.steps if budget is None else self.flops >= budget

    def notes(self) -> list[str]:
        """Lines for people: what is frozen, what the data are, and settings that do less than they seem to."""
        frozen = freeze_notes(self.objective.weights(), self.recipe.training.freeze)
        slow = self.recipe.optimizer.kind == "muon" and self.device.type == "cpu" and not fast_bf16()
        told = ["optimizer.kind = muon: computes in bf16, which is slow on this CPU; adamw is many times faster here"]
        return [*(told if slow else ()), *start_notes(self.recipe), *frozen, *self.data.notes()]

    def measure(self) -> dict[str, Any]:
        """The held-out measure of the objective as it is now."""
        with self.computing():
            return self.objective.evaluate()

    def complete(self) -> None:
        """Trains to the last step and writes `model/`.

        Raises Interrupted after SIGINT or SIGTERM, once a checkpoint is written; RunEnded once numbers are not finite
        (`training.divergence`) or data are damaged; MachineError if the machine fails, or the folder is moved away.
        """
        complete_together([self])

    def run_until(self, stop: Callable[[], bool]) -> None:
        """Trains on like `complete`, up to the step before which `stop` says so, or the last; leaves a checkpoint."""
        with self._session():
            _run_steps([self], stop)

    def result(self) -> TrainingResult:
        """The outcome of the finished run."""
        *_, last = {}, *read_metrics(self.output / METRICS)
        progress, losses = self.progress, (last.get("loss"), last.get(HELD_OUT))
        each = {
            name.removeprefix(f"{HELD_OUT}/"): loss for name, loss in last.items() if name.startswith(f"{HELD_OUT}/")
        }
        facts = (each, tuple(last.get("retention", ())), progress.skipped, read_seconds(self.output))
        return TrainingResult(self.output / "model", progress.step, progress.tokens, *losses, *facts)

    @contextmanager
    def _session(self) -> Iterator[None]:
        """The folder is this run's own, and the time that passes is counted."""
        was_finished = self.finished
        with files.locked(self.output) as self._lock:
            self._require_newest()
            self._clock = Clock(self.output, self._logged_seconds())
            try:
                yield
            finally:
                if self._lock.in_place() and not was_finished:
                    self._clock.save()

    @contextmanager
    def _stepping(self) -> Iterator[None]:
        """The objective is ready for steps, and the run's own observers watch; in the end there is a checkpoint."""
        run = self.recipe.training
        self.objective.begin()
        self.objective.set_step(self.step, run.seed)
        own = self._own_observers()
        self._observers += own
        try:
            yield
            self._require_saved()
        finally:
            for observer in self._observers:
                observer.close()
            self._observers = [one for one in self._observers if one not in own]

    def _require_saved(self) -> None:
        """A checkpoint of the present step, if there is none."""
        newest = checkpoints.newest(self._checkpoints)
        if self.step and (newest is None or newest.step != self.step):
            self._checkpoint()

    def _one_step(self) -> None:
        run, started, before = self.recipe.training, time.perf_counter(), self.tokens
        logged = _due(self.step + 1, run.log_every) or self.step + 1 == run.steps
        step = self.objective.step(logged)
        loss, report, lr = self._update(step)
        tokens, pace = self.tokens - before, time.perf_counter() - started
        entry: dict[str, Any] = {"step": self.step, "tokens": self.tokens, "flops": self.flops}
        entry |= {"loss": loss, "lr_scale": lr}
        entry |= {"grad_norm": report.grad_norm, "clip": report.clip, "tokens_per_second": tokens / pace}
        entry |= {"skipped": True} if report.skipped else {}
        entry |= step.figures
        if _due(self.step, run.evaluate_every) or self.finished:
            entry |= self._evaluation()
        self._last = entry
        passed = self._clock.seconds
        times = {"seconds": round(passed.total, 3), "training_seconds": round(passed.training, 3)}
        self._record(finite(entry | times), logged)
        if _due(self.step, run.checkpoint_every) or self.finished:
            self._checkpoint()

    def _record(self, entry: dict[str, Any], logged: bool) -> None:
        """Tells the observers, and ends the run where it has diverged or its folder is gone."""
        for observer in self._observers:
            observer.record(entry)
        self._require_in_place()
        if logged or None in entry.values():
            self._require_finite(self.objective.weights())
        run = self.recipe.training
        if self.progress.in_a_row >= min(run.max_skipped, self.recipe.steps):
            skipped = f"{counted(self.progress.in_a_row, 'update')} in a row skipped, since gradients are not finite"
            raise self._ended(f"{skipped}: try a lower optimizer.lr")

    def _update(self, step: StepLoss) -> tuple[float, StepReport, float]:
        """One optimizer step: returns the mean loss per target, the optimizer's report and the schedule's factor."""
        with self._ending():
            batches = self.data.batches(self.step)
        # The loss is a mean over the targets of the whole step, so that its cut into micro-batches changes nothing.
        targets = max(sum(self.objective.targets(batch) for batch in batches), 1)
        loss = torch.zeros((), device=self.device)
        for batch in batches:
            with self.computing():
                loss += step.backward(batch, targets)
        scale = self.recipe.schedule.scale(self.position, self.tokens, self.recipe.steps)
        report = self.optimizer.step(scale)
        self.optimizer.zero_grad()
        self._advance(sum(batch.tokens.numel() for batch in batches), step.flops, report.skipped)
        return float(loss), report, scale

    def computing(self) -> torch.autocast:
        """The precision of the run: bf16, or that of the weights."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.recipe.training.precision == "bf16")

    def _advance(self, tokens: int, flops: int, skipped: bool) -> None:
        """On to the next step; what the modules learn from a skipped one without gradients is undone as well."""
        self.progress = self.progress.after(tokens, flops, skipped)
        with buffers_kept(self.objective.trained) if skipped else nullcontext():
            self.objective.set_step(self.step, self.recipe.training.seed)

    def _evaluation(self) -> dict[str, Any]:
        with self._clock.during("evaluation"), self._ending(), self.computing():
            return self.objective.evaluate()

    def _own_observers(self) -> list[Observer]:
        observers: list[Observer] = [MetricsFile(self.output / METRICS, self.step, self.recipe.training.log_every)]
        if self.recipe.training.tensorboard:
            observers.append(TensorBoard(self.output / "tensorboard", self.step))
        return observers

    def _checkpoint(self) -> None:
        with self._clock.during("checkpoints"):
            self._require_in_place()
            self._require_finite(self.objective.weights() | _moments(self.optimizer.tensors()))
            files.sweep(self._checkpoints)
            with files.folder(checkpoints.step_folder(self._checkpoints, self.step)) as staging:
                self.objective.write(staging, self._facts())
                write(self.optimizer.tensors(), staging / "optimizer.safetensors")
                write_progress(self.progress, self.recipe, self.data.tokenizer, staging)
            checkpoints.prune(self._checkpoints, self.recipe.training.keep, self.step)
        self._clock.save()

    def _write_result(self) -> None:
        with self._clock.during("checkpoints"):
            self._require_in_place()
            self._require_finite(self.objective.weights())
            with files.folder(self.output / "model") as staging:
                self.objective.write_result(staging, self.output / "model", self._facts())

    def _facts(self) -> dict[str, str | int | float | None]:
        """What the model card tells of this run so far; losses if this process made the last step."""
        recipe, last = self.recipe, finite(self._last)
        start = recipe.training.start_from
        losses = {
            "training loss, last step": last.get("loss"),
            "held-out loss, nats a token": last.get("held_out_loss"),
        }
        return {
            **({} if start is None else {"started from": Path(start).name}),
            "data": self.data.words(),
            "steps": self.step,
            "tokens": self.tokens,
            "tokens of a window": recipe.training.window,
            "window of its positions (PoSE)": recipe.training.pose and recipe.training.pose.window,
            "optimizer": recipe.optimizer.kind,
            **(losses if self._last else {}),
        }

    @property
    def _checkpoints(self) -> Path:
        return self.output / "checkpoints"

    def _ended(self, why: str) -> RunEnded:
        newest = checkpoints.newest(self._checkpoints)
        return RunEnded(self.step, why, newest and newest.path)

    @contextmanager
    def _ending(self) -> Iterator[None]:
        """A fault of the machine, such as damaged data, with the step and the newest checkpoint told."""
        try:
            yield
        except MachineError as error:
            raise self._ended(str(error)) from error

    def _require_finite(self, tensors: Mapping[str, Tensor]) -> None:
        if (name := not_finite(tensors)) is not None:
            raise self._ended(f"{name} holds NaN or infinity: try a lower optimizer.lr")

    def _require_in_place(self) -> None:
        self._lock.require_in_place("once it is back, the same command goes on from its newest checkpoint")

    def _require_newest(self) -> None:
        """UserError if another run has gone on in the folder since this one read it."""
        newest = checkpoints.newest(self._checkpoints)
        step = 0 if newest is None else newest.step
        require(step == self.step, f"{self.output}: has gone on from step {self.step} to {step} since it was read")

    def _logged_seconds(self) -> float:
        logged = read_metrics(self.output / METRICS)
        return float(logged[-1].get("seconds", 0)) if logged else 0.0

    def _newest(self) -> Path | None:
        """The checkpoint to go on from, whose progress is now the run's; None where there is none."""
        newest = checkpoints.newest_undamaged(self._checkpoints)
        if newest is not None:
            self.progress = read_progress(newest, self.recipe, self.data.tokenizer)
        return newest and newest.path

    def _resume_optimizer(self) -> None:
        if self.step:
            folder = checkpoints.step_folder(self._checkpoints, self.step)
            with files.OpenFolder(folder) as opened:
                saved = WeightFiles(opened, "optimizer.safetensors")
                self.optimizer.load_tensors({name: one.clone() for name, one in saved.load(saved.names()).items()})


def complete_together(runs: Sequence[Run[Any]]) -> None:
    """Completes several runs step by step in turn, so that what they share is made once for all; see `Run.complete`.

    Each ends as it does alone, to the bit. A run that is behind the others catches up first. After a signal all of them
    have a checkpoint.
    """
    with ExitStack() as sessions:
        for run in runs:
            sessions.enter_context(run._session())
        _run_steps(runs, lambda: False)
        for run in runs:
            run._write_result()


def _run_steps(runs: Sequence[Run[Any]], stop: Callable[[], bool]) -> None:
    """Runs steps, those of the run that is least far first, until all are finished or `stop` says so."""
    exact = any(run.recipe.training.deterministic and run.device.type == "cuda" for run in runs)
    with ExitStack() as begun, stop_signals() as stopped, deterministic(exact):
        for run in runs:
            begun.enter_context(run._stepping())
        while (going := [run for run in runs if not run.finished]) and not stop():
            behind = min(going, key=lambda run: run.step)
            behind._one_step()
            if stopped and not all(run.finished for run in runs):
                for run in runs:
                    run._require_saved()
                raise Interrupted(behind.step)


@dataclass(frozen=True)
class TrainingResult:
    """The outcome of a run.

    model: the folder of the trained model. step, tokens: updates, and tokens trained on. loss, held_out_loss: the last
    ones, in nats per token; None where one is not finite, or no longer logged. held_out_by_folder: the held-out loss of
    each folder, where the data are several. retention: for each level the share of
    the tokens entering it that it kept on held-out text. skipped: updates that were skipped, as their gradient was not
    finite. seconds: the time that passed, over all sessions of the run.
    """

    model: Path
    step: int
    tokens: int
    loss: float | None
    held_out_loss: float | None
    held_out_by_folder: Mapping[str, float | None]
    retention: tuple[float, ...]
    skipped: int
    seconds: Seconds


class Trainer(Run[NextToken]):
    """The training run of a language model: each of its checkpoints is a model folder."""

    def __init__(self, recipe: Recipe, output: str | Path) -> None:
        super().__init__(recipe, output, NextToken)

    @property
    def model(self) -> Decoder:
        """The model in training."""
        return self.objective.model

    def run(self) -> Decoder:
        """Trains to the last step, writes `model/` and returns the model; raises what `complete` does."""
        self.complete()
        return self.model.eval()


def _moments(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state of an optimizer but for the bounds of its clipping, which are infinite while there are none."""
    return {f"optimizer.{name}": state[name] for name in state if not name.startswith("clipping.")}


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
