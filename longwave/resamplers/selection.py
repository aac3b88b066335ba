"""Which tokens a level keeps and with which weight: SUBLLM's top-k with its subtraction, and thresholds.

Legend: `T` tokens, `K` kept tokens, `W` windows of one size `N`, of which `M = ceil(N d)` tokens are kept.
"""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from typing import TypeAlias

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from longwave.draws import key, keys_of, uniform_of, uniforms
from longwave.resamplers.base import kept_count

Sampler = Callable[[Tensor, int, Tensor], Tensor]
Chosen: TypeAlias = tuple[Tensor, Tensor]


def top_scores(
    scores: Float[Tensor, " T"],
    weights: Float[Tensor, " T"],
    sizes: tuple[int, ...],
    keys: Int64[Tensor, " W"],
    retention: Fraction,
    sample: Sampler,
) -> Chosen:
    """The ceil(N d) highest raw scores of each window; a lower index wins a tie (SUBLLM, training).

    The rows, ascending, and the weight that each is kept with: lessened by a discarded weight of its window, which is
    zero in the end, but whose gradient teaches the score to push what is discarded below zero. keys: one per window,
    for the draws.
    """
    if len(set(sizes)) == 1:
        return _flat(_ranked(scores, weights, len(sizes), keys, retention, sample), sizes[0])
    chosen, start = list[Chosen](), 0
    for window, size in enumerate(sizes):
        if size:
            piece = slice(start, start + size)
            rows, shares = _ranked(scores[piece], weights[piece], 1, keys[window : window + 1], retention, sample)
            chosen.append((rows[0] + start, shares[0]))
        start += size
    if not chosen:
        return torch.zeros(0, dtype=torch.int64, device=scores.device), weights
    return torch.cat([rows for rows, _ in chosen]), torch.cat([shares for _, shares in chosen])


def _ranked(
    scores: Tensor, weights: Tensor, windows: int, keys: Tensor, retention: Fraction, sample: Sampler
) -> tuple[Tensor, Tensor]:
    """Kept places (W, M) ascending within each of W windows of one size, and their weights (W, M)."""
    size = scores.shape[0] // windows
    scores, weights = scores.view(windows, size), weights.view(windows, size)
    count = kept_count(scores.shape[1], retention)
    order = torch.sort(scores.detach(), dim=1, descending=True, stable=True).indices
    by_rank = weights.gather(1, order)
    shares = by_rank[:, :count] - sample(by_rank[:, count:], count, keys)
    places, ascending = order[:, :count].sort(dim=1)
    return places, shares.gather(1, ascending)


def _flat(ranked: tuple[Tensor, Tensor], size: int) -> Chosen:
    places, shares = ranked
    starts = torch.arange(places.shape[0], device=places.device).unsqueeze(1) * size
    return (places + starts).flatten(), shares.flatten()


def uniform_sample(
    discarded: Float[Tensor, "W R"], count: int, keys: Int64[Tensor, " W"]
) -> Float[Tensor, "W {count}"]:
    """Independent uniform draws, with replacement, from the discarded weights of the same window (the paper)."""
    if discarded.shape[1] == 0:
        return discarded.new_zeros(discarded.shape[0], count)
    draws = uniforms(keys, count)
    return discarded.gather(1, (draws * discarded.shape[1]).long())


def ranked_sample(discarded: Float[Tensor, "W R"], count: int, keys: Int64[Tensor, " W"]) -> Float[Tensor, "W {count}"]:
    """The next weights in rank order, zero beyond the last, reversed in half of the windows (icefall's Subformer)."""
    following = torch.nn.functional.pad(discarded[:, :count], (0, max(0, count - discarded.shape[1])))
    reverse = (uniform_of(keys) < 0.5).unsqueeze(1)
    return torch.where(reverse, following.flip(1), following)


def no_sample(discarded: Float[Tensor, "W R"], count: int, keys: Int64[Tensor, " W"]) -> Float[Tensor, "W {count}"]:
    """Nothing is subtracted: the control under which inference keeps nearly every token."""
    return discarded.new_zeros(discarded.shape[0], count)


SAMPLERS: dict[str, Sampler] = {"uniform": uniform_sample, "ranked": ranked_sample, "none": no_sample}


def window_keys(seed: int, step: int, part: int, ids: Int64[Tensor, " W"]) -> Int64[Tensor, " W"]:
    """The key of each window's draws at one step of one part."""
    return keys_of(key(seed, step, part), ids)
