"""The attention weights of chosen blocks while a text runs through a model: sums by token, and maps.

Forward hooks compute queries and keys once more from a mixer's input, so the model itself needs no code for this. The
weights of a block exist for a chunk of queries at a time.

Legend: `N` tokens that reach the block, `H` heads, `C` cells of a map along either side.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor, nn

from longwave.blocks import Block
from longwave.mixers import FullAttention
from longwave.model import Decoder
from longwave.ops.attention.weights import attention_weights
from longwave.part import Site

CELLS = 256  # the most cells along either side of a map


@dataclass(frozen=True)
class AttentionMap:
    """The share of attention that each cell of queries gives each cell of keys. head: None for the mean of all."""

    head: int | None
    cells: Float[Tensor, "C C"]


@dataclass(frozen=True)
class BlockAttention:
    """The attention that the tokens of one block receive.

    depth, level, window: of the block. places: where its tokens stand in the text. received: a token's summed weight,
    as a multiple of the mean of tokens that are seen from the same distances. viewers: queries that can see a token.
    first_share: the first token's share of all attention. edges: the first token of each cell, and N.

    Why relative to the distances: fewer queries can see a later token, and most attention goes to near tokens. A sum
    over queries would favour early tokens, and a mean over the queries that can see a token the last ones.
    """

    depth: int
    level: int
    window: int | None
    places: Int64[Tensor, " N"]
    received: Float[Tensor, " N"]
    viewers: Int64[Tensor, " N"]
    first_share: float
    edges: tuple[int, ...]
    maps: tuple[AttentionMap, ...]


def softmax_of(block: Block) -> FullAttention | None:
    """The part of a block, if any, that is softmax attention in which every query weighs all tokens it can see."""
    return next((part for part in block.parts if isinstance(part, FullAttention) and part.sees_all), None)


def has_weights(block: Block) -> bool:
    """Whether there is such a part."""
    return softmax_of(block) is not None


@contextmanager
def watching_attention(
    model: Decoder, depths: Collection[int], heads: Sequence[int | None] = ()
) -> Iterator[dict[int, BlockAttention]]:
    """Records the attention of blocks while one text runs through the model, in a dict by the blocks' depths.

    heads: heads to draw maps of, None for the mean of all. Blocks without weights (see `has_weights`) and blocks that
    no token reaches have no entry.
    """
    found: dict[int, BlockAttention] = {}
    hooks = []
    for block in model.blocks:
        if block.site.depth in depths and (part := softmax_of(block)):
            hooks.append(part.register_forward_pre_hook(_Watch(heads, found)))
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


@dataclass
class _Watch:
    """A forward hook that tallies the attention of a mixer."""

    heads: Sequence[int | None]
    found: dict[int, BlockAttention]

    @torch.no_grad()
    def __call__(self, mixer: nn.Module, inputs: tuple[Any, ...]) -> None:
        hidden, stream = inputs[:2]
        assert isinstance(mixer, FullAttention)
        query, key = mixer.queries_and_keys(hidden, stream)
        tally = _Tally(query.shape[0], self.heads, mixer.pattern.window)
        for start, first, weights in attention_weights(query, key, window=mixer.pattern.window, scale=mixer.scale):
            tally.add(start, first, weights.cpu())
        self.found[mixer.site.depth] = tally.result(mixer.site, stream.order.cpu())


class _Tally:
    """Sums of attention weights by key, by distance and by cell."""

    def __init__(self, tokens: int, heads: Sequence[int | None], window: int | None) -> None:
        self.heads, self.cells, self.window = heads, min(tokens, CELLS), window
        self.cell_of = torch.arange(tokens) * self.cells // tokens
        self.sums, self.by_distance = torch.zeros(2, tokens, dtype=torch.float64)
        self.maps = torch.zeros(len(heads), self.cells, self.cells, dtype=torch.float64)

    def add(self, start: int, first: int, weights: Float[Tensor, "H Q K"]) -> None:
        mean = weights.mean(0)
        rows, columns = slice(start, start + mean.shape[0]), slice(first, first + mean.shape[1])
        self.sums[columns] += mean.sum(0)
        self.by_distance[: mean.shape[1]] += _along_diagonals(mean if first else mean.index_fill(1, torch.tensor(0), 0))
        for place, head in enumerate(self.heads):
            chosen = mean if head is None else weights[head]
            by_key = chosen.new_zeros(chosen.shape[0], self.cells).index_add_(1, self.cell_of[columns], chosen)
            self.maps[place].index_add_(0, self.cell_of[rows], by_key.double())

    def result(self, site: Site, places: Tensor) -> BlockAttention:
        tokens = self.sums.numel()
        viewers = (tokens - torch.arange(tokens)).clamp(max=self.window or tokens)
        received, first_share = self.sums / self._expected(), float(self.sums[0] / tokens)
        edges, maps = self._maps()
        return BlockAttention(site.depth, site.level, self.window, places, received, viewers, first_share, edges, maps)

    def _expected(self) -> Tensor:
        """The attention of each key if every query gave each distance its mean weight, without the first key."""
        tokens = self.sums.numel()
        typical = self.by_distance / (tokens - 1 - torch.arange(tokens)).clamp(min=1)
        return typical.cumsum(0).flip(0).clamp(min=1e-12)

    def _maps(self) -> tuple[tuple[int, ...], tuple[AttentionMap, ...]]:
        sizes = torch.bincount(self.cell_of, minlength=self.cells)
        shares = zip(self.heads, self.maps / sizes.unsqueeze(1), strict=True)
        return (0, *sizes.cumsum(0).tolist()), tuple(AttentionMap(head, cells) for head, cells in shares)


def _along_diagonals(weights: Float[Tensor, "Q K"]) -> Float64[Tensor, " K"]:
    """Sums of weights by the distance from query to key; the last query stands at the last key."""
    queries, keys = weights.shape
    padded = torch.nn.functional.pad(weights.flip(1), (0, queries - 1))
    return padded.as_strided((queries, keys), (keys + queries - 2, 1), queries - 1).sum(0, dtype=torch.float64)
