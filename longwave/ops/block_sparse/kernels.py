"""The compiled form of block-sparse attention: the kernels of `select.c`, `attend.c` and `attend_keys.c` as torch ops.

Legend: `T` queries and `N` keys of one run, `H` query heads, `G` KV heads, `K` head size, `n` compressed keys.
"""

from __future__ import annotations

import ctypes
from ctypes import POINTER, c_float, c_int, c_int32, c_int64, c_void_p
from functools import cache
from typing import Any

import torch
from torch import Tensor

from longwave.errors import MachineError
from longwave.ops import compiled
from longwave.ops.block_sparse import differentiable, tiles
from longwave.ops.block_sparse.geometry import Geometry

_DTYPES = (torch.bfloat16, torch.float32)
_WIDEST = 256  # the largest head size that the kernels take


def select(
    query: Tensor, fine: Tensor, coarse: Tensor, first: int, geometry: Geometry, scale: float, exact: bool, budget: int
) -> Tensor:
    """The blocks (G, T, topk) that queries (T, H, K) see, ascending, filled up with -1; see `tiles.select`.

    The kernel needs no budget: its tiles work in a few hundred KiB.
    """
    if not _known(query, fine, coarse):
        return tiles.select(query, fine, coarse, first, geometry, scale, exact, budget)
    sizes = [geometry.kernel_size, geometry.stride, geometry.coarser, geometry.block_size]
    sizes += [geometry.init_blocks, geometry.local_blocks, geometry.topk]
    with torch.no_grad():
        return torch.ops.longwave.block_sparse_select.default(query, fine, coarse, first, sizes, scale, exact)


def attend(
    query: Tensor, keys: Tensor, values: Tensor, blocks: Tensor, first: int, block_size: int, scale: float
) -> Tensor:
    """Attention of query (T, H, K) to the blocks (G, T, topk) of keys and values (G, N, K), with gradient."""
    passes = _PASSES if _known(query, keys, values) else differentiable.TILES
    return differentiable.attend(passes, query, keys, values, blocks, first, block_size, scale)


def _known(query: Tensor, *others: Tensor) -> bool:
    """Whether the kernels take these tensors: at least one query, on a CPU, of a dtype and head size they know."""
    size = query.shape[-1]
    alike = all(one.dtype == query.dtype and one.shape[-1] == size for one in others)
    known = query.dtype in _DTYPES and query.device.type == "cpu" and not torch.compiler.is_compiling()
    return alike and known and query.shape[0] > 0 and size % 32 == 0 and size <= _WIDEST


class _Selection(ctypes.Structure):
    """The struct `selection` of `select.c`."""

    _fields_ = [
        *((name, c_void_p) for name in ("query", "fine", "coarse", "blocks")),
        *((name, c_int64) for name in ("fine_stride", "coarse_stride", "tokens", "groups", "ratio", "size", "first")),
        *((name, c_int64) for name in ("kernel_size", "stride", "coarser", "block_size")),
        *((name, c_int64) for name in ("init_blocks", "local_blocks", "topk")),
        *((name, c_int32) for name in ("is_bf16", "exact", "threads")),
        ("scale", c_float),
    ]


torch.library.define(
    "longwave::block_sparse_select",
    "(Tensor query, Tensor fine, Tensor coarse, int first, int[] sizes, float scale, bool exact) -> Tensor",
)


