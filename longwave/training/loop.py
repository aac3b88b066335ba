"""The training loop: runs a recipe, and continues an interrupted run so that the result is the same to the bit.

- A checkpoint is the weights, the optimizer's tensors and a few integers, step and tokens among them. There is no
  random generator to save: the position in the data and the learning rate follow from the integers, and random draws
  are keyed by the step.
- Every checkpoint is also a model folder that `longwave.load` takes.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, cast

import torch
from torch import Tensor

from longwave import files
from longwave.checkpoints import load, native
from longwave.checkpoints.card import write_card
from longwave.checkpoints.generation import completed, write_generation
from longwave.checkpoints.weights import WeightFiles, write
from longwave.data.packed import Batch, PackedTokens, WindowSampler
from longwave.data.prepared import PreparedInfo
from longwave.data.tokenizer import Tokenizer
from longwave.errors import MachineError, require
from longwave.evaluation.held_out import held_out_loss
from longwave.files.jsonfile import finite
from longwave.machine import device_of
from longwave.model import Decoder
from longwave.resamplers import Resampler, Selection
from longwave.streams import Stream
from longwave.training import checkpoints
from longwave.training.clock import Clock, Seconds, read_seconds
from longwave.training.divergence import RunEnded, buffers_kept, not_finite, require_finite, weights_of
from longwave.training.flops import StepFlops
from longwave.training.metrics import METRICS, MetricsFile, Observer, TensorBoard, read_metrics
from longwave.training.notes import notes
from longwave.training.optimizers import StepReport
from longwave.training.progress import Progress, read_progress, write_progress
from longwave.training.recipe import Recipe, require_start
from longwave.units import counted


class Interrupted(KeyboardInterrupt):
    """The run was stopped by a signal, after a checkpoint of `step`; the same command continues from there."""

    def __init__(self, step: int) -> None:
        super().__init__(f"stopped after step {step}; the same command continues from there")


class _LevelFigures:
    """A watcher of the resamplers that keeps each level's figures of its last selection in a step."""

    def __init__(self) -> None:
        self._found: dict[int, Mapping[str, torch.Tensor]] = {}

    def __call__(self, level: Resampler, stream: Stream, selection: Selection) -> None:
        self._found[level.index] = level.metrics(selection)

    def by_name(self) -> dict[str, list[float]]:
        """For each figure the list of its values, outer levels first."""
        levels = [self._found[index] for index in sorted(self._found)]
        return {
            name: [float(level[name]) for level in levels if name in level] for name in (levels[0] if levels else ())
        }


@dataclass(frozen=True)
class TrainingResult:
    """The outcome of a run.

    model: the folder of the trained model. step, tokens: updates, and tokens trained on. loss, held_out_loss: the last
    ones, in nats per token; None where one is not finite, or no longer logged. retention: for each level the share of
    the tokens entering it that it kept on held-out text. skipped: updates that were skipped, as their gradient was not
    finite. seconds: the time that passed, over all sessions of the run.
    """

    model: Path
    step: int
    tokens: int
    loss: float | None
    held_out_loss: float | None
    retention: tuple[float, ...]
    skipped: int
    seconds: Seconds


