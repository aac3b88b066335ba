"""AdamW (arXiv 1711.05101): torch's, fused, which on a CPU is 3 times as fast as its foreach form."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import ConfigDict
from torch import Tensor, nn

from longwave.errors import require
from longwave.training.optimizers.clipped import Clipped, Share, grouped
from longwave.training.optimizers.weights import Weight, check_adam, trainable_weights, zeros_like

_NAMES = {"step": "steps", "exp_avg": "first_moment", "exp_avg_sq": "second_moment"}


@dataclass(frozen=True)
class AdamWConfig:
    """AdamW (arXiv 1711.05101), with the betas, decay and clipping that Llama was trained with (arXiv 2302.13971).

    weight_decay: applied to parameters of two or more dimensions only. clip_norm: bound of the norm of the whole
    gradient; inf for no clipping.
    """

    kind: Literal["adamw"] = "adamw"
    lr: float = 3e-4
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip_norm: float = 1.0

    __pydantic_config__ = ConfigDict(extra="forbid")

    def __post_init__(self) -> None:
        check_adam(self.lr, self.betas, self.eps)
        require_decay_and_clip(self.weight_decay, self.clip_norm)

    def build(self, model: nn.Module) -> Clipped:
        """Make the optimizer of all trainable parameters of `model`."""
        weights = trainable_weights(model)
        return Clipped(weights, self.clip_norm, [adamw(weights, self.lr, self.betas, self.eps, self.weight_decay)])


def require_decay_and_clip(weight_decay: float, clip_norm: float) -> None:
    """UserError for a decay or a bound of the gradient's norm that is not a number in its range."""
    require(0 <= weight_decay < math.inf, f"weight_decay = {weight_decay}: a number of at least 0")
    require(clip_norm > 0, f"clip_norm = {clip_norm}: a number above 0, or inf not to clip")


def adamw(weights: Sequence[Weight], lr: float, betas: tuple[float, float], eps: float, weight_decay: float) -> Share:
    """These weights, of which there is one at least, updated by torch's fused AdamW."""
    groups = grouped(weights, lr, weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps, fused=True)
    for weight in weights:
        optimizer.state[weight.master] = _start(weight.master)
    return Share(weights, optimizer, _NAMES)


def _start(master: Tensor) -> dict[str, Tensor]:
    count = torch.zeros((), dtype=torch.float32, device=master.device)
    return {"step": count, "exp_avg": zeros_like(master), "exp_avg_sq": zeros_like(master)}
