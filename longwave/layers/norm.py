"""RMSNorm with its reduction in fp32 (Zhang & Sennrich 2019)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension; a low-precision input is normalised in fp32 and cast back."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, hidden: Float[Tensor, "*lead D"]) -> Float[Tensor, "*lead D"]:
        return F.rms_norm(hidden, self.weight.shape, self.weight.to(hidden.dtype), self.eps)
