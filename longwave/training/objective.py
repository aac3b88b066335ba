"""An objective: all of a run that depends on what is learned. The rest of a run is the same for all (`training.loop`).

- It owns its modules: those that are trained, and frozen ones beside them, such as a teacher.
- It runs forward and backward over a micro-batch, towards a loss that is summed over targets, so that a step's cut into
  micro-batches changes nothing. How it does that is its own affair: layer by layer, for example.
- It writes what a checkpoint holds of it and begins from there; the optimizer's state and the progress are the run's.

A new objective is a class of this protocol, made by a function of its recipe, its data and the checkpoint to go on from
(`Maker`), which is given to `training.loop.Run`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor, nn

from longwave.data.packed import Batch
from longwave.training.data import TrainingData
from longwave.training.recipe import Recipe


@runtime_checkable
class StepLoss(Protocol):
    """The losses of one optimizer step, and the figures that come with them."""

    def backward(self, batch: Batch, targets: int) -> Tensor:
        """Adds the gradient of a micro-batch's loss to every trained parameter, and returns that loss, detached.

        The loss is summed over the micro-batch's targets and divided by `targets`, those of the whole step. The forward
        pass is made in the precision of the run, in which this is called; see `plain_backward` for the way back.
        """
        ...

    @property
    def flops(self) -> int:
        """FLOPs of the step, backward passes and a teacher's forward passes included. Asked for when it is over."""
        ...

    @property
    def figures(self) -> Mapping[str, Any]:
        """Numbers, or lists of numbers, for the step's entry in the metrics."""
        ...


def plain_backward(loss: Tensor) -> Tensor:
    """Runs the backward pass from a loss, outside of autocast as torch advises, and returns the loss, detached."""
    with torch.autocast(loss.device.type, enabled=False):
        loss.backward()
    return loss.detach()


@runtime_checkable
class Objective(Protocol):
    """What a run trains, towards which loss, and how it is measured and kept."""

    @property
    def trained(self) -> nn.Module:
        """The module whose parameters the optimizer updates: those below it that require a gradient."""
        ...

    def weights(self) -> dict[str, Tensor]:
        """Every parameter and buffer of the trained module, itself, by the name that messages and patterns have."""
        ...

    def begin(self) -> None:
        """Called once before the first step of a session, for what only steps need, such as compiling."""
        ...

    def set_step(self, step: int, seed: int) -> None:
        """Told the step about to run, from which draws and schedules inside the modules follow."""
        ...

    def targets(self, batch: Batch) -> int:
        """Number of targets in a micro-batch; the loss of a step is divided by all of its targets."""
        ...

    def step(self, logged: bool) -> StepLoss:
        """Begins a step. logged: whether its figures are wanted."""
        ...

    def evaluate(self) -> dict[str, Any]:
        """The held-out measure, as figures for the metrics: `held_out_loss`, and others."""
        ...

    def write(self, folder: Path, facts: Mapping[str, str | int | float | None]) -> None:
        """Writes what a checkpoint holds of it. facts: about the run so far, None for one that is not known."""
        ...

    def write_result(self, folder: Path, place: Path, facts: Mapping[str, str | int | float | None]) -> None:
        """Writes what the run ends with into a folder that is moved to `place` once it is whole."""
        ...


AnyObjective = TypeVar("AnyObjective", bound=Objective, covariant=True)


@runtime_checkable
class Maker(Protocol[AnyObjective]):
    """Makes an objective at its first step, or as a checkpoint of it has it."""

    def __call__(self, recipe: Recipe, data: TrainingData, checkpoint: Path | None) -> AnyObjective: ...
