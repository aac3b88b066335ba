"""The weights of softmax attention, chunk by chunk of queries, and their log-sum-exps and column sums.

Legend: `T` queries of one run, `C` queries of a chunk, `N` keys, `H` query heads, `G` KV heads, `K` head size.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from longwave.ops.attention.pattern import Attended, Pattern, Wanted
from longwave.streams import Places, Runs

_MOST = 1 << 23  # weights held at once
_SHORTEST = 64  # the least queries of a chunk with a short sliding window, whose chunks would be too many otherwise


class Weights(NamedTuple):
    """The weights of a chunk of queries. query, key: the places of the first query and of the first key of the array.

    Weights are 0 where a query does not see a key; all keys before `key` are out of the chunk's sight.
    """

    query: int
    key: int
    weights: Float[Tensor, "H C N"]


def attention_weights(
    query: Float[Tensor, "T H K"],
    key: Float[Tensor, "T G K"],
    *,
    window: int | None = None,
    scale: float,
    most: int = _MOST,
) -> Iterator[Weights]:
    """The weights softmax_u(scale q_t . k_u) of a run that attends to itself, in fp32 or wider, in the queries' order.

    window: of a sliding window, in tokens. most: about how many weights are held at once; no (T, T) array is made.
    `reference.attention` has the formula.
    """
    for start, first, scores in _scores(query, key, window, scale, most):
        yield Weights(start, first, scores.softmax(-1))


def with_extras(
    output: Float[Tensor, "T H K"],
    query: Float[Tensor, "T H K"],
    key: Float[Tensor, "G N K"],
    runs: Runs,
    places: Places | None,
    pattern: Pattern,
    scale: float,
    want: Wanted,
) -> Attended:
    """An output together with the further results in `want`, computed from queries and keys chunk by chunk."""
    if not want:
        return Attended(output)
    places = places or Places(runs.bounds[:-1], runs.bounds[1:])
    wide = torch.promote_types(query.dtype, torch.float32)
    heads = query.shape[1]
    logs, sums = [query.new_zeros(0, heads, dtype=wide)], query.new_zeros(heads, key.shape[1], dtype=wide)
    for run, (piece, (begin, _)) in enumerate(zip(query.split(runs.lengths), places.spans, strict=True)):
        for _, first, scores in _scores(piece, places.of(key, run).transpose(0, 1), pattern.window, scale, _MOST):
            logs.append(scores.logsumexp(-1).T)
            columns = places.entries(run, (begin + first, begin + first + scores.shape[-1]))
            sums[:, columns] += scores.detach().softmax(-1).sum(1)
    lse = torch.cat(logs) if "lse" in want else None
    return Attended(output, lse, sums if "column_sums" in want else None)


def _scores(
    query: Float[Tensor, "T H K"], key: Float[Tensor, "N G K"], window: int | None, scale: float, most: int
) -> Iterator[tuple[int, int, Float[Tensor, "H C n"]]]:
    """For each chunk of queries: its first query, its first key, and its scores, -inf where a key is not seen.

    The queries stand at the last T of the N keys.
    """
    dtype = torch.promote_types(query.dtype, torch.float32)
    tokens, heads = query.shape[:2]
    past = key.shape[0] - tokens
    grouped, key = query.to(dtype).unflatten(1, (key.shape[1], -1)), key.to(dtype)
    longest = tokens if window is None else max(window, _SHORTEST)  # such a chunk sees two windows' worth of keys
    chunk = max(1, min(longest, most // max(1, heads * min(past + tokens, 2 * longest))))
    for start in range(0, tokens, chunk):
        stop = min(start + chunk, tokens)
        first = 0 if window is None else max(0, past + start - window + 1)
        scores = torch.einsum("cgrk,ngk->grcn", scale * grouped[start:stop], key[first : past + stop]).flatten(0, 1)
        hidden = ~_visible(past + start, past + stop, first, window, query.device)
        yield start, first, scores.masked_fill(hidden, -torch.inf)


def _visible(start: int, stop: int, first: int, window: int | None, device: torch.device) -> Tensor:
    """The (C, n) mask: which keys, from `first` up to `stop`, each query from `start` up to `stop` sees."""
    query, key = torch.arange(start, stop, device=device).unsqueeze(1), torch.arange(first, stop, device=device)
    return (key <= query) & (key > query - (window or stop))
