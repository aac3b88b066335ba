"""Right before fast: no number is given of a model whose output is wrong.

Legend: `V` vocabulary.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from longwave.errors import MachineError

_FP32_DIFFERENCE, _LOW_PRECISION_COSINE = 1e-3, 0.999
_LOSS_DIFFERENCE = {"fp32": 1e-3, "bf16": 1e-2}


def check_logits(name: str, found: Float[Tensor, "*rows V"], expected: Float[Tensor, "*rows V"]) -> None:
    """MachineError that says what differs, unless the logits agree as well as their precision allows.

    fp32: to 1e-3 of the largest. Otherwise by a cosine above 0.999 in at least half of the rows, since a token right at
    a threshold may be kept by one way and dropped by another.
    """
    exact, found, expected = found.dtype == torch.float32, found.float(), expected.float()
    if not found.isfinite().all():
        raise MachineError(f"{name}: its logits are not finite, so it is not timed")
    difference = float((found - expected).abs().max() / expected.abs().max())
    cosine = float(torch.cosine_similarity(found, expected, dim=-1).median())
    if exact and difference > _FP32_DIFFERENCE:
        raise MachineError(f"{name}: its logits are off by {difference:.1e} of the largest, so it is not timed")
    if cosine <= _LOW_PRECISION_COSINE:
        raise MachineError(f"{name}: its logits have a cosine of {cosine:.5f} with the right ones, so it is not timed")


def check_loss(name: str, found: float, expected: float, precision: str) -> None:
    """MachineError unless two losses of the same tokens under the same weights agree."""
    if not math.isfinite(found) or abs(found - expected) > _LOSS_DIFFERENCE[precision] * abs(expected):
        raise MachineError(f"{name}: its loss is {found:.6f} where {expected:.6f} is right, so it is not timed")