@torch.library.impl("longwave::block_sparse_select", "CPU")
def _select(
    query: Tensor, fine: Tensor, coarse: Tensor, first: int, sizes: list[int], scale: float, exact: bool
) -> Tensor:
    query, fine, coarse = query.contiguous(), _rows(fine), _rows(coarse)
    (tokens, heads, size), groups = query.shape, fine.shape[0]
    blocks = _shape_of_lists(query, fine, coarse, first, sizes, scale, exact)
    pointers = [one.data_ptr() for one in (query, fine, coarse, blocks)]
    shape = (fine.stride(0), coarse.stride(0), tokens, groups, heads // groups, size, first)
    options = (query.dtype == torch.bfloat16, exact, torch.get_num_threads())
    _check(_kernel("longwave_select", _Selection)(_Selection(*pointers, *shape, *sizes, *options, scale)))
    return blocks


@torch.library.register_fake("longwave::block_sparse_select")
def _shape_of_lists(
    query: Tensor, fine: Tensor, coarse: Tensor, first: int, sizes: list[int], scale: float, exact: bool
) -> Tensor:
    return query.new_empty(fine.shape[0], query.shape[0], sizes[-1], dtype=torch.int32)


class _Task(ctypes.Structure):
    """The struct `task` of `attend.h`."""

    _fields_ = [
        *((name, c_void_p) for name in ("query", "keys", "values", "blocks", "output", "sums", "slope", "dots")),
        *((name, c_void_p) for name in ("of_query", "of_keys", "of_values")),
        *((name, c_int64) for name in ("key_group", "key_token", "value_group", "value_token")),
        *((name, c_int64) for name in ("tokens", "keys_count", "groups", "ratio", "size")),
        *((name, c_int64) for name in ("first", "topk", "block_size")),
        *((name, c_int32) for name in ("is_bf16", "threads")),
        ("scale", c_float),
    ]


_GIVEN = "Tensor query, Tensor keys, Tensor values, Tensor blocks"
_OPTIONS = "int first, int block_size, float scale"
torch.library.define("longwave::block_sparse_attend", f"({_GIVEN}, {_OPTIONS}) -> (Tensor, Tensor)")
torch.library.define(
    "longwave::block_sparse_attend_backward",
    f"(Tensor slope, {_GIVEN}, Tensor output, Tensor sums, {_OPTIONS}) -> (Tensor, Tensor, Tensor)",
)


@torch.library.impl("longwave::block_sparse_attend", "CPU")
def _forward(
    query: Tensor, keys: Tensor, values: Tensor, blocks: Tensor, first: int, block_size: int, scale: float
) -> tuple[Tensor, Tensor]:
    given = (query.contiguous(), _tokens(keys), _tokens(values), blocks.contiguous())
    output, sums = _shapes_of_outputs(*given, first, block_size, scale)
    task = _task(given, (output, sums), first, block_size, scale)
    _check(_kernel("longwave_attend", _Task)(task))
    return output, sums


@torch.library.register_fake("longwave::block_sparse_attend")
def _shapes_of_outputs(
    query: Tensor, keys: Tensor, values: Tensor, blocks: Tensor, first: int, block_size: int, scale: float
) -> tuple[Tensor, Tensor]:
    return query.new_empty(query.shape), query.new_empty(query.shape[:2], dtype=torch.float32)


@torch.library.impl("longwave::block_sparse_attend_backward", "CPU")
def _backward(
    slope: Tensor,
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    blocks: Tensor,
    output: Tensor,
    sums: Tensor,
    first: int,
    block_size: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    given, slope = (query.contiguous(), _tokens(keys), _tokens(values), blocks.contiguous()), slope.contiguous()
    gradients = _shapes_of_gradients(slope, *given, output, sums, first, block_size, scale)
    dots = torch.empty_like(sums)
    task = _task(given, (output, sums, slope, dots, *gradients), first, block_size, scale)
    _check(_kernel("longwave_attend_queries", _Task)(task))
    _check(_kernel("longwave_attend_keys", _Task)(task))
    return gradients


@torch.library.register_fake("longwave::block_sparse_attend_backward")
def _shapes_of_gradients(
    slope: Tensor, query: Tensor, keys: Tensor, values: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return query.new_empty(query.shape), keys.new_empty(keys.shape), values.new_empty(values.shape)


def _task(given: tuple[Tensor, ...], made: tuple[Tensor, ...], first: int, block_size: int, scale: float) -> _Task:
    """The struct that the kernels read; it holds addresses only, so the caller keeps the tensors while they run."""
    query, keys, values, blocks = given
    pointers = [one.data_ptr() for one in (*given, *made)]
    pointers += [None] * (11 - len(pointers))
    strides = (*keys.stride()[:2], *values.stride()[:2])
    (tokens, heads, size), (groups, count, _) = query.shape, keys.shape
    shape = (tokens, count, groups, heads // groups, size, first, blocks.shape[2], block_size)
    return _Task(*pointers, *strides, *shape, query.dtype == torch.bfloat16, torch.get_num_threads(), scale)


_PASSES = differentiable.Passes(
    torch.ops.longwave.block_sparse_attend.default, torch.ops.longwave.block_sparse_attend_backward.default
)


def _tokens(entries: Tensor) -> Tensor:
    """The entries (G, N, K), copied unless the K numbers of each token lie side by side in memory."""
    return entries if entries.stride(2) == 1 else entries.contiguous()


def _rows(entries: Tensor) -> Tensor:
    """The entries (G, n, K), copied unless the n rows of each group lie side by side in memory."""
    return entries if entries.stride()[1:] == (entries.shape[2], 1) else entries.contiguous()


def _check(failed: int) -> None:
    if failed:
        raise MachineError("block-sparse attention: no memory left")


@cache
def _kernel(name: str, structure: type[ctypes.Structure]) -> Any:
    function = getattr(compiled.library(), name)
    function.argtypes, function.restype = [POINTER(structure)], c_int
    return function
