"""Random numbers without a generator: each is a hash of a key, such as (seed, step, part, sequence).

A draw therefore does not depend on when or where it is made: replaying a forward pass (activation checkpointing,
resuming), splitting a batch or moving a sequence to another rank never changes it. The hash is splitmix64's finaliser
(Steele et al. 2014, Stafford's Mix13).
"""

from __future__ import annotations

import torch
from jaxtyping import Float64, Int64
from torch import Tensor

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_MIX = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)


def _finalise(value: int) -> int:
    """splitmix64's finaliser: mixes 64 bits so that every bit of the result depends on every bit of the value."""
    value = ((value ^ (value >> 30)) * _MIX[0]) & _MASK
    value = ((value ^ (value >> 27)) * _MIX[1]) & _MASK
    return value ^ (value >> 31)


def key(*parts: int) -> int:
    """A 64-bit key made of any number of integers, whose order matters."""
    value = 0
    for part in parts:
        value = _finalise((value + _GOLDEN + (part & _MASK)) & _MASK)
    return value


def uniform(*parts: int) -> float:
    """A uniform random number in [0, 1) that depends on `parts` alone."""
    return (key(*parts) >> 11) * 2.0**-53


def uniforms(keys: Int64[Tensor, "*lead"], count: int) -> Float64[Tensor, "*lead {count}"]:
    """`count` uniform random numbers in [0, 1) for every key, on the keys' device."""
    index = torch.arange(1, count + 1, device=keys.device, dtype=torch.int64)
    bits = _finalise_tensor(keys.unsqueeze(-1) + index * _signed(_GOLDEN))
    return _shifted(bits, 11).to(torch.float64) * 2.0**-53


def uniform_row(*parts: int, count: int, device: torch.device) -> Float64[Tensor, " {count}"]:
    """`count` uniform random numbers in [0, 1) that depend on `parts` alone."""
    return uniforms(torch.tensor(_signed(key(*parts)), device=device), count)


def keys_of(parts: int, last: Int64[Tensor, " n"]) -> Int64[Tensor, " n"]:
    """`key(*parts, i)` for every i in the tensor `last`, on its device. parts: the key of the parts before."""
    return _finalise_tensor(last + _signed((parts + _GOLDEN) & _MASK))


def uniform_of(keys: Int64[Tensor, "*lead"]) -> Float64[Tensor, "*lead"]:
    """One uniform random number in [0, 1) for every key."""
    return _shifted(_finalise_tensor(keys + _signed(_GOLDEN)), 11).to(torch.float64) * 2.0**-53


def _finalise_tensor(value: Tensor) -> Tensor:
    value = (value ^ _shifted(value, 30)) * _signed(_MIX[0])
    value = (value ^ _shifted(value, 27)) * _signed(_MIX[1])
    return value ^ _shifted(value, 31)


def _shifted(value: Tensor, bits: int) -> Tensor:
    """A logical shift to the right; torch's own copies the sign bit."""
    return (value >> bits) & ((1 << (64 - bits)) - 1)


def _signed(value: int) -> int:
    """The 64 bits of an unsigned number as a signed one, as torch's int64 has it."""
    return value - (1 << 64) if value >> 63 else value
