"""The compiled form of attention: single queries over remembered keys (`one_query.c`), everything else through torch.

Legend: `S` sequences with one query each, `H` query heads, `G` KV heads, `N` keys of one sequence, `K` head size.
"""

from __future__ import annotations

from ctypes import c_float, c_int, c_int64, c_void_p
from functools import cache
from typing import Any

import torch
from torch import Tensor

from longwave.errors import MachineError
from longwave.ops import compiled
from longwave.ops.attention import sdpa

_DTYPES = (torch.bfloat16, torch.float32)


def attention(
    query: Tensor, keys: list[Tensor], values: list[Tensor], lengths: tuple[int, ...], window: int | None, scale: float
) -> Tensor:
    """Queries (T, H, K) of each run against its head-major keys and values (G, N, K), of which they are the last."""
    single = _for_kernel(query, keys, values, lengths)
    if not single:
        return sdpa.attention(query, keys, values, lengths, window, scale)
    if len(single) == len(lengths):
        return _one_query(query, keys, values, window, scale)
    outputs = list(query.split(lengths))
    of_single = (torch.cat([outputs[run] for run in single]), [keys[run] for run in single])
    mixed = _one_query(*of_single, [values[run] for run in single], window, scale)
    for run in set(range(len(lengths))) - set(single):
        outputs[run] = sdpa.attention(outputs[run], [keys[run]], [values[run]], (lengths[run],), window, scale)
    for run, output in zip(single, mixed.split(1), strict=True):
        outputs[run] = output
    return torch.cat(outputs)


def _for_kernel(query: Tensor, keys: list[Tensor], values: list[Tensor], lengths: tuple[int, ...]) -> list[int]:
    """The runs that the kernel takes: single queries of inference on a CPU, in a type and head size that it knows."""
    known = query.dtype in _DTYPES and query.shape[-1] % 32 == 0 and query.device.type == "cpu"
    if not known or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return []
    pairs = enumerate(zip(lengths, keys, values, strict=True))
    return [run for run, (length, key, value) in pairs if length == 1 and _is_plain(key, value, query.dtype)]


def _is_plain(key: Tensor, value: Tensor, dtype: torch.dtype) -> bool:
    """Whether the tokens of every KV head lie side by side, in a key and a value of one shape."""
    together = key.stride()[1:] == (key.shape[2], 1) and value.stride() == key.stride()
    return together and key.dtype == value.dtype == dtype


def _one_query(query: Tensor, keys: list[Tensor], values: list[Tensor], window: int | None, scale: float) -> Tensor:
    """query (S, H, K) -> (S, H, K)."""
    if window is not None:
        keys, values = [key[:, -window:] for key in keys], [value[:, -window:] for value in values]
    return torch.ops.longwave.one_query_attention.default(query, keys, values, scale)


torch.library.define(
    "longwave::one_query_attention", "(Tensor query, Tensor[] keys, Tensor[] values, float scale) -> Tensor"
)


@torch.library.impl("longwave::one_query_attention", "CPU")
def _run(query: Tensor, keys: list[Tensor], values: list[Tensor], scale: float) -> Tensor:
    query = query.contiguous()
    output = torch.empty_like(query)
    count, groups = len(keys), keys[0].shape[0]
    failed = _kernel()(
        query.data_ptr(),
        (c_void_p * count)(*[key.data_ptr() for key in keys]),
        (c_void_p * count)(*[value.data_ptr() for value in values]),
        (c_int64 * count)(*[key.shape[1] for key in keys]),
        (c_int64 * count)(*[key.stride(0) for key in keys]),
        output.data_ptr(),
        query.dtype == torch.bfloat16,
        scale,
        count,
        groups,
        query.shape[1] // groups,
        query.shape[2],
        torch.get_num_threads(),
    )
    if failed:
        raise MachineError("attention: no memory left")
    return output


@torch.library.register_fake("longwave::one_query_attention")
def _shape(query: Tensor, keys: list[Tensor], values: list[Tensor], scale: float) -> Tensor:
    return torch.empty_like(query)


@cache
def _kernel() -> Any:
    function = compiled.library().longwave_one_query
    function.argtypes = [c_void_p] * 6 + [c_int, c_float] + [c_int64] * 4 + [c_int]
    return function
