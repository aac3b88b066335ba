"""The compiled form of attention: a kernel for the queries of short runs (`one_query.c`); torch does the rest.

Legend: `T` queries, `H` query heads, `G` KV heads, `N` keys of one sequence, `K` head size.
"""

from __future__ import annotations

from ctypes import c_float, c_int, c_int64, c_void_p
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from longwave.errors import MachineError
from longwave.ops import compiled
from longwave.ops.attention import sdpa
from longwave.ops.attention.pattern import Attended, Pattern, Wanted
from longwave.ops.attention.weights import with_extras
from longwave.streams import Places, Runs

_DTYPES = (torch.bfloat16, torch.float32)
_FEW = 16  # queries of a run up to which the kernel is faster than torch, which reads keys once for all of them
_AT_ONCE = 128  # queries, which bounds the memory for their intermediate results


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    runs: Runs,
    places: Places | None,
    pattern: Pattern,
    scale: float,
    want: Wanted,
) -> Attended:
    """Attention as `longwave.ops.attention.attention` defines it: queries (T, H, K), keys and values (G, N, K)."""
    shortest = () if places is None else [length for length in runs.lengths if 0 < length <= _FEW]
    if places is None or not shortest or not _is_for_kernel(query, key, value):
        return sdpa.attention(query, key, value, runs, places, pattern, scale, want)
    if runs.longest <= _FEW:
        output = _each_query(query, key, value, runs, places, None, pattern.window, scale)
    else:
        output = _mixed(query, key, value, runs, places, pattern.window, scale)
    return with_extras(output, query, key, runs, places, pattern, scale, want)


def _mixed(
    query: Tensor, key: Tensor, value: Tensor, runs: Runs, places: Places, window: int | None, scale: float
) -> Tensor:
    """The runs of few queries through the kernel, longer runs through torch."""
    lengths, outputs = runs.lengths, list(query.split(runs.lengths))
    few = [run for run, length in enumerate(lengths) if 0 < length <= _FEW]
    which = ((runs.sizes < 1) | (runs.sizes > _FEW)).argsort(stable=True)[: len(few)]
    short = tuple([lengths[run] for run in few])
    inner = Runs(F.pad(runs.sizes.index_select(0, which).cumsum(0), (1, 0)), sum(short), short)
    mixed = _each_query(torch.cat([outputs[run] for run in few]), key, value, inner, places, which, window, scale)
    for run, output in zip(few, mixed.split(short), strict=True):
        outputs[run] = output
    for run, length in enumerate(lengths):
        if length > _FEW:
            piece = [(places.of(key, run), places.of(value, run))]
            outputs[run] = sdpa.by_run(outputs[run], (length,), piece, window, scale)
    return torch.cat(outputs)


def each_query(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    runs: Runs,
    places: Places | None,
    pattern: Pattern,
    scale: float,
    want: Wanted,
) -> Attended:
    """Attention in which every query runs through the kernel by itself, also those of a prompt.

    A query's result then depends on itself and its keys alone, to the bit, and not on how many run with it. It takes
    the more time than `attention` the longer a prompt is, since keys are read anew for every query.
    """
    if places is None:
        key, value = key.contiguous(), value.contiguous()
        places = Places(runs.bounds[:-1], runs.bounds[1:])
    if not _is_for_kernel(query, key, value):
        return sdpa.attention(query, key, value, runs, places, pattern, scale, want)
    output = _each_query(query, key, value, runs, places, None, pattern.window, scale)
    return with_extras(output, query, key, runs, places, pattern, scale, want)


def _is_for_kernel(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether the kernel takes these tensors: at inference, on a CPU, in dtypes and head sizes that it knows.

    The keys and values of every KV head have to lie side by side in memory, token after token.
    """
    known = query.dtype in _DTYPES and query.shape[-1] % 32 == 0 and query.device.type == "cpu"
    if not known or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    together = key.stride()[1:] == (key.shape[2], 1) and value.stride() == key.stride()
    return together and key.dtype == value.dtype == query.dtype


def _each_query(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    runs: Runs,
    places: Places,
    which: Tensor | None,
    window: int | None,
    scale: float,
) -> Tensor:
    """Outputs (T, H, K) of the queries (T, H, K) of short runs, each by itself; which: those of `places`, None for all.

    A query's sums are in the same order whatever run it comes in, so a draft that is checked at once gives what its
    tokens would have given one by one.
    """
    begins, ends = places.begins, places.ends
    if which is not None:
        begins, ends = begins.index_select(0, which), ends.index_select(0, which)
    if (runs.tokens, runs.longest) != (runs.count, 1):
        run = runs.of_token
        ends = (ends - runs.sizes + 1).index_select(0, run) + runs.places
        begins, which = begins.index_select(0, run), run if which is None else which.index_select(0, run)
    if window is not None:
        begins = torch.maximum(begins, ends - window)
    if which is None and query.shape[0] > _AT_ONCE:
        which = torch.arange(query.shape[0], device=query.device)
    outputs = [
        torch.ops.longwave.one_query_attention.default(
            *(query[at], key, value, begins[at], ends[at], places.pages),
            *(None if which is None else which[at], places.size, scale),
        )
        for at in (slice(start, start + _AT_ONCE) for start in range(0, query.shape[0], _AT_ONCE))
    ]
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


# A registered torch op, so that torch.compile can trace past the call into C.
torch.library.define(
    "longwave::one_query_attention",
    "(Tensor query, Tensor key, Tensor value, Tensor begins, Tensor ends, Tensor? pages, Tensor? of_query, int size,"
    " float scale) -> Tensor",
)


@torch.library.impl("longwave::one_query_attention", "CPU")
def _run(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    begins: Tensor,
    ends: Tensor,
    pages: Tensor | None,
    of_query: Tensor | None,
    page_size: int,
    scale: float,
) -> Tensor:
    query = query.contiguous()
    output = torch.empty_like(query)
    failed = _kernel()(
        query.data_ptr(),
        key.data_ptr(),
        value.data_ptr(),
        begins.data_ptr(),
        ends.data_ptr(),
        None if pages is None else pages.data_ptr(),
        None if of_query is None else of_query.data_ptr(),
        output.data_ptr(),
        query.dtype == torch.bfloat16,
        scale,
        query.shape[0],
        key.shape[0],
        key.stride(0),
        query.shape[1] // key.shape[0],
        query.shape[2],
        0 if pages is None else pages.shape[1],
        page_size,
        torch.get_num_threads(),
    )
    if failed:
        raise MachineError("attention: no memory left")
    return output


@torch.library.register_fake("longwave::one_query_attention")
def _shape(query: Tensor, *rest: Any) -> Tensor:
    return torch.empty_like(query)


@cache
def _kernel() -> Any:
    function = compiled.library().longwave_one_query
    function.argtypes = [c_void_p] * 8 + [c_int, c_float] + [c_int64] * 7 + [c_int]
    return function
