"""Attention to given blocks as a torch function with a gradient, around the forward and backward pass of a form.

Legend: `T` queries and `N` keys of one run, `H` query heads, `G` KV heads, `K` head size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from longwave.ops.block_sparse import tiles


@dataclass(frozen=True)
class Passes:
    """The forward and backward pass of a form.

    forward: (query, keys, values, blocks, first, block_size, scale) -> output and log-sum-exp. backward: (gradient of
    the output, query, keys, values, blocks, output, log-sum-exp, first, block_size, scale) -> gradients of query, keys
    and values.
    """

    forward: Callable[..., tuple[Tensor, Tensor]]
    backward: Callable[..., tuple[Tensor, Tensor, Tensor]]


TILES = Passes(tiles.forward, tiles.backward)


def attend(
    passes: Passes,
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    blocks: Tensor,
    first: int,
    block_size: int,
    scale: float,
) -> Tensor:
    """Attention of query (T, H, K) to the blocks (G, T, topk) of keys and values (G, N, K) -> (T, H, K)."""
    wanted = torch.is_grad_enabled() and any(one.requires_grad for one in (query, keys, values))
    if not wanted:
        return passes.forward(query, keys, values, blocks, first, block_size, scale)[0]
    return _Attend.apply(query, keys, values, blocks, passes, first, block_size, scale)


class _Attend(torch.autograd.Function):
    """Keeps the output and the log-sum-exps, from which the backward pass computes the attention weights again."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        blocks: Tensor,
        passes: Passes,
        first: int,
        block_size: int,
        scale: float,
    ) -> Tensor:
        output, sums = passes.forward(query, keys, values, blocks, first, block_size, scale)
        ctx.save_for_backward(query, keys, values, blocks, output, sums)
        ctx.passes, ctx.options = passes, (first, block_size, scale)
        return output

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor | None, ...]:
        gradients = ctx.passes.backward(slopes[0], *ctx.saved_tensors, *ctx.options)
        return (*gradients, None, None, None, None, None)
