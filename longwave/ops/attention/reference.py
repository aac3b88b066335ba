"""The reference form of softmax attention: the formula in double precision, query by query."""

from __future__ import annotations

import torch
from torch import Tensor

from longwave.ops.attention.pattern import Attended, Pattern, Wanted
from longwave.streams import Places, Runs, chosen


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
    """o_t = sum_u softmax_u(scale q_t . k_u) v_u over the visible keys u, one query at a time.

    The L queries of a run (rows of `query`, (T, H, K)) stand at the last L of its keys, which lie at `places` in key
    and value (G, N, K). Query i sees the run's keys up to its own place, or the last `window` of these. Query head h
    reads KV head h // (H / G) (grouped-query attention, Ainslie et al. 2023).
    """
    places = places or Places(runs.bounds[:-1], runs.bounds[1:])
    wide = torch.promote_types(query.dtype, torch.float32)
    rows, logs = [], []
    sums = torch.zeros(query.shape[1], key.shape[1], dtype=torch.float64, device=query.device)
    queries = iter(query)
    for run, (length, (begin, end)) in enumerate(zip(runs.lengths, places.spans, strict=True)):
        for last in range(end - length + 1, end + 1):
            first = begin if pattern.window is None else max(begin, last - pattern.window)
            seen = places.entries(run, (first, last))
            output, lse, weights = _one_query(next(queries), chosen(key, seen), chosen(value, seen), scale)
            rows.append(output)
            logs.append(lse)
            sums[:, seen] += weights
    output = torch.stack(rows).to(query.dtype) if rows else query.new_zeros(query.shape)
    lse = torch.stack(logs) if logs else query.new_zeros(query.shape[:2])
    return Attended(output, lse.to(wide) if "lse" in want else None, sums.to(wide) if "column_sums" in want else None)


def _one_query(query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """query (H, K), key and value (G, N, K) -> output (H, K), log-sum-exp (H), weights (H, N)."""
    grouped = query.double().unflatten(0, (key.shape[0], -1))
    scores = scale * grouped @ key.double().transpose(1, 2)
    weights = torch.softmax(scores, dim=-1)
    output = (weights @ value.double()).flatten(0, 1).to(query.dtype)
    return output, scores.logsumexp(-1).flatten(), weights.detach().flatten(0, 1)
