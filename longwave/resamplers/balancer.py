"""The Balancer, which keeps SUBLLM's scores in a range in which they can select, and the limiter of the bypass.

Both are identities in the forward pass and change only gradients, so that training pushes values that have left their
range back into it without a term in the loss. From Zipformer (arXiv 2310.11230, section 3.4), which SUBLLM follows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

_ATANH_TO_GAUSSIAN = 0.8139535143  # kappa in mean/std = kappa * atanh(2 p - 1), p being the share of positive scores
_RESOLUTION = torch.finfo(torch.float32).eps
_ABS_TO_RMS = 1.25331413732  # sqrt(pi / 2): rms of a centred Gaussian whose mean absolute value is 1


@dataclass(frozen=True)
class Limits:
    """The ranges of mean/std and of rms of the scores inside which the Balancer does nothing.

    grad_scale: the rms, relative to the gradient, of the change that it makes outside.
    """

    mean_low: float
    mean_high: float
    rms_low: float
    rms_high: float
    grad_scale: float


def limits(low: float, high: float, min_abs: float, max_abs: float, grad_scale: float, exact: bool) -> Limits:
    """The limits for a share of positive scores in [low, high] and a mean absolute value in [min_abs, max_abs].

    Both are converted as if scores were Gaussian. The published conversion of the share lacks a factor of sqrt(2);
    `exact` has it.
    """
    return Limits(
        _mean_over_std(low, exact),
        _mean_over_std(high, exact),
        _ABS_TO_RMS * min_abs,
        _ABS_TO_RMS * max_abs,
        grad_scale,
    )


@cache  # the same few shares at every step
def _mean_over_std(share: float, exact: bool) -> float:
    share = min(max(share, 1e-6), 1 - 1e-6)
    if exact:
        return math.sqrt(2) * float(torch.erfinv(torch.tensor(2 * share - 1, dtype=torch.float64)))
    return _ATANH_TO_GAUSSIAN * math.atanh(2 * share - 1)


def balance(scores: Float[Tensor, " T"], band: Limits) -> Float[Tensor, " T"]:
    """The scores unchanged; their gradient is changed so that mean/std and rms move towards the limits `band`.

    Each entry of the gradient changes by a share of itself; the shares have an rms of `grad_scale` over all T entries,
    so an entry of zero stays zero.
    """
    return _Balance.apply(scores, band)


def limit(scale: Float[Tensor, " D"], low: float, high: float) -> Float[Tensor, " D"]:
    """The scale unchanged; gradients that would push an entry further below `low` or above `high` change their sign."""
    return _Limit.apply(scale, low, high)


def nudge(scores: Tensor, band: Limits) -> Tensor:
    """The relative change of each gradient entry: the gradient of a penalty, scaled to an rms of `grad_scale`.

    The penalty is |m - clamp(m)| + |ln(clamp(r) / r)| with m = mean/std and r the rms of the scores, clamped to their
    limits: within both the change is zero. A spread that fp32 cannot tell from none (a variance below its resolution of
    the mean square) counts as the least that it could, and is not changed: all scores then move alike.
    """
    x = scores.double()
    mean, square = x.mean(), x.square().mean().clamp(min=1e-20)
    off = x - mean
    variance, least = off.square().mean(), (square * _RESOLUTION).clamp(min=1e-20)
    std, rms = variance.maximum(least).sqrt(), square.sqrt()
    ratio, off = mean / std, off * (variance > least)
    # Each term of the penalty is an absolute value; its sign is 0 inside the limits, where the term is flat.
    mean_sign = (ratio > band.mean_high).to(x) - (ratio < band.mean_low).to(x)
    rms_sign = (rms > band.rms_high).to(x) - (rms < band.rms_low).to(x)
    # The gradient times n std, a factor that the scaling to an rms takes out again; no term can overflow.
    slope = mean_sign * (1 - ratio * off / std) + rms_sign * (x / rms) * (std / rms)
    return band.grad_scale * slope / slope.square().mean().sqrt().clamp(min=1e-30)


class _Balance(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, scores: Tensor, band: Limits) -> Tensor:
        ctx.save_for_backward(scores.detach())
        ctx.band = band
        return scores.view_as(scores)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (scores,) = ctx.saved_tensors
        gradient = gradients[0]
        return (gradient + gradient.abs() * nudge(scores, ctx.band)).to(gradient.dtype), None


class _Limit(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, scale: Tensor, low: float, high: float) -> Tensor:
        ctx.save_for_backward(scale.detach())
        ctx.range = (low, high)
        return scale.view_as(scale)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (scale,), (low, high) = ctx.saved_tensors, ctx.range
        gradient = gradients[0]
        # A step goes against the gradient: below the range a positive gradient pushes further down.
        outward = ((scale < low) & (gradient > 0)) | ((scale > high) & (gradient < 0))
        return torch.where(outward, -gradient, gradient), None, None
