"""The reference form of block-sparse attention: the formulas in double precision, query by query.

Legend: `T` queries and `N` keys of one run, `H` query heads, `G` KV heads, `R` = H / G, `K` head size.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from longwave.ops.block_sparse.geometry import Geometry, compressed_count


@torch.no_grad()
def select(
    query: Tensor, fine: Tensor, coarse: Tensor, first: int, geometry: Geometry, scale: float, exact: bool, budget: int
) -> Tensor:
    """The blocks (G, T, topk) that each query sees, ascending, filled up with -1 (InfLLM-V2, arXiv 2509.24663)."""
    grouped = query.double().unflatten(1, (fine.shape[0], -1)).transpose(0, 1)
    lists = [
        [_blocks(q, f.double(), c.double(), first + i, geometry, scale, exact) for i, q in enumerate(of_group)]
        for of_group, f, c in zip(grouped, fine, coarse, strict=True)
    ]
    shape = (fine.shape[0], query.shape[0], geometry.topk)
    return torch.tensor(lists, dtype=torch.int32, device=query.device).reshape(shape)


def _blocks(
    query: Tensor, fine: Tensor, coarse: Tensor, place: int, geometry: Geometry, scale: float, exact: bool
) -> list[int]:
    """The blocks that the heads (R, K) of one query at `place` see: first the forced ones, then the others by score.

    Of equal scores the earlier block comes first.
    """
    own = place // geometry.block_size
    scores = _block_scores(_window_scores(query, fine, coarse, place, geometry, scale, exact), own, geometry)

    def rank(block: int) -> tuple[bool, float, int]:
        forced = block < geometry.init_blocks or block >= own - geometry.local_blocks
        return not forced, -scores[block], block

    best = sorted(sorted(range(own + 1), key=rank)[: geometry.topk])
    return best + [-1] * (geometry.topk - len(best))


def _window_scores(
    query: Tensor, fine: Tensor, coarse: Tensor, place: int, geometry: Geometry, scale: float, exact: bool
) -> list[float]:
    """P_j = sum_i exp(a_ij - log sum_c exp b_ic) over the heads i of a group, for the windows j that end by `place`.

    a_ij = scale q_i . fine_j and b_ic = scale q_i . coarse_c over complete windows; b = a where `exact`. While no
    coarse window is complete there is no denominator, and every score is 0. A score that is NaN counts as 0.
    """
    a = scale * query @ fine[: compressed_count(place + 1, *geometry.fine)].T
    b = a if exact else scale * query @ coarse[: compressed_count(place + 1, *geometry.coarse)].T
    if not b.shape[1]:
        return [0.0] * a.shape[1]
    scores = (a - b.logsumexp(1, keepdim=True)).exp().sum(0)
    return scores.nan_to_num(nan=0.0, posinf=math.inf).tolist()


def _block_scores(scores: list[float], own: int, geometry: Geometry) -> list[float]:
    """For each block up to the query's own, the largest score of the visible windows that overlap it; -inf if none."""
    r = geometry.strides
    return [max(scores[max(0, r * block - 1) : r * block + r], default=-math.inf) for block in range(own + 1)]


def attend(
    query: Tensor, keys: Tensor, values: Tensor, blocks: Tensor, first: int, block_size: int, scale: float
) -> Tensor:
    """o_t = sum_u softmax_u(scale q_t . k_u) v_u over the keys u <= t in the query's blocks."""
    grouped = query.double().unflatten(1, (keys.shape[0], -1)).transpose(0, 1)
    sides = zip(grouped, keys.double(), values.double(), blocks.tolist(), strict=True)
    outputs = [
        torch.stack([_attend_one(q, k, v, chosen[i], first + i, block_size, scale) for i, q in enumerate(of_group)])
        for of_group, k, v, chosen in sides
    ]
    return torch.stack(outputs, dim=1).flatten(1, 2).to(query.dtype)


def _attend_one(
    query: Tensor, key: Tensor, value: Tensor, blocks: list[int], place: int, block_size: int, scale: float
) -> Tensor:
    """Attention of one query: its heads (R, K) of one group, the group's key and value (N, K) -> (R, K)."""
    starts = [block * block_size for block in blocks if block >= 0]
    seen = [u for start in starts for u in range(start, min(start + block_size, place + 1))]
    return torch.softmax(scale * query @ key[seen].T, dim=-1) @ value[seen]
