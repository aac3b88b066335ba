"""Rotary positions, half-split pairing: channel i turns with channel i + K/2 (Su et al. 2021, as in Llama)."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from longwave.config import RotaryConfig


def angles(config: RotaryConfig, positions: Int64[Tensor, " T"], size: int) -> Float[Tensor, "T half"]:
    """position * base ** (-2 i / size), in fp32 as every published model of this family computes it."""
    index = torch.arange(0, size, 2, dtype=torch.float32, device=positions.device)
    return torch.outer(positions.float(), config.base ** (-index / size))


def rotate(
    heads: Float[Tensor, "T H K"], cos: Float[Tensor, "T half"], sin: Float[Tensor, "T half"]
) -> Float[Tensor, "T H K"]:
    """Turns each pair of channels by its angle."""
    cos, sin = cos.to(heads.dtype).unsqueeze(1), sin.to(heads.dtype).unsqueeze(1)
    return _Rotate.apply(heads, cos, sin) if torch.is_grad_enabled() else _turned(heads, cos, sin, 1)


def _turned(heads: Tensor, cos: Tensor, sin: Tensor, direction: int) -> Tensor:
    """heads (T, H, K) turned by the angles (T, 1, K / 2), or back by direction -1."""
    first, second = heads.chunk(2, dim=-1)
    turned = torch.empty_like(heads)
    left, right = turned.chunk(2, dim=-1)
    torch.mul(first, cos, out=left).addcmul_(second, sin, value=-direction)
    torch.mul(second, cos, out=right).addcmul_(first, sin, value=direction)
    return turned


class _Rotate(torch.autograd.Function):
    """A rotation's gradient is the rotation backwards, so nothing but the angles is kept."""

    @staticmethod
    def forward(ctx: Any, heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turned(heads, cos, sin, 1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _turned(gradients[0], cos, sin, -1), None, None
