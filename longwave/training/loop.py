"""The training loop: runs a recipe, and continues an interrupted run so that the result is the same to the bit.

- A checkpoint is the weights, the optimizer's tensors and two integers, step and tokens. There is no random generator
to
  save: the position in the data and the learning rate follow from the integers, and random draws are keyed by the step.
- Every checkpoint is also a model folder that `longwave.load` takes.
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import FrameType
from typing import Any, cast

import torch

from longwave import files
from longwave.checkpoints import find, load, native
from longwave.checkpoints.generation import completed, write_generation
from longwave.checkpoints.weights import WeightFiles, write
from longwave.data.packed import Batch, PackedTokens, WindowSampler
from longwave.data.shards import PreparedInfo
from longwave.data.tokenizer import Tokenizer
from longwave.errors import UserError
from longwave.evaluation.held_out import held_out_loss
from longwave.machine import device_of
from longwave.model import Decoder
from longwave.resamplers import Resampler, Selection
from longwave.streams import Stream
from longwave.training import checkpoints
from longwave.training.metrics import MetricsFile, Observer, TensorBoard
from longwave.training.recipe import Recipe, TrainingConfig, flat, require_start

# Settings of [training] that may differ when a run continues, since they do not change what is learned.
_FREE_TO_CHANGE = {"log_every", "checkpoint_every", "keep", "tensorboard", "device", "deterministic"}


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


class Trainer:
    """A training run in an output folder: `checkpoints/`, `metrics.jsonl`, and at the end `model/`.

    A folder with checkpoints of the same recipe is continued. Raises UserError for data that does not fit the model,
    and for checkpoints that are damaged or of another run.
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
        self.step = self.tokens = 0
        self.model = self._resumed_model() or self._first_model()
        self.model.train().checkpoint_blocks(run.recompute)
        self.optimizer = recipe.optimizer.build(self.model)
        self._resume_optimizer()
        self._observers: list[Observer] = []

    def watch(self, observer: Observer) -> None:
        """Adds an observer, which is given the entry of every step."""
        self._observers.append(observer)

    @property
    def finished(self) -> bool:
        """Whether all steps have been run."""
        return self.step >= self.recipe.training.steps

    def run(self) -> Decoder:
        """Trains to the last step, writes `model/` and returns the model.

        Raises Interrupted after SIGINT or SIGTERM, once a checkpoint is written.
        """
        run = self.recipe.training
        self._observers += self._own_observers()
        self._compile()
        self.model.set_step(self.step, run.seed)
        try:
            with _stop_signals() as stopped, _deterministic(run.deterministic and self.device.type == "cuda"):
                while not self.finished:
                    self._one_step()
                    if stopped and not self.finished:
                        self._checkpoint()
                        raise Interrupted(self.step)
        finally:
            for observer in self._observers:
                observer.close()
        self._write_model()
        return self.model.eval()

    def _one_step(self) -> None:
        run, started = self.recipe.training, time.perf_counter()
        before, figures = self.tokens, _LevelFigures()
        logged = _due(self.step + 1, run.log_every, run.steps)
        with self.model.watching(figures) if logged else nullcontext():
            loss, report, lr = self._update()
        self.step += 1
        self.model.set_step(self.step, run.seed)
        tokens = self.tokens - before
        entry: dict[str, Any] = {"step": self.step, "tokens": self.tokens, "loss": loss, "lr_scale": lr}
        entry |= {"grad_norm": report.grad_norm, "clip": report.clip}
        entry |= {"tokens_per_second": tokens / (time.perf_counter() - started)}
        entry |= figures.by_name()
        if _due(self.step, run.evaluate_every, run.steps):
            entry |= self._evaluation()
        for observer in self._observers:
            observer.record(entry)
        if _due(self.step, run.checkpoint_every, run.steps):
            self._checkpoint()

    def _update(self) -> tuple[float, Any, float]:
        """One optimizer step: returns the mean loss per target, the optimizer's report and the schedule's factor."""
        run = self.recipe.training
        batches = self._batches()
        # The loss is a mean over the targets of the whole step, so that its cut into micro-batches changes nothing.
        targets = sum(batch.predicted for batch in batches)
        loss = torch.zeros((), device=self.device)
        for batch in batches:
            with torch.autocast(self.device.type, torch.bfloat16, enabled=run.precision == "bf16"):
                part = self.model.loss(*batch.inputs(self.device)) / max(targets, 1)
            part.backward()
            loss += part.detach()
        scale = self.recipe.schedule.scale(self.step, self.tokens, run.steps)
        self.tokens += sum(batch.tokens.numel() for batch in batches)
        report = self.optimizer.step(scale)
        self.optimizer.zero_grad()
        return float(loss), report, scale

    def _batches(self) -> list[Batch]:
        run = self.recipe.training
        first, size = self.step * run.batch_windows, run.micro_windows or run.batch_windows
        starts = range(first, first + run.batch_windows, size)
        return [self.data.batch(range(start, start + size), self.sampler) for start in starts]

    def _evaluation(self) -> dict[str, Any]:
        run = self.recipe.training
        with torch.autocast(self.device.type, torch.bfloat16, enabled=run.precision == "bf16"):
            result = held_out_loss(self.model, self.held_out, windows=run.evaluate_windows)
        retention = {"retention": list(result.retention)} if result.retention else {}
        return {"held_out_loss": result.loss, **retention}

    def _own_observers(self) -> list[Observer]:
        self.output.mkdir(parents=True, exist_ok=True)
        observers: list[Observer] = [
            MetricsFile(self.output / "metrics.jsonl", self.step, self.recipe.training.log_every)
        ]
        if self.recipe.training.tensorboard:
            observers.append(TensorBoard(self.output / "tensorboard", self.step))
        return observers

    def _compile(self) -> None:
        if self.recipe.training.compile:
            for part in self.model.parts:
                if part.role == "mlp":
                    part.compile(dynamic=True)

    def _checkpoint(self) -> None:
        parent = self.output / "checkpoints"
        files.sweep(parent)
        with files.folder(checkpoints.step_folder(parent, self.step)) as staging:
            self._write_folder(staging)
            write(self.optimizer.tensors(), staging / "optimizer.safetensors")
            progress = {"step": self.step, "tokens": self.tokens, "recipe": self.recipe.to_dict()}
            progress["tokenizer"] = self.tokenizer.fingerprint
            (staging / "trainer.json").write_text(json.dumps(progress, indent=2) + "\n")
        checkpoints.prune(parent, self.recipe.training.keep)

    def _write_model(self) -> None:
        with files.folder(self.output / "model") as staging:
            self._write_folder(staging)

    def _write_folder(self, staging: Path) -> None:
        native.write_model(self.model, staging)
        self.tokenizer.save(staging)
        write_generation(completed(self.model.origin.generation, self.tokenizer), staging)

    def _resumed_model(self) -> Decoder | None:
        newest = checkpoints.newest_undamaged(self.output / "checkpoints")
        if newest is None:
            return None
        progress = json.loads((newest.path / "trainer.json").read_text())
        _check_same_run(progress, self.recipe, self.tokenizer, newest.path)
        self.step = int(progress["step"])
        run = self.recipe.training  # older checkpoints hold no token count; all their training windows were full
        self.tokens = int(progress.get("tokens", self.step * run.batch_windows * run.window))
        return load(newest.path, device=self.device)

    def _first_model(self) -> Decoder:
        """The model before the first step: with random weights, or with those of `start_from` in fp32."""
        run, config = self.recipe.training, self.recipe.model
        if run.start_from is None:
            return Decoder(config, run.seed).to(self.device)
        folder = find(run.start_from)
        start = load(folder, dtype=torch.float32, device=self.device)
        require_start(config, start.config, run.start_from)
        if (folder / "tokenizer.json").exists():
            self.info.require_tokenizer(Tokenizer.load(folder))
        with torch.device("meta"):
            model = Decoder(config)
        model.adopt(start.state_dict())
        model.origin.generation = start.origin.generation
        return model

    def _resume_optimizer(self) -> None:
        if self.step:
            folder = checkpoints.step_folder(self.output / "checkpoints", self.step)
            saved = WeightFiles(folder, "optimizer.safetensors")
            self.optimizer.load_tensors({name: tensor.clone() for name, tensor in saved.load(saved.names()).items()})


