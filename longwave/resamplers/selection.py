"""SUBLLM's choice of tokens in training (arXiv 2406.06571): the top scores of each training window, and their weights.

From a kept token's weight the weight of a discarded token of the same training window is subtracted, drawn at random.
That gives discarded scores a gradient, which pushes them below zero: their weights become 0, so that in the end nothing
is subtracted, and inference can discard by the sign of the score.

Legend: `T` tokens, `W` training windows of one size `N`, of which `M = ceil(N d)` tokens are kept at retention `d` and
`R = N - M` discarded.
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
"""From the discarded weights (W, R), a count and a key for each window: the weights to subtract, (W, count)."""

Chosen: TypeAlias = tuple[Tensor, Tensor]
"""The rows of the kept tokens, ascending, and their weights."""


def top_scores(
    scores: Float[Tensor, " T"],
    weights: Float[Tensor, " T"],
    sizes: tuple[int, ...],
    keys: Int64[Tensor, " W"],
    retention: Fraction,
    sample: Sampler,
) -> Chosen:
    """The tokens with the ceil(N d) highest scores of each training window, and their weights after the subtraction.

    Of equal scores the lower index wins. sizes: tokens of each window. keys: for each window, the key of its draws.
    sample: draws the weights to subtract.
    """
    if len(set(sizes)) == 1:  # the common case, in a few launches for all windows
        return _flat(_ranked(scores, weights, len(sizes), keys, retention, sample), sizes[0])
    chosen, start = list[Chosen](), 0  # windows of several sizes, one after the other
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
    """The places (W, M) of kept tokens within each of W windows of one size, ascending, and their weights (W, M)."""
    size = scores.shape[0] // windows
    scores, weights = scores.view(windows, size), weights.view(windows, size)
    count = kept_count(scores.shape[1], retention)
    # A stable sort and not topk, which promises nothing about ties: every device has to keep the same tokens.
    order = torch.sort(scores.detach(), dim=1, descending=True, stable=True).indices
    by_rank = weights.gather(1, order)
    shares = by_rank[:, :count] - sample(by_rank[:, count:], count, keys)
    # Kept tokens go on in the order of the text, each with its weight.
    places, ascending = order[:, :count].sort(dim=1)
    return places, shares.gather(1, ascending)


def _flat(ranked: tuple[Tensor, Tensor], size: int) -> Chosen:
    """Places within windows of one size as rows of the stream."""
    places, shares = ranked
    starts = torch.arange(places.shape[0], device=places.device).unsqueeze(1) * size
    return (places + starts).flatten(), shares.flatten()


def uniform_sample(
    discarded: Float[Tensor, "W R"], count: int, keys: Int64[Tensor, " W"]
) -> Float[Tensor, "W {count}"]:
    """Independent uniform draws, with replacement, from the discarded weights of the same window (the paper's rule)."""
    if discarded.shape[1] == 0:  # everything is kept
        return discarded.new_zeros(discarded.shape[0], count)
    # A draw in [0, 1) times the number of discarded tokens is a rank among them, all equally likely.
    draws = uniforms(keys, count)
    return discarded.gather(1, (draws * discarded.shape[1]).long())


def ranked_sample(discarded: Float[Tensor, "W R"], count: int, keys: Int64[Tensor, " W"]) -> Float[Tensor, "W {count}"]:
    """The weights that follow the kept ones in rank, 0 beyond the last, reversed in a random half of the windows.

    This is the rule of icefall's Subformer.
    """
    following = torch.nn.functional.pad(discarded[:, :count], (0, max(0, count - discarded.shape[1])))
    reverse = (uniform_of(keys) < 0.5).unsqueeze(1)
    return torch.where(reverse, following.flip(1), following)


def no_sample(discarded: Float[Tensor, "W R"], count: int, keys: Int64[Tensor, " W"]) -> Float[Tensor, "W {count}"]:
    """Zeros, so that nothing is subtracted: a control experiment, after which inference keeps nearly every token."""
    return discarded.new_zeros(discarded.shape[0], count)


SAMPLERS: dict[str, Sampler] = {"uniform": uniform_sample, "ranked": ranked_sample, "none": no_sample}


def window_keys(seed: int, step: int, part: int, ids: Int64[Tensor, " W"]) -> Int64[Tensor, " W"]:
    """The key of each training window's draws, for one part of the model at one optimizer step."""
    return keys_of(key(seed, step, part), ids)
