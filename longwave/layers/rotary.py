"""Rotary position embedding (Su et al. 2021), pairing channel i with channel i + K/2 as Llama does.

An angle depends on the position alone, under every kind of scaling, so that running a sequence whole or in chunks gives
the same result.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from longwave.config import (
    Llama3Scaling,
    LongRopeScaling,
    ModelConfig,
    RotaryConfig,
    RotaryScaling,
    YarnScaling,
)
from longwave.errors import require
from longwave.streams import Stream


@dataclass(frozen=True)
class Rotation:
    """Rotates the heads of a mixer. Mixers with equal rotations share the cosines and sines that the stream carries.

    size: channels of a head. precise: cosines and sines stay in fp32, and heads are rotated in fp32.
    """

    size: int
    precise: bool = False

    def passengers(self, config: ModelConfig, positions: Int64[Tensor, " T"], dtype: torch.dtype) -> dict[str, Tensor]:
        """The cosines and sines that a stream carries, by name, in a model whose activations are `dtype`."""
        dtype = torch.promote_types(dtype, torch.float32) if self.precise else dtype
        made = cosines_and_sines(config, positions, self.size)
        return {name: values.to(dtype) for name, values in zip(self._names(), made, strict=True)}

    def check(self, config: ModelConfig) -> None:
        """Raises UserError if the config's scaling does not fit heads of this size."""
        if isinstance(scaling := config.rotary.scaling, LongRopeScaling):
            for name in ("short_factors", "long_factors"):
                found, problem = len(getattr(scaling, name)), f"rotary.scaling.{name} has"
                require(
                    found == self.size // 2, f"{problem} {found} factors; heads of {self.size} need {self.size // 2}"
                )

    def __call__(self, heads: Float[Tensor, "T H K"], stream: Stream) -> Float[Tensor, "T H K"]:
        """The heads, rotated by the angles of their tokens."""
        cos, sin = (stream.passengers[name] for name in self._names())
        return rotate(heads.to(cos.dtype), cos, sin).to(heads.dtype) if self.precise else rotate(heads, cos, sin)

    def _names(self) -> tuple[str, str]:
        kind = f"{self.size}{' precise' if self.precise else ''}"
        return f"cos {kind}", f"sin {kind}"


def cosines_and_sines(
    config: ModelConfig, positions: Int64[Tensor, " T"], size: int
) -> tuple[Float[Tensor, "T half"], Float[Tensor, "T half"]]:
    """Cosines and sines of the rotation angles of heads of `size` channels, in fp32, times the attention factor."""
    radians = angles(config.rotary, positions, size, config.context_window)
    factor = attention_factor(config.rotary.scaling)
    return (radians.cos(), radians.sin()) if factor == 1 else (radians.cos() * factor, radians.sin() * factor)


def angles(
    config: RotaryConfig, positions: Int64[Tensor, " T"], size: int, context_window: int = 0
) -> Float[Tensor, "T half"]:
    """The angles in radians, position * frequency, in fp32 as the published models compute them."""
    return torch.outer(positions.float(), frequencies(config, size, context_window, positions.device))


def frequencies(
    config: RotaryConfig, size: int, context_window: int = 0, device: torch.device | None = None
) -> Float[Tensor, " half"]:
    """Radians per token of each pair of channels: base ** (-2 i / size), scaled as the config says.

    context_window: the model's, in tokens; it selects between LongRoPE's two sets of factors.
    The operations and their order are copied from `transformers`, so that frequencies agree to the bit: at positions of
    millions the smallest difference would become a visible angle.
    """
    periods = config.base ** (torch.arange(0, size, 2, dtype=torch.float32, device=device) / size)
    match config.scaling:
        case None:
            return 1 / periods
        case LongRopeScaling() as scaling:
            return 1 / (torch.tensor(scaling.factors(context_window), device=device) * periods)
        case Llama3Scaling() as scaling:
            return _llama3(scaling, 1 / periods)
        case YarnScaling() as scaling:
            return _yarn(scaling, periods, config.base)
        case scaling:
            return 1 / periods / scaling.factor


def attention_factor(scaling: RotaryScaling | None) -> float:
    """The factor of cosines and sines, by whose square the attention logits grow (YaRN's temperature)."""
    if isinstance(scaling, YarnScaling) and scaling.attention_factor is None:
        return max(1.0, 0.1 * math.log(scaling.factor) + 1)
    return getattr(scaling, "attention_factor", 1.0)


def _llama3(scaling: Llama3Scaling, kept: Float[Tensor, " half"]) -> Float[Tensor, " half"]:
    """Llama 3.1's scaling (Meta's reference code, `apply_scaling`): low frequencies are divided by the factor.

    Frequencies whose wavelength is short beside the original context window stay as they are, with a smooth transition.
    """
    low, high, window = scaling.low_freq_factor, scaling.high_freq_factor, scaling.original_window
    wavelength, stretched = 2 * math.pi / kept, kept / scaling.factor
    share = (window / wavelength - low) / (high - low)
    joined = (1 - share) * kept / scaling.factor + share * kept
    joined = torch.where(wavelength > window / low, stretched, joined)
    return torch.where(wavelength < window / high, kept, joined)


def _yarn(scaling: YarnScaling, periods: Float[Tensor, " half"], base: float) -> Float[Tensor, " half"]:
    """YaRN's scaling (arXiv 2309.00071, section 3.2), by the number of turns in the original context window.

    Channels with more than `beta_fast` turns keep their frequency, channels with fewer than `beta_slow` are slowed down
    by the factor, and in between the share kept falls linearly.
    """

    def channel(rotations: float) -> float:
        """The index (fractional) of the channel pair that makes so many turns in the original context window."""
        return len(periods) * math.log(scaling.original_window / (rotations * 2 * math.pi)) / math.log(base)

    first, last = channel(scaling.beta_fast), channel(scaling.beta_slow)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, 2 * len(periods) - 1)
    places = torch.arange(len(periods), dtype=torch.float32, device=periods.device)
    kept = 1 - ((places - first) / (last - first if last != first else 0.001)).clamp(0, 1)
    return 1 / (scaling.factor * periods) * (1 - kept) + 1 / periods * kept


def rotate(
    heads: Float[Tensor, "T H K"], cos: Float[Tensor, "T half"], sin: Float[Tensor, "T half"]
) -> Float[Tensor, "T H K"]:
    """Rotates each pair of channels by its angle."""
    cos, sin = cos.to(heads.dtype).unsqueeze(1), sin.to(heads.dtype).unsqueeze(1)
    return _Rotate.apply(heads, cos, sin) if torch.is_grad_enabled() else _rotated(heads, cos, sin, 1)


def _rotated(heads: Tensor, cos: Tensor, sin: Tensor, direction: int) -> Tensor:
    """heads (T, H, K) rotated by angles with cosines and sines (T, 1, K / 2); direction -1 rotates back."""
    first, second = heads.chunk(2, dim=-1)
    rotated = torch.empty_like(heads)
    left, right = rotated.chunk(2, dim=-1)
    # Written into halves of the result: joining two halves would copy them once more.
    torch.mul(first, cos, out=left).addcmul_(second, sin, value=-direction)
    torch.mul(second, cos, out=right).addcmul_(first, sin, value=direction)
    return rotated


class _Rotate(torch.autograd.Function):
    """The rotation with its gradient, which is the rotation backwards: only cosines and sines are kept for it."""

    @staticmethod
    def forward(ctx: Any, heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotated(heads, cos, sin, 1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotated(gradients[0], cos, sin, -1), None, None
