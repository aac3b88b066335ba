"""Softmax attention as the formula says it, in double precision: the documentation of the maths."""

from __future__ import annotations

import torch
from torch import Tensor


def attention(
    query: Tensor, keys: list[Tensor], values: list[Tensor], lengths: tuple[int, ...], window: int | None, scale: float
) -> Tensor:
    """o_t = sum_u softmax_u(scale q_t . k_u) v_u over the visible keys u, one query at a time.

    The `lengths[r]` queries of run `r` are the last of its keys: query i sees keys 0 ... N - L + i, or the last
    `window` of those. Query head h reads KV head h // (H / G) (Ainslie et al. 2023, grouped-query attention).
    """
    rows, start = [], 0
    for length, key, value in zip(lengths, keys, values, strict=True):
        for i in range(length):
            last = key.shape[1] - length + i + 1
            first = 0 if window is None else max(0, last - window)
            rows.append(_one_query(query[start + i], key[:, first:last], value[:, first:last], scale))
        start += length
    return torch.stack(rows) if rows else query.new_zeros(query.shape)


def _one_query(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """query (H, K), key and value (G, N, K) -> (H, K)."""
    grouped = query.double().unflatten(0, (key.shape[0], -1))
    weights = torch.softmax(scale * grouped @ key.double().transpose(1, 2), dim=-1)
    return (weights @ value.double()).flatten(0, 1).to(query.dtype)
