"""The sizes of block-sparse attention, and the compressed keys by which blocks are scored.

A compressed key is the mean of a window of `width` keys, and a window begins every `stride` keys.

Legend: `N` keys of one run, `G` KV heads, `K` head size, `n` compressed keys.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from longwave.errors import require


@dataclass(frozen=True)
class Geometry:
    """The sizes that decide which keys a query sees (InfLLM-V2, arXiv 2509.24663).

    kernel_size, stride: width and distance, in keys, of the windows of fine compressed keys.
    block_size: keys of a block. topk: number of blocks that a query sees, forced ones included.
    init_blocks: number of blocks at the start of a run that every query sees. local_blocks: number of blocks just
    before its own that a query always sees (its sliding window).
    """

    kernel_size: int
    stride: int
    block_size: int
    init_blocks: int
    local_blocks: int
    topk: int

    coarser: ClassVar[int] = 4  # coarse windows are so many times as wide and as far apart as fine ones

    def __post_init__(self) -> None:
        least = {"kernel_size": 1, "stride": 1, "block_size": 1, "init_blocks": 0, "local_blocks": 0, "topk": 1}
        for name, lowest in least.items():
            require(getattr(self, name) >= lowest, f"{name} = {getattr(self, name)}: {lowest} or more")
        twice, whole = 2 * self.stride, self.block_size % self.stride == 0
        require(self.kernel_size == twice, f"kernel_size = {self.kernel_size}: twice the stride, {twice}, would do")
        require(whole, f"block_size = {self.block_size}: a multiple of the stride, {self.stride}, would do")
        require(self.topk >= self.forced, f"topk = {self.topk}: init_blocks + local_blocks + 1 = {self.forced} or more")

    @property
    def forced(self) -> int:
        """The number of blocks that are always seen: the first ones, the query's own, and the ones just before it."""
        return self.init_blocks + self.local_blocks + 1

    def dense(self, below: int) -> int:
        """The first place at which a query chooses blocks; all queries before it see all of their context.

        below: the least number of tokens of context, the query's own included, at which to choose.
        """
        return max(self.topk * self.block_size, below - 1)

    @property
    def strides(self) -> int:
        """r, the number of strides in a block: the fine windows r b - 1 ... r b + r - 1 overlap block b."""
        return self.block_size // self.stride

    @property
    def fine(self) -> tuple[int, int]:
        """Width and stride of the fine windows, by which blocks are scored."""
        return self.kernel_size, self.stride

    @property
    def coarse(self) -> tuple[int, int]:
        """Width and stride of the coarse windows, which give the softmax's denominator."""
        return self.coarser * self.kernel_size, self.coarser * self.stride


def compressed_count(tokens: int, width: int, stride: int) -> int:
    """The number of compressed keys (complete windows) of so many tokens; a query at place t sees those of t + 1."""
    return max(0, (tokens - width) // stride + 1)


def attended_pairs(tokens: int, geometry: Geometry, dense_below: int = 0) -> int:
    """The number of pairs of a query and a key that it attends to, in a run of so many tokens."""
    dense, size = min(tokens, geometry.dense(dense_below)), geometry.block_size
    late = (tokens - dense) * ((geometry.topk - 1) * size + 1) + _places(tokens, size) - _places(dense, size)
    return dense * (dense + 1) // 2 + late


def scored_pairs(tokens: int, geometry: Geometry, dense_below: int = 0, exact: bool = False) -> int:
    """The number of pairs of a query and a compressed key that it is compared with; coarse ones only unless `exact`."""
    dense = min(tokens, geometry.dense(dense_below))
    sizes = (geometry.fine,) if exact else (geometry.fine, geometry.coarse)
    return sum(_summed_counts(tokens, *size) - _summed_counts(dense, *size) for size in sizes)


def _places(tokens: int, size: int) -> int:
    """The sum over the first `tokens` tokens of their places within their blocks."""
    whole, rest = divmod(tokens, size)
    return whole * (size * (size - 1) // 2) + rest * (rest - 1) // 2


def _summed_counts(tokens: int, width: int, stride: int) -> int:
    """The sum of `compressed_count` over 1, 2, ..., `tokens` tokens."""
    whole, rest = divmod(max(0, tokens - width + 1), stride)
    return stride * whole * (whole + 1) // 2 + rest * (whole + 1)


@torch.no_grad()
def compress(keys: Float[Tensor, "G N K"], width: int, stride: int) -> Float[Tensor, "G n K"]:
    """The compressed keys: means of all complete windows of `width` keys (a multiple of `stride`), one every `stride`.

    Sums are in fp32 or wider and always in the same order, so that a compressed key is the same to the bit whatever
    keys
    follow its window, and at whichever multiple of the stride the given keys begin: appending to a state changes none.
    """
    count, strides = compressed_count(keys.shape[1], width, stride), width // stride
    if not count:
        return keys[:, :0]
    # Windows overlap: sums of single strides first, and then each window from the sums of its strides.
    pieces = keys[:, : (count - 1 + strides) * stride].unflatten(1, (-1, stride))
    sums = pieces[:, :, 0].to(torch.promote_types(keys.dtype, torch.float32), copy=True)
    for i in range(1, stride):
        sums += pieces[:, :, i]
    totals = sums[:, :count].clone()
    for i in range(1, strides):
        totals += sums[:, i : i + count]
    return totals.div_(width).to(keys.dtype)
