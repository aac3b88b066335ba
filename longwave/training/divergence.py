"""A run that diverges: one rule for numbers that are not finite.

- A gradient that is not finite, under finite weights: the update is skipped and told, and the run goes on.
- `training.max_skipped` skipped updates in a row, or a weight that is not finite: the run ends.
- Nothing that is not finite is ever written, so that the newest checkpoint is always one to go on from.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from longwave.checkpoints.names import flat_names
from longwave.errors import MachineError, require
from longwave.model import Decoder


class RunEnded(MachineError):
    """The run cannot go on from `step`. saved: the newest whole checkpoint; None where there is none."""

    def __init__(self, step: int, why: str, saved: object | None) -> None:
        last = f"the last whole checkpoint is {saved}, which training.start_from takes too"
        super().__init__(f"step {step}: {why}; {'no checkpoint had been written' if saved is None else last}")


def not_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """The name of a tensor that holds NaN or infinity; None if there is none. Waits once for each device."""
    for device in {tensor.device for tensor in tensors.values()}:
        names = [name for name, tensor in tensors.items() if tensor.device == device]
        sound = torch.stack([tensors[name].detach().isfinite().all() for name in names]).tolist()
        if not all(sound):
            return names[sound.index(False)]
    return None


def weights_of(model: Decoder) -> dict[str, Tensor]:
    """Every weight and buffer of a model itself, by the names that its folder has for them."""
    names = flat_names(model)
    return {names[name]: tensor for name, tensor in model.state_dict(keep_vars=True).items()}


def require_finite(model: Decoder, source: str, would_do: str) -> None:
    """UserError if a weight that was loaded is not finite."""
    name = not_finite(weights_of(model))
    require(name is None, f"{source}: {name} holds NaN or infinity; {would_do}")


@contextmanager
def buffers_kept(model: nn.Module) -> Iterator[None]:
    """Undoes what the block does to the buffers of a model: a skipped update changes nothing."""
    before = [(buffer, buffer.clone()) for buffer in model.buffers()]
    yield
    for buffer, value in before:
        buffer.copy_(value)
