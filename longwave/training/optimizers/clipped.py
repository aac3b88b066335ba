"""Optimizers of torch behind the interface of this package: fp32 masters, one clipped norm, a state kept by names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from longwave.training.optimizers.weights import (
    StepReport,
    Weight,
    copied_masters,
    forget_gradients,
    load,
    write_copies,
)


@dataclass(frozen=True)
class Share:
    """The weights that one of torch's optimizers updates.

    optimizer: made over `grouped(...)`, with the state that torch would make at its first step, so that a state has the
    same names before that step as after it. names: for each key of a weight's state the name that it has in ours.
    """

    weights: Sequence[Weight]
    optimizer: torch.optim.Optimizer
    names: Mapping[str, str]

    def step(self, lr_scale: float) -> None:
        """Update the masters from their gradients, at `lr_scale` times the configured learning rates."""
        for group in self.optimizer.param_groups:
            group["lr"] = group["full_lr"] * lr_scale
        self.optimizer.step()

    def state(self) -> dict[str, Tensor]:
        """The tensors of the state by name, as torch holds them."""
        states = {weight.name: self.optimizer.state[weight.master] for weight in self.weights}
        return {f"{ours}.{weight}": state[key] for weight, state in states.items() for key, ours in self.names.items()}


def grouped(weights: Sequence[Weight], lr: float, weight_decay: float) -> list[dict[str, object]]:
    """Parameter groups for torch, by learning-rate factor and by whether the weights decay: those of two dimensions."""
    members: dict[tuple[float, bool], list[Tensor]] = {}
    for weight in weights:
        members.setdefault((weight.lr_scale, weight.master.dim() >= 2), []).append(weight.master)
    return [
        {"params": masters, "full_lr": lr * lr_scale, "weight_decay": weight_decay if decays else 0.0}
        for (lr_scale, decays), masters in members.items()
    ]


class Clipped:
    """An optimizer made of one or more of torch's, whose gradients are clipped by their norm over the whole model.

    weights: all that are updated. shares: whose weights together are these.
    """

    def __init__(self, weights: Sequence[Weight], clip_norm: float, shares: Sequence[Share]) -> None:
        self.weights, self.clip_norm, self.shares = weights, clip_norm, shares

    @torch.no_grad()
    def step(self, lr_scale: float) -> StepReport:
        """Update the parameters from their gradients; a parameter without a gradient is left as it is."""
        for weight in self.weights:
            weight.master.grad = weight.gradient()
        grads = [weight.master.grad for weight in self.weights if weight.master.grad is not None]
        # One norm over all parameters, read by the host once: it decides about skipping and about clipping.
        norm = torch.nn.utils.get_total_norm(grads)
        if not torch.isfinite(norm):
            return StepReport(norm.item(), 0.0, True)
        clip = min(1.0, self.clip_norm / (norm.item() + 1e-6))
        if clip < 1:
            torch.nn.utils.clip_grads_with_norm_([weight.master for weight in self.weights], self.clip_norm, norm)
        for share in self.shares:
            share.step(lr_scale)
        write_copies(self.weights)
        return StepReport(norm.item(), clip, False)

    def zero_grad(self) -> None:
        """Forget all gradients."""
        forget_gradients(self.weights)

    def tensors(self) -> dict[str, Tensor]:
        """Give the complete state by name; the moments are not copied."""
        live = self._live_tensors()
        return {name: tensor.long() if name.startswith("steps.") else tensor for name, tensor in live.items()}

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy a state in. Raises UserError, and changes nothing, if a name, shape or dtype is not the one expected."""
        load(self._live_tensors(), tensors, expected=self.tensors())

    def _live_tensors(self) -> dict[str, Tensor]:
        shares = [share.state() for share in self.shares]
        return {name: tensor for state in shares for name, tensor in state.items()} | copied_masters(self.weights)
