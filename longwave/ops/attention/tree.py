"""Attention of runs that end in trees of drafts (`longwave.trees`): by a mask, through PyTorch's attention.

Legend: `T` tokens of the stream, `L` queries and `N` keys of one run, `H` query heads, `G` KV heads, `K` head size.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from longwave.ops.attention.pattern import Pattern
from longwave.ops.attention.sdpa import grouped
from longwave.streams import Places, Runs


def attention(
    query: Float[Tensor, "T H K"],
    key: Float[Tensor, "G N K"],
    value: Float[Tensor, "G N K"],
    runs: Runs,
    places: Places,
    pattern: Pattern,
    scale: float,
) -> Float[Tensor, "T H K"]:
    """Every query sees the keys of its past, and of its run those that lead to it, or the last `window` of all these.

    Arguments as in `longwave.ops.attention.attention`.
    """
    outputs = list[Tensor]()
    masks = runs.once(("attention", pattern), lambda: _masks(runs, places, pattern.window))
    for run, (queries, mask) in enumerate(zip(query.split(runs.lengths), masks, strict=True)):
        if len(queries):
            rows = (queries.transpose(0, 1), places.of(key, run), places.of(value, run))
            found = grouped(*(one.unsqueeze(0) for one in rows), attn_mask=mask, scale=scale)
            outputs.append(found[0].transpose(0, 1))
    return torch.cat(outputs)


def _masks(runs: Runs, places: Places, window: int | None) -> list[Bool[Tensor, "L N"]]:
    return [_mask(seen, end - begin, window) for seen, (begin, end) in zip(runs.visible(), places.spans, strict=True)]


def _mask(seen: Bool[Tensor, "L L"], keys: int, window: int | None) -> Bool[Tensor, "L N"]:
    """Which keys each query sees; distances count along its path."""
    past = keys - len(seen)
    mask = torch.cat([seen.new_ones(len(seen), past), seen], 1)
    if window is None:
        return mask
    places = past - 1 + seen.sum(1)
    of_keys = torch.cat([torch.arange(past, device=seen.device), places])
    return mask & (of_keys > places.unsqueeze(1) - window)
