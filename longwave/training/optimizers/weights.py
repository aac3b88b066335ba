"""The parts that all optimizers share: the weights to update, the report of an update, and states kept by name.

Shape letter: `W` trainable parameters (called weights here), in the order of the module tree.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from longwave.errors import UserError, require


@dataclass(frozen=True)
class StepReport:
    """Figures of one update.

    grad_norm: the model's gradient norm before clipping (ScaledAdam weights each tensor's norm by its rms). clip: the
    factor in [0, 1] by which gradients were multiplied. skipped: whether the norm was not finite, so that nothing was
    changed; `clip` is 0 then.
    """

    grad_norm: float
    clip: float
    skipped: bool


class Optimizer(Protocol):
    """The interface of an optimizer."""

    def step(self, lr_scale: float) -> StepReport:
        """Update the parameters from their gradients, at `lr_scale` times the configured learning rate."""
        ...

    def zero_grad(self) -> None:
        """Forget all gradients."""
        ...

    def tensors(self) -> dict[str, Tensor]:
        """Give the complete state by name. Large tensors are not copied: write or copy them before the next step."""
        ...

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy a state in. Raises UserError, and changes nothing, if a name, shape or dtype is not as expected."""
        ...


@dataclass(frozen=True)
class Weight:
    """A trainable parameter.

    name: of a tied parameter, its first name. master: the tensor that is updated, in fp32 or wider: a copy of a
    narrower parameter, or the parameter itself. lr_scale: its factor of the learning rate.
    """

    name: str
    parameter: nn.Parameter
    master: Tensor
    lr_scale: float

    @property
    def is_scalar(self) -> bool:
        return self.parameter.numel() == 1

    @property
    def has_copy(self) -> bool:
        return self.master is not self.parameter

    def gradient(self) -> Tensor | None:
        """Give the gradient in the master's dtype; None if the parameter took no part in the loss."""
        grad = self.parameter.grad
        return None if grad is None else grad.to(self.master.dtype)


def trainable_weights(model: nn.Module) -> list[Weight]:
    """List the parameters that require a gradient, each once, in the order of the module tree.

    Raises UserError if there are none, for an `lr_scale` that is not a number of at least 0, and for a tied parameter
    with two different ones.
    """
    found: dict[nn.Parameter, Weight] = {}
    for name, parameter, lr_scale in _scaled_parameters(model, "", 1.0):
        first = found.setdefault(parameter, Weight(name, parameter, _master(parameter), lr_scale))
        legal = f"the {first.lr_scale} of {first.name}, which it is tied to"
        require(first.lr_scale == lr_scale, f"lr_scale of {name} = {lr_scale}: {legal}")
    require(bool(found), "trainable parameters = 0: at least one")
    return list(found.values())


def _scaled_parameters(module: nn.Module, prefix: str, scale: float) -> Iterator[tuple[str, nn.Parameter, float]]:
    # A module's lr_scale multiplies those of the modules around it.
    own = getattr(module, "lr_scale", 1.0)
    legal = isinstance(own, int | float) and 0 <= own < math.inf
    require(legal, f"{prefix}lr_scale = {own!r}: a number of at least 0")
    scale = scale * own
    for name, parameter in module.named_parameters(recurse=False):
        if parameter.requires_grad:
            yield prefix + name, parameter, scale
    for name, child in module.named_children():
        yield from _scaled_parameters(child, f"{prefix}{name}.", scale)


def _master(parameter: nn.Parameter) -> Tensor:
    """Give the tensor to update: the parameter, or an fp32 copy of a narrower one, so that small steps count."""
    narrow = parameter.dtype.itemsize < torch.float32.itemsize
    return parameter.detach().float() if narrow else parameter


def zeros_like(master: Tensor) -> Tensor:
    """Zeros of the shape, dtype and device of a tensor, without a gradient."""
    return torch.zeros_like(master, requires_grad=False)


def forget_gradients(weights: Sequence[Weight]) -> None:
    """Drop the gradients of parameters and of their fp32 copies."""
    for weight in weights:
        weight.parameter.grad = weight.master.grad = None


def copied_masters(weights: Sequence[Weight]) -> dict[str, Tensor]:
    """The fp32 copies of narrow parameters, as they stand in a state: `master.` and the parameter's name."""
    return {f"master.{weight.name}": weight.master for weight in weights if weight.has_copy}


def write_copies(weights: Sequence[Weight]) -> None:
    """Round the fp32 copies of narrow parameters into these."""
    for weight in weights:
        if weight.has_copy:
            weight.parameter.copy_(weight.master)


@torch.no_grad()
def load(live: Mapping[str, Tensor], given: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Copy `given` into the tensors of `live`, once every name, shape and dtype is found as in `expected`."""
    for name in sorted(expected.keys() ^ given.keys()):
        legal = "a state of this model and optimizer"
        raise UserError(
            f"optimizer state: {'missing' if name in expected else 'unexpected'} tensor {name}; needs {legal}"
        )
    for name, tensor in given.items():
        want = (tuple(expected[name].shape), expected[name].dtype)
        have = (tuple(tensor.shape), tensor.dtype)
        require(have == want, f"optimizer state {name} = {have}: {want} would do")
    for name, tensor in live.items():
        tensor.copy_(given[name])


def check_adam(lr: float, betas: tuple[float, float], eps: float) -> None:
    """UserError for settings with which Adam cannot run."""
    require(0 < lr < math.inf, f"lr = {lr}: a number above 0")
    require(len(betas) == 2 and all(0 <= beta < 1 for beta in betas), f"betas = {betas}: two numbers in [0, 1)")
    require(0 < eps < math.inf, f"eps = {eps}: a number above 0")
