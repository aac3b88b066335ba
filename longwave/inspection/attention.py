"""Where attention goes in chosen blocks while a text runs through a model.

Forward hooks hand the inputs of a mixer to its own projections, so nothing on the model's path knows of this, and a
block's weights exist a chunk of queries at a time.

Legend: `N` tokens that reach the block, `H` heads, `C` cells of a map along either side.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from longwave.layers.block import Block
from longwave.mixers import FullAttention
from longwave.model import Decoder
from longwave.ops.attention.weights import attention_weights

CELLS = 256  # the most cells along either side of a map


@dataclass(frozen=True)
class AttentionMap:
    """One head, or the mean of all (None): the share of its attention that a cell of queries gives a cell of keys."""

    head: int | None
    cells: Float[Tensor, "C C"]


@dataclass(frozen=True)
class BlockAttention:
    """Where attention goes in one block.

    depth: the block. places: where its tokens stand in the text. received: the weight that each token gets, as the mean
    over heads and over the queries that can see it. viewers: how many those are. edges: the first token of each cell
    of the maps, and N at the end.
    """

    depth: int
    places: Int64[Tensor, " N"]
    received: Float[Tensor, " N"]
    viewers: Int64[Tensor, " N"]
    edges: tuple[int, ...]
    maps: tuple[AttentionMap, ...]

    @property
    def first_share(self) -> float:
        """The share of all attention that the first token gets, where it often goes for want of anything better."""
        return float(self.received[0] * self.viewers[0] / self.viewers.numel()) if self.viewers.numel() else 0.0


@contextmanager
def watching_attention(
    model: Decoder, depths: Collection[int], heads: Sequence[int | None] = ()
) -> Iterator[dict[int, BlockAttention]]:
    """Watches blocks while one text runs through the model; what is found stands under their depth.

    heads: those to draw maps of, None for the mean of all. Blocks without softmax attention are passed over, and one
    that no token reaches finds nothing.
    """
    found: dict[int, BlockAttention] = {}
    hooks = []
    for block in model.blocks:
        if block.site.depth in depths and isinstance(block.mixer, FullAttention):
            hooks.append(block.mixer.register_forward_pre_hook(_Watch(block, heads, found)))
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


@dataclass
class _Watch:
    block: Block
    heads: Sequence[int | None]
    found: dict[int, BlockAttention]

    def __call__(self, mixer: nn.Module, inputs: tuple[Any, ...]) -> None:
        hidden, stream = inputs[:2]
        assert isinstance(mixer, FullAttention)
        query, key = mixer.queries_and_keys(hidden, stream)
        tally = _Tally(query.shape[0], self.heads)
        for start, first, weights in attention_weights(query, key, window=mixer.window, scale=mixer.scale):
            tally.add(start, first, weights.cpu())
        self.found[self.block.site.depth] = tally.result(self.block.site.depth, stream.order.cpu(), mixer.window)


class _Tally:
    """Adds weights up by key and by cell."""

    def __init__(self, tokens: int, heads: Sequence[int | None]) -> None:
        self.heads, self.cells = heads, min(tokens, CELLS)
        self.cell_of = torch.arange(tokens) * self.cells // max(tokens, 1)
        self.sums = torch.zeros(tokens, dtype=torch.float64)
        self.maps = torch.zeros(len(heads), self.cells, self.cells, dtype=torch.float64)

    def add(self, start: int, first: int, weights: Float[Tensor, "H Q K"]) -> None:
        mean = weights.mean(0)
        rows, columns = slice(start, start + mean.shape[0]), slice(first, first + mean.shape[1])
        self.sums[columns] += mean.sum(0)
        for place, head in enumerate(self.heads):
            chosen = mean if head is None else weights[head]
            by_key = chosen.new_zeros(chosen.shape[0], self.cells).index_add_(1, self.cell_of[columns], chosen)
            self.maps[place].index_add_(0, self.cell_of[rows], by_key.double())

    def result(self, depth: int, places: Tensor, window: int | None) -> BlockAttention:
        tokens = self.sums.numel()
        viewers = tokens - torch.arange(tokens)
        viewers = viewers if window is None else viewers.clamp(max=window)
        sizes = torch.bincount(self.cell_of, minlength=self.cells)
        shares = zip(self.heads, self.maps / sizes.unsqueeze(1), strict=True)
        maps = tuple(AttentionMap(head, cells) for head, cells in shares)
        edges = (0, *sizes.cumsum(0).tolist())
        return BlockAttention(depth, places, self.sums / viewers, viewers, edges, maps)
