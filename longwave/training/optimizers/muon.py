"""Muon for the matrices of hidden layers and AdamW for the rest (Keller Jordan, kellerjordan.github.io/posts/muon).

The step of a matrix is its momentum with all singular values brought near 1, by five Newton-Schulz iterations in bf16;
torch's implementation does it. Every projection is a matrix of its own here: none are stacked (queries on keys, say),
which would be brought to one scale together.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import ConfigDict
from torch import Tensor, nn

from longwave.errors import require
from longwave.layers.head import Head
from longwave.training.optimizers.adamw import adamw, require_decay_and_clip
from longwave.training.optimizers.clipped import Clipped, Share, grouped
from longwave.training.optimizers.weights import Weight, check_adam, trainable_weights, zeros_like

_MOST_ITERATIONS = 99  # torch's limit


@dataclass(frozen=True)
class MuonConfig:
    """Muon for the matrices of hidden linear layers; AdamW for embedding, head, norms, biases and everything else.

    lr: of Muon. adjust_lr_fn: how it is scaled for a matrix of (rows, columns), as in torch: `match_rms_adamw` by
    0.2 sqrt(max(rows, columns)), which gives a step the usual rms of AdamW's, so that one rate serves both (Moonlight,
    arXiv 2502.16982); `original` by sqrt(max(1, rows / columns)), for rates around 0.02. adamw_lr: of AdamW; `lr` by
    default. momentum, nesterov: of Muon. ns_steps: Newton-Schulz iterations. betas, eps: of AdamW. weight_decay:
    applied by both to parameters of two or more dimensions only. clip_norm: bound of the norm of the whole gradient;
    inf for no clipping.
    """

    kind: Literal["muon"] = "muon"
    lr: float = 3e-4
    adjust_lr_fn: Literal["match_rms_adamw", "original"] = "match_rms_adamw"
    momentum: float = 0.95
    nesterov: bool = True
    ns_steps: int = 5
    adamw_lr: float | None = None
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip_norm: float = 1.0

    __pydantic_config__ = ConfigDict(extra="forbid")

    def __post_init__(self) -> None:
        check_adam(self.lr, self.betas, self.eps)
        require_decay_and_clip(self.weight_decay, self.clip_norm)
        require(0 <= self.momentum < 1, f"momentum = {self.momentum}: a number in [0, 1)")
        steps = self.ns_steps
        require(1 <= steps <= _MOST_ITERATIONS, f"ns_steps = {steps}: 1 to {_MOST_ITERATIONS} iterations")
        rate = self.adamw_lr
        require(rate is None or 0 < rate < float("inf"), f"adamw_lr = {rate}: a number above 0")

    def build(self, model: nn.Module) -> Clipped:
        """Make the optimizer of all trainable parameters of `model`."""
        weights, matrices = trainable_weights(model), hidden_matrices(model)
        ours = [weight for weight in weights if weight.parameter in matrices]
        rest = [weight for weight in weights if weight.parameter not in matrices]
        adamw_lr = self.lr if self.adamw_lr is None else self.adamw_lr
        shares = [self._muon(ours)] if ours else []
        shares += [adamw(rest, adamw_lr, self.betas, self.eps, self.weight_decay)] if rest else []
        return Clipped(weights, self.clip_norm, shares)

    def _muon(self, weights: list[Weight]) -> Share:
        optimizer = torch.optim.Muon(
            grouped(weights, self.lr, self.weight_decay),
            momentum=self.momentum,
            nesterov=self.nesterov,
            ns_steps=self.ns_steps,
            adjust_lr_fn=self.adjust_lr_fn,
        )
        for weight in weights:
            optimizer.state[weight.master] = {"momentum_buffer": zeros_like(weight.master)}
        return Share(weights, optimizer, {"momentum_buffer": "momentum"})


def hidden_matrices(model: nn.Module) -> set[Tensor]:
    """The matrices of linear layers, but for those that are tables over the vocabulary: an embedding's, or a head's.

    A parameter of two dimensions that is no linear layer's (taps of a convolution, gains per head) is no such matrix.
    """
    tables = {module.weight for module in model.modules() if isinstance(module, nn.Embedding | Head)}
    return {module.weight for module in model.modules() if isinstance(module, nn.Linear)} - tables
