"""The sizes of block-sparse attention, and the compressed keys that blocks are scored by.

Legend: `N` keys of one run, `G` KV heads, `K` head size, `n` windows.
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
    """Which keys a query sees: `topk` blocks of `block_size` keys, forced ones included (InfLLM-V2, arXiv 2509.24663).

    kernel_size, stride: keys of a fine window, and between the starts of two. init_blocks: blocks at the start that
    every query sees. local_blocks: blocks before its own that it sees (the window in keys / block_size).
    """

    kernel_size: int
    stride: int
    block_size: int
    init_blocks: int
    local_blocks: int
    topk: int

    coarser: ClassVar[int] = 4  # times as wide and as far apart as the fine windows are the coarse ones

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
        """Blocks that are always seen: the first ones, the query's own, and those before it."""
        return self.init_blocks + self.local_blocks + 1

    def dense(self, below: int) -> int:
        """The place from which on a query chooses, where those whose context is shorter than `below` see everything."""
        return max(self.topk * self.block_size, below - 1)

    @property
    def strides(self) -> int:
        """Strides of a block; windows r b - 1 ... r b + r - 1 overlap block b, r being these."""
        return self.block_size // self.stride

    @property
    def fine(self) -> tuple[int, int]:
        """Width and stride of the windows that score blocks."""
        return self.kernel_size, self.stride

    @property
    def coarse(self) -> tuple[int, int]:
        """Width and stride of the windows that make the softmax's denominator."""
        return self.coarser * self.kernel_size, self.coarser * self.stride


def compressed_count(tokens: int, width: int, stride: int) -> int:
    """How many complete windows so many tokens hold; those that a query at place t sees are of t + 1 tokens."""
    return max(0, (tokens - width) // stride + 1)


def attended_pairs(tokens: int, geometry: Geometry, dense_below: int = 0) -> int:
    """Pairs of a query and a key that it attends to, in a run of so many tokens."""
    dense, size = min(tokens, geometry.dense(dense_below)), geometry.block_size
    late = (tokens - dense) * ((geometry.topk - 1) * size + 1) + _places(tokens, size) - _places(dense, size)
    return dense * (dense + 1) // 2 + late


def scored_pairs(tokens: int, geometry: Geometry, dense_below: int = 0, exact: bool = False) -> int:
    """Pairs of a query and a window, fine or (but for an exact denominator) coarse, that it is compared with."""
    dense = min(tokens, geometry.dense(dense_below))
    sizes = (geometry.fine,) if exact else (geometry.fine, geometry.coarse)
    return sum(_summed_counts(tokens, *size) - _summed_counts(dense, *size) for size in sizes)


def _places(tokens: int, size: int) -> int:
    """How far each of the first tokens stands into its block, added up."""
    whole, rest = divmod(tokens, size)
    return whole * (size * (size - 1) // 2) + rest * (rest - 1) // 2


def _summed_counts(tokens: int, width: int, stride: int) -> int:
    """The complete windows of 1, 2, ... tokens, added up."""
    whole, rest = divmod(max(0, tokens - width + 1), stride)
    return stride * whole * (whole + 1) // 2 + rest * (whole + 1)


@torch.no_grad()
def compress(keys: Float[Tensor, "G N K"], width: int, stride: int) -> Float[Tensor, "G n K"]:
    """The means of all complete windows of `width` keys, a multiple of `stride`, one each `stride`.

    Summed in fp32 or better, always in one order: an entry is the same to the bit whatever follows its window, and from
    whichever place of the run, a multiple of the stride, the keys begin.
    """
    count, strides = compressed_count(keys.shape[1], width, stride), width // stride
    if not count:
        return keys[:, :0]
    pieces = keys[:, : (count - 1 + strides) * stride].unflatten(1, (-1, stride))
    sums = pieces[:, :, 0].to(torch.promote_types(keys.dtype, torch.float32), copy=True)
    for i in range(1, stride):
        sums += pieces[:, :, i]
    totals = sums[:, :count].clone()
    for i in range(1, strides):
        totals += sums[:, i : i + count]
    return totals.div_(width).to(keys.dtype)
