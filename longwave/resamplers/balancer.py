"""Identities whose backward pass steers: the Balancer of the scores and the range limiter of the bypass.

Both come from Zipformer (arXiv 2310.11230, section 3.4) by way of SUBLLM. Neither changes a forward value.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

_ATANH_TO_GAUSSIAN = 0.8139535143  # mean/std of scores of which a share p is positive, as kappa * atanh(2p - 1)
_ABS_TO_RMS = 1.25331413732  # sqrt(pi / 2): rms of a centred Gaussian whose mean absolute value is 1


@dataclass(frozen=True)
class Limits:
    """The band of mean/std and of rms inside which the Balancer is silent, and the strength of its nudge outside."""

    mean_low: float
    mean_high: float
    rms_low: float
    rms_high: float
    grad_scale: float


def limits(low: float, high: float, min_abs: float, max_abs: float, grad_scale: float, exact: bool) -> Limits:
    """The band for a share of positives in [low, high] and a mean absolute value in [min_abs, max_abs].

    The published conversion lacks a factor of sqrt(2) for Gaussian scores; `exact` puts it in.
    """
    return Limits(
        _mean_over_std(low, exact),
        _mean_over_std(high, exact),
        _ABS_TO_RMS * min_abs,
        _ABS_TO_RMS * max_abs,
        grad_scale,
    )


def _mean_over_std(share: float, exact: bool) -> float:
    share = min(max(share, 1e-6), 1 - 1e-6)
    if exact:
        return math.sqrt(2) * float(torch.erfinv(torch.tensor(2 * share - 1, dtype=torch.float64)))
    return _ATANH_TO_GAUSSIAN * math.atanh(2 * share - 1)


def balance(scores: Float[Tensor, " T"], band: Limits) -> Float[Tensor, " T"]:
    """Identity whose gradient pushes mean/std and rms of all T scores towards the band.

    Each gradient entry is changed by a share of itself whose rms is `grad_scale`; an entry of zero stays zero.
    """
    return _Balance.apply(scores, band)


def limit(scale: Float[Tensor, " D"], low: float, high: float) -> Float[Tensor, " D"]:
    """Identity whose gradient never pushes an entry further below `low` or above `high`."""
    return _Limit.apply(scale, low, high)


def nudge(scores: Tensor, band: Limits) -> Tensor:
    """Relative change of each gradient entry: the penalty's gradient, scaled to an rms of `grad_scale`, or zeros.

    The penalty is |m - clamp(m)| + |ln(clamp(r) / r)| with m = mean/std and r the rms of the scores.
    """
    x = scores.to(torch.promote_types(scores.dtype, torch.float32))
    n, mean, square = x.numel(), x.mean(), (x * x).mean()
    std = (square - mean * mean).clamp(min=1e-20).sqrt()
    ratio, rms = mean / std, square.clamp(min=1e-20).sqrt()
    mean_sign = (ratio > band.mean_high).to(x) - (ratio < band.mean_low).to(x)
    rms_sign = (rms > band.rms_high).to(x) - (rms < band.rms_low).to(x)
    slope = mean_sign / (n * std) * (1 - mean * (x - mean) / std**2) + rms_sign * x / (n * rms**2)
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
        outward = ((scale < low) & (gradient > 0)) | ((scale > high) & (gradient < 0))
        return torch.where(outward, -gradient, gradient), None, None
