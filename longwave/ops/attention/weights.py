"""The weights of softmax attention themselves, for whoever looks at them: a chunk of queries at a time.

Legend: `T` tokens of one run, `C` queries of a chunk, `N` keys they see, `H` query heads, `G` KV heads, `K` head size.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

_MOST = 1 << 23  # weights that are held at once
_SHORTEST = 64  # queries of a chunk, however short the window


class Weights(NamedTuple):
    """The weights of the queries from `query` on, for the keys from `key` on; zero where a query cannot see a key."""

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
    """softmax_u(scale q_t . k_u) of one run that attends to itself, in fp32 or better, in the order of its queries.

    most: weights held at once, about; no (T x T) array ever exists. The maths are those of `reference.attention`.
    """
    dtype = torch.promote_types(query.dtype, torch.float32)
    tokens, heads = query.shape[:2]
    grouped, key = query.to(dtype).unflatten(1, (key.shape[1], -1)), key.to(dtype)
    longest = tokens if window is None else max(window, _SHORTEST)  # a chunk as long as a window sees two of them
    chunk = min(longest, max(1, most // max(1, heads * min(tokens, 2 * longest))))
    for start in range(0, tokens, chunk):
        stop = min(start + chunk, tokens)
        first = 0 if window is None else max(0, start - window + 1)
        logits = torch.einsum("cgrk,ngk->grcn", scale * grouped[start:stop], key[first:stop]).flatten(0, 1)
        hidden = ~_visible(start, stop, first, window, query.device)
        yield Weights(start, first, logits.masked_fill_(hidden, -torch.inf).softmax(-1))


def _visible(start: int, stop: int, first: int, window: int | None, device: torch.device) -> Tensor:
    """(C, N): which of the keys first ... stop - 1 each query start ... stop - 1 sees."""
    query, key = torch.arange(start, stop, device=device).unsqueeze(1), torch.arange(first, stop, device=device)
    return (key <= query) & (key > query - (window or stop))
