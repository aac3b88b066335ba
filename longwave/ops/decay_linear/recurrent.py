"""The compiled form of decay linear attention: the recurrence token by token (`recurrent.c`), as a torch op.

Legend: `T` tokens, `R` runs, `H` heads, `K` key size, `V` value size.
"""

from __future__ import annotations

from ctypes import c_float, c_int, c_int64, c_void_p
from functools import cache
from typing import Any

import torch
from torch import Tensor

from longwave.ops import compiled
from longwave.ops.decay_linear import chunked
from longwave.streams import Runs

_DTYPES = (torch.bfloat16, torch.float32)
_LANES, _WIDEST = 16, 256  # of the kernel: values of a head are whole vectors, and not too many


def decay_linear_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_decay: Tensor,
    runs: Runs,
    scale: float,
    states: Tensor,
) -> tuple[Tensor, Tensor]:
    """Decay linear attention at inference; a backward pass, and types that the kernel does not know, run in chunks."""
    if torch.is_grad_enabled() or not _known(query, key, value, states):
        return chunked.decay_linear_attention(query, key, value, log_decay, runs, scale, states)
    return torch.ops.longwave.recurrent_attention.default(query, key, value, log_decay, runs.bounds, scale, states)


def _known(query: Tensor, key: Tensor, value: Tensor, states: Tensor) -> bool:
    alike = query.dtype == key.dtype == value.dtype and states.dtype == torch.float32
    width = value.shape[-1]
    return alike and query.dtype in _DTYPES and width % _LANES == 0 and width <= _WIDEST


_GIVEN = "Tensor query, Tensor key, Tensor value, Tensor log_decay, Tensor bounds, float scale, Tensor states"
torch.library.define("longwave::recurrent_attention", f"({_GIVEN}) -> (Tensor, Tensor)")


@torch.library.impl("longwave::recurrent_attention", "CPU")
def _run(
    query: Tensor, key: Tensor, value: Tensor, log_decay: Tensor, bounds: Tensor, scale: float, states: Tensor
) -> tuple[Tensor, Tensor]:
    query, key, value, decay = query.contiguous(), key.contiguous(), value.contiguous(), log_decay.float().contiguous()
    output, memory = torch.empty_like(value), states.contiguous().clone()
    _kernel()(
        *(one.data_ptr() for one in (query, key, value, decay, memory, output, bounds)),
        query.dtype == torch.bfloat16,
        decay.shape[0] > 1,
        scale,
        bounds.shape[0] - 1,
        *query.shape[1:],
        value.shape[2],
        torch.get_num_threads(),
    )
    return output, memory


@torch.library.register_fake("longwave::recurrent_attention")
def _shapes(
    query: Tensor, key: Tensor, value: Tensor, log_decay: Tensor, bounds: Tensor, scale: float, states: Tensor
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(value), torch.empty_like(states)


@cache
def _kernel() -> Any:
    function = compiled.library().longwave_recurrent
    function.argtypes = [c_void_p] * 7 + [c_int, c_int, c_float] + [c_int64] * 4 + [c_int]
    function.restype = None
    return function
