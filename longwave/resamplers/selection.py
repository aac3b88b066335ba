"""Which tokens a level keeps and with which weight: SUBLLM's top-k with its subtraction, and thresholds.

Legend: `T` tokens, `K` kept tokens, `W` windows of one size `N`, of which `M = ceil(N d)` tokens are kept.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from longwave.draws import key, tensor_of_keys, uniform, uniforms

Sampler = Callable[[Tensor, int, "list[int]"], Tensor]


@dataclass(frozen=True)
class Selection:
    """The kept rows in ascending order, and the share of the body's result that each of them takes."""

    rows: Int64[Tensor, " K"]
    weights: Float[Tensor, " K"]


def kept_count(tokens: int, retention: Fraction) -> int:
    """ceil(tokens * retention), with the retention as the exact decimal it was written as."""
    return -(-tokens * retention.numerator // retention.denominator)


def above_threshold(scores: Float[Tensor, " T"], weights: Float[Tensor, " T"], threshold: Tensor) -> Selection:
    """The tokens whose score exceeds the threshold: a choice that looks at each token alone."""
    rows = (scores > threshold).nonzero().flatten()
    return Selection(rows, weights.index_select(0, rows))


def top_scores(
    scores: Float[Tensor, " T"],
    weights: Float[Tensor, " T"],
    sizes: tuple[int, ...],
    keys: list[int],
    retention: Fraction,
    sample: Sampler,
) -> Selection:
    """The ceil(N d) highest raw scores of each window; a lower index wins a tie (SUBLLM, training).

    A kept weight is lessened by a discarded weight of its window: that is zero in the end, but its gradient teaches the
    score to push what is discarded below zero. keys: one per window, for the draws.
    """
    if len(set(sizes)) == 1:
        return _flat(_ranked(scores, weights, len(sizes), keys, retention, sample), sizes[0])
    chosen, start = [], 0
    for size, one in zip(sizes, keys, strict=True):
        if size:
            piece = slice(start, start + size)
            rows, shares = _ranked(scores[piece], weights[piece], 1, [one], retention, sample)
            chosen.append(Selection(rows[0] + start, shares[0]))
        start += size
    if not chosen:
        return Selection(torch.zeros(0, dtype=torch.int64, device=scores.device), weights)
    return Selection(torch.cat([one.rows for one in chosen]), torch.cat([one.weights for one in chosen]))


def _ranked(
    scores: Tensor, weights: Tensor, windows: int, keys: list[int], retention: Fraction, sample: Sampler
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


def _flat(ranked: tuple[Tensor, Tensor], size: int) -> Selection:
    places, shares = ranked
    starts = torch.arange(places.shape[0], device=places.device).unsqueeze(1) * size
    return Selection((places + starts).flatten(), shares.flatten())


def uniform_sample(discarded: Float[Tensor, "W R"], count: int, keys: list[int]) -> Float[Tensor, "W {count}"]:
    """Independent uniform draws, with replacement, from the discarded weights of the same window (the paper)."""
    if discarded.shape[1] == 0:
        return discarded.new_zeros(discarded.shape[0], count)
    draws = uniforms(tensor_of_keys(keys, discarded.device), count)
    return discarded.gather(1, (draws * discarded.shape[1]).long())


def ranked_sample(discarded: Float[Tensor, "W R"], count: int, keys: list[int]) -> Float[Tensor, "W {count}"]:
    """The next weights in rank order, zero beyond the last, reversed in half of the windows (icefall's Subformer)."""
    following = torch.nn.functional.pad(discarded[:, :count], (0, max(0, count - discarded.shape[1])))
    reverse = torch.tensor([uniform(one) < 0.5 for one in keys], device=discarded.device).unsqueeze(1)
    return torch.where(reverse, following.flip(1), following)


def no_sample(discarded: Float[Tensor, "W R"], count: int, keys: list[int]) -> Float[Tensor, "W {count}"]:
    """Nothing is subtracted: the control under which inference keeps nearly every token."""
    return discarded.new_zeros(discarded.shape[0], count)


SAMPLERS: dict[str, Sampler] = {"uniform": uniform_sample, "ranked": ranked_sample, "none": no_sample}


def window_keys(seed: int, step: int, part: int, samples: tuple[int, ...]) -> list[int]:
    """The key of each window's draws at one step of one part."""
    return [key(seed, step, part, sample) for sample in samples]