class Trainer:
    """A training run in an output folder: `checkpoints/`, `metrics.jsonl`, `times.json`, and at the end `model/`.

    A folder with checkpoints of the same recipe is continued. Raises UserError for data that does not fit the model,
    for checkpoints that are damaged or of another run, and for a folder to which another run is writing.
    """

    def __init__(self, recipe: Recipe, output: str | Path) -> None:
        self.recipe, self.output = recipe, Path(output)
        run = recipe.training
        self.device = device_of(run.device)
        self.info = PreparedInfo.read(recipe.data.folder)
        self.info.require_vocab(recipe.model.vocab_size)
        self.tokenizer = Tokenizer.load(recipe.data.folder)
        self.info.require_tokenizer(self.tokenizer)
        self.data = PackedTokens(recipe.data.folder, "train", run.window)
        self.sampler = WindowSampler(len(self.data), run.seed)
        self.held_out = PackedTokens(recipe.data.folder, "held_out", run.window, keep_last=True)
        self.progress = Progress()
        with files.locked(self.output) if self.output.exists() else nullcontext():
            self.model = self._resumed_model() or self._first_model()
            self.model.train().checkpoint_blocks(run.recompute)
            self.optimizer = recipe.optimizer.build(self.model)
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
        """Lines for people about the data, and about settings that do less with them than they seem to."""
        return [*self.data.notes(), *notes(self.recipe, len(self.data), len(self.held_out))]

    def result(self) -> TrainingResult:
        """The outcome of the finished run."""
        *_, last = {}, *read_metrics(self.output / METRICS)
        progress, losses = self.progress, (last.get("loss"), last.get("held_out_loss"))
        facts = (tuple(last.get("retention", ())), progress.skipped, read_seconds(self.output))
        return TrainingResult(self.output / "model", progress.step, progress.tokens, *losses, *facts)

    def run(self) -> Decoder:
        """Trains to the last step, writes `model/` and returns the model.

        Raises Interrupted after SIGINT or SIGTERM, once a checkpoint is written; RunEnded once numbers are not finite
        (`training.divergence`) or data are damaged; MachineError if the machine fails, or the folder is moved away.
        """
        with self._session():
            self._run_steps(lambda: False)
            self._write_model()
        return self.model.eval()

    def run_until(self, stop: Callable[[], bool]) -> None:
        """Trains on, as `run` does, up to the step before which `stop` says so, or the last; leaves a checkpoint."""
        with self._session():
            self._run_steps(stop)

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

    def _run_steps(self, stop: Callable[[], bool]) -> None:
        run = self.recipe.training
        self._compile()
        self.model.set_step(self.step, run.seed)
        own = self._own_observers()
        self._observers += own
        try:
            with _stop_signals() as stopped, _deterministic(run.deterministic and self.device.type == "cuda"):
                while not (self.finished or stop()):
                    self._one_step()
                    if stopped and not self.finished:
                        self._checkpoint()
                        raise Interrupted(self.step)
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
        figures, logged = _LevelFigures(), _due(self.step + 1, run.log_every) or self.step + 1 == run.steps
        with self.model.watching(figures) if logged else nullcontext():
            loss, report, lr = self._update()
        tokens, pace = self.tokens - before, time.perf_counter() - started
        entry: dict[str, Any] = {"step": self.step, "tokens": self.tokens, "flops": self.flops}
        entry |= {"loss": loss, "lr_scale": lr}
        entry |= {"grad_norm": report.grad_norm, "clip": report.clip, "tokens_per_second": tokens / pace}
        entry |= {"skipped": True} if report.skipped else {}
        entry |= figures.by_name()
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
            self._require_finite(weights_of(self.model))
        run = self.recipe.training
        if self.progress.in_a_row >= min(run.max_skipped, self.recipe.steps):
            skipped = f"{counted(self.progress.in_a_row, 'update')} in a row skipped, since gradients are not finite"
            raise self._ended(f"{skipped}: try a lower optimizer.lr")

    def _update(self) -> tuple[float, StepReport, float]:
        """One optimizer step: returns the mean loss per target, the optimizer's report and the schedule's factor."""
        run = self.recipe.training
        batches = self._batches()
        # The loss is a mean over the targets of the whole step, so that its cut into micro-batches changes nothing.
        targets = sum(batch.predicted for batch in batches)
        loss, flops = torch.zeros((), device=self.device), StepFlops(self.model)
        for batch in batches:
            tokens, following, stream = batch.inputs(self.device)
            flops.began(stream)
            computing = torch.autocast(self.device.type, torch.bfloat16, enabled=run.precision == "bf16")
            with computing, self.model.watching(flops):
                part = self.model.loss(tokens, following, stream) / max(targets, 1)
            part.backward()
            loss += part.detach()
        scale = self.recipe.schedule.scale(self.position, self.tokens, self.recipe.steps)
        report = self.optimizer.step(scale)
        self.optimizer.zero_grad()
        self._advance(sum(batch.tokens.numel() for batch in batches), flops.total, report.skipped)
        return float(loss), report, scale

    def _advance(self, tokens: int, flops: int, skipped: bool) -> None:
        """On to the next step; what the model would learn from a skipped one without gradients is undone as well."""
        self.progress = self.progress.after(tokens, flops, skipped)
        with buffers_kept(self.model) if skipped else nullcontext():
            self.model.set_step(self.step, self.recipe.training.seed)

    def _batches(self) -> list[Batch]:
        run = self.recipe.training
        first, size = self.step * run.batch_windows, run.micro_windows or run.batch_windows
        starts = range(first, first + run.batch_windows, size)
        with self._ending():
            return [self.data.batch(range(start, start + size), self.sampler) for start in starts]

    def _evaluation(self) -> dict[str, Any]:
        run = self.recipe.training
        computing = torch.autocast(self.device.type, torch.bfloat16, enabled=run.precision == "bf16")
        with self._clock.during("evaluation"), self._ending(), computing:
            result = held_out_loss(self.model, self.held_out, windows=run.evaluate_windows)
        retention = {"retention": list(result.retention)} if result.retention else {}
        return {"held_out_loss": result.loss, **retention}

    def _own_observers(self) -> list[Observer]:
        observers: list[Observer] = [MetricsFile(self.output / METRICS, self.step, self.recipe.training.log_every)]
        if self.recipe.training.tensorboard:
            observers.append(TensorBoard(self.output / "tensorboard", self.step))
        return observers

    def _compile(self) -> None:
        if self.recipe.training.compile:
            for part in self.model.parts:
                if part.role == "mlp":
                    part.compile(dynamic=True)

    def _checkpoint(self) -> None:
        with self._clock.during("checkpoints"):
            self._require_in_place()
            self._require_finite(weights_of(self.model) | _moments(self.optimizer.tensors()))
            files.sweep(self._checkpoints)
            with files.folder(checkpoints.step_folder(self._checkpoints, self.step)) as staging:
                self._write_folder(staging)
                write(self.optimizer.tensors(), staging / "optimizer.safetensors")
                write_progress(self.progress, self.recipe, self.tokenizer, staging)
            checkpoints.prune(self._checkpoints, self.recipe.training.keep, self.step)
        self._clock.save()

    def _write_model(self) -> None:
        with self._clock.during("checkpoints"):
            self._require_in_place()
            self._require_finite(weights_of(self.model))
            with files.folder(self.output / "model") as staging:
                self._write_folder(staging)
                write_card(self.model, staging, self.output / "model")

    def _write_folder(self, staging: Path) -> None:
        self.model.origin.training = {**({} if self._last else self.model.origin.training), **self._facts()}
        generation = completed(self.model.origin.generation, self.tokenizer)
        native.write_model(self.model, staging, generation)
        self.tokenizer.save(staging)
        write_generation(generation, staging)

    def _facts(self) -> dict[str, str | int | float]:
        """What the model card tells of this run so far; losses if this process made the last step."""
        recipe, last = self.recipe, finite(self._last)
        start = recipe.training.start_from
        losses = {
            "training loss, last step": last.get("loss"),
            "held-out loss, nats a token": last.get("held_out_loss"),
        }
        return {
            **({} if start is None else {"started from": Path(start).name}),
            "data": Path(recipe.data.folder).name,
            "steps": self.step,
            "tokens": self.tokens,
            "tokens of a window": recipe.training.window,
            "optimizer": recipe.optimizer.kind,
            **{name: loss for name, loss in losses.items() if loss is not None},
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

    def _resumed_model(self) -> Decoder | None:
        newest = checkpoints.newest_undamaged(self._checkpoints)
        if newest is None:
            return None
        self.progress = read_progress(newest, self.recipe, self.tokenizer)
        model = load(newest.path, device=self.device)
        require_finite(model, str(newest.path), "remove the folder to go on from an earlier one")
        return model

    def _first_model(self) -> Decoder:
        """The model before the first step: with random weights, or with those of `start_from` in fp32."""
        run, config = self.recipe.training, self.recipe.model
        if run.start_from is None:
            return Decoder(config, run.seed).to(self.device)
        start = load(run.start_from, dtype=torch.float32, device=self.device, tokenizer=True)
        require_finite(start, f"training.start_from = {run.start_from}", "give another folder")
        require_start(config, start.config, run.start_from)
        if start.tokenizer is not None:
            self.info.require_tokenizer(start.tokenizer)
        with torch.device("meta"):
            model = Decoder(config)
        model.adopt(start.state_dict())
        model.origin.generation = start.origin.generation
        return model

    def _resume_optimizer(self) -> None:
        if self.step:
            folder = checkpoints.step_folder(self._checkpoints, self.step)
            with files.OpenFolder(folder) as opened:
                saved = WeightFiles(opened, "optimizer.safetensors")
                self.optimizer.load_tensors({name: one.clone() for name, one in saved.load(saved.names()).items()})


def _moments(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state of an optimizer but for the bounds of its clipping, which are infinite while there are none."""
    return {f"optimizer.{name}": state[name] for name in state if not name.startswith("clipping.")}


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


@contextmanager
def _stop_signals() -> Iterator[list[int]]:
    """Collects SIGINT and SIGTERM in a list, so that a step is never cut short; the second of a kind ends at once."""
    received: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        received.append(number)
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)

    previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        for number in previous:
            signal.signal(number, note)
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextmanager
def _deterministic(on: bool) -> Iterator[None]:
    """Makes a GPU use kernels that add in a fixed order, so that a step always has the same bits; a CPU's all do."""
    if not on:
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it, cuBLAS is refused
    mode, memory = torch.get_deterministic_debug_mode(), cast(Any, torch.utils.deterministic)
    # Without this, PyTorch would also fill all new memory in this mode, which costs time and guards nothing here.
    filling, memory.fill_uninitialized_memory = memory.fill_uninitialized_memory, False
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(mode)
        memory.fill_uninitialized_memory = filling
