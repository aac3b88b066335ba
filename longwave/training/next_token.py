"""The objective of a language model: the cross-entropy of every next token.

Every checkpoint of it is also a model folder that `longwave.load` takes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from longwave.checkpoints import load, native
from longwave.checkpoints.card import write_card
from longwave.checkpoints.generation import completed, write_generation
from longwave.data.packed import Batch
from longwave.errors import require
from longwave.evaluation.held_out import held_out_loss
from longwave.machine import device_of
from longwave.model import Decoder
from longwave.resamplers import Resampler, Selection
from longwave.streams import Stream
from longwave.training.data import TrainingData
from longwave.training.divergence import require_finite, weights_of
from longwave.training.flops import StepFlops
from longwave.training.objective import plain_backward
from longwave.training.recipe import Recipe, require_start

HELD_OUT = "held_out_loss"  # in the metrics; that of one folder among several is `held_out_loss/NAME`


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


class NextTokenStep:
    """The losses of one step of a decoder (`training.objective.StepLoss`)."""

    def __init__(self, model: Decoder, logged: bool) -> None:
        self._model, self._logged = model, logged
        self._flops, self._levels = StepFlops(model), _LevelFigures()

    def backward(self, batch: Batch, targets: int) -> Tensor:
        """The cross-entropy of the next tokens of a batch, in nats, as its share of the step's mean."""
        tokens, following, stream = batch.inputs(self._model.embed.weight.device)
        with self.watching(stream):
            loss = self._model.loss(tokens, following, stream) / targets
        return plain_backward(loss)

    @contextmanager
    def watching(self, stream: Stream) -> Iterator[None]:
        """While the model runs over a micro-batch: what its levels keep is counted and, if logged, told of."""
        self._flops.began(stream)
        levels = self._model.watching(self._levels) if self._logged else nullcontext()
        with self._model.watching(self._flops), levels:
            yield

    @property
    def flops(self) -> int:
        """FLOPs of the step, at the tokens that every level really kept."""
        return self._flops.total

    @property
    def figures(self) -> dict[str, list[float]]:
        """The figures of every level, outer ones first."""
        return self._levels.by_name()


class NextToken:
    """A decoder that learns to predict the next token (`training.objective.Objective`).

    checkpoint: the folder to go on from; without one the model begins with random weights, or with those of
    `training.start_from`, or as `start` makes it. Raises UserError for weights that are not finite, and for a model to
    start from that does not fit.
    """

    def __init__(
        self,
        recipe: Recipe,
        data: TrainingData,
        checkpoint: Path | None,
        *,
        start: Callable[[], Decoder] | None = None,
    ) -> None:
        require(recipe.medusa is None, "medusa: this trains whole models; leave [medusa] out")
        self._recipe, self._data, self._start = recipe, data, start
        self._device = device_of(recipe.training.device)
        self.model = self._first() if checkpoint is None else self._resumed(checkpoint)
        self.model.train().checkpoint_blocks(recipe.training.recompute)

    @property
    def trained(self) -> Decoder:
        """The model."""
        return self.model

    def weights(self) -> dict[str, Tensor]:
        """Every weight and buffer by the name that the model's folder has for it."""
        return weights_of(self.model)

    def begin(self) -> None:
        """Compiles the feed-forwards, if the recipe says so."""
        for part in self.model.parts if self._recipe.training.compile else ():
            if part.role == "mlp":
                part.compile(dynamic=True)

    def set_step(self, step: int, seed: int) -> None:
        """Tells the levels the step about to run."""
        self.model.set_step(step, seed)

    def targets(self, batch: Batch) -> int:
        """Number of tokens that have a next one to be learned."""
        return batch.predicted

    def step(self, logged: bool) -> NextTokenStep:
        """Begins a step."""
        return NextTokenStep(self.model, logged)

    def evaluate(self) -> dict[str, Any]:
        """The held-out loss in nats per token, and the share of tokens that each level kept."""
        return held_out_figures(self.model, self._data, self._recipe.training.evaluate_windows)

    def write(self, folder: Path, facts: Mapping[str, str | int | float | None]) -> None:
        """Writes a model folder, with facts for its card."""
        told = {**self.model.origin.training, **facts}
        self.model.origin.training = {name: fact for name, fact in told.items() if fact is not None}
        generation = completed(self.model.origin.generation, self._data.tokenizer)
        native.write_model(self.model, folder, generation)
        self._data.tokenizer.save(folder)
        write_generation(generation, folder)

    def write_result(self, folder: Path, place: Path, facts: Mapping[str, str | int | float | None]) -> None:
        """Writes the model folder with its card."""
        self.write(folder, facts)
        write_card(self.model, folder, place)

    def _resumed(self, checkpoint: Path) -> Decoder:
        model = load(checkpoint, device=self._device)
        require_finite(model, str(checkpoint), "remove the folder to go on from an earlier one")
        return model

    def _first(self) -> Decoder:
        """The model before the first step: with random weights, or with those of `start_from` in fp32."""
        run, config = self._recipe.training, self._recipe.model
        if self._start is not None:
            return self._fitting(self._start().to(self._device), "the model to start from")
        if run.start_from is None:
            return Decoder(config, run.seed).to(self._device)
        start = load(run.start_from, dtype=torch.float32, device=self._device, tokenizer=True)
        require_start(config, start.config, run.start_from)
        self._fitting(start, f"training.start_from = {run.start_from}")
        with torch.device("meta"):
            model = Decoder(config)
        model.adopt(start.state_dict())
        model.origin.generation = start.origin.generation
        return model

    def _fitting(self, start: Decoder, named: str) -> Decoder:
        """A model to start from, whose weights are finite and whose tokenizer, if it has one, made the data."""
        require_finite(start, named, "give another folder")
        if start.tokenizer is not None:
            self._data.require_tokenizer(start.tokenizer)
        return start


def held_out_figures(model: Decoder, data: TrainingData, windows: int) -> dict[str, Any]:
    """The held-out loss of a model over the first windows (0 for all) of a run's data, and what each level kept.

    Of several folders, each one's loss stands beside the mean of all, which goes by their shares.
    """
    found = [held_out_loss(model, one.held_out, windows=windows) for one in data.sources]
    kept = [data.mean(level) for level in zip(*(one.retention for one in found), strict=True)]
    each = {f"{HELD_OUT}/{one.name}": its.loss for one, its in zip(data.sources, found, strict=True)}
    return {
        HELD_OUT: data.mean([one.loss for one in found]),
        **(each if len(data.sources) > 1 else {}),
        **({"retention": kept} if kept else {}),
    }