def _due(step: int, every: int, last: int) -> bool:
    return step == last or (every > 0 and step % every == 0)


def _check_same_run(progress: dict[str, Any], recipe: Recipe, tokenizer: Tokenizer, path: Path) -> None:
    """Raises UserError unless a checkpoint was written by a run of this recipe and tokenizer."""
    written, ours = progress["recipe"], flat(json.loads(json.dumps(recipe.to_dict())))
    theirs = flat({**written, "model": native.from_format_1(written["model"])})
    free = {f"training.{name}" for name in _FREE_TO_CHANGE}
    for name in sorted({*theirs, *ours} - free):
        if theirs.get(name) != ours.get(name):
            values = f"{name} = {theirs.get(name)!r} there, {ours.get(name)!r} here"
            raise UserError(f"{path}: a checkpoint of another run ({values}); give another output folder, or remove it")
    if progress["tokenizer"] != tokenizer.fingerprint:
        raise UserError(f"{path}: trained with another tokenizer than {recipe.data.folder} has; give another output")


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


def with_training(recipe: Recipe, **changes: Any) -> Recipe:
    """A copy of the recipe with other values in its `training` table."""
    training: TrainingConfig = dataclasses.replace(recipe.training, **changes)
    return dataclasses.replace(recipe, training=training)
