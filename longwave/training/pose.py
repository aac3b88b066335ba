"""PoSE: training windows at the positions of a longer window (Zhu et al. 2023, arXiv 2309.10400).

A piece of text of the short window is cut into chunks at random places, and every chunk but the first jumps ahead by a
random number of positions. Over many windows all distances of the long window are seen, for the time and memory of the
short one. Every document of a window is such a piece, since attention does not leave it.

Only rotation goes by these positions. Causality, sliding windows, blocks of keys, levels and decays go by the order of
the tokens (`streams.Stream`). Draws are keyed by the window's place in the data order: every time that a text comes, it
has jumps of its own, which no cut into micro-batches and no resumption changes.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from jaxtyping import Int64
from torch import Tensor

from longwave import draws
from longwave.config import Strict
from longwave.data.packed import Batch
from longwave.errors import require

_PURPOSE = zlib.crc32(b"pose")  # among the keys of draws


@dataclass(frozen=True)
class PoseConfig(Strict):
    """PoSE (arXiv 2309.10400): training windows have positions of a longer one.

    window: the longer window, in tokens: positions are below it. chunks: pieces of a document that keep together; each
    but the first jumps ahead.
    """

    window: int
    chunks: int = 2

    def __post_init__(self) -> None:
        require(self.window >= 1, f"pose.window = {self.window}: 1 token or more")
        require(2 <= self.chunks <= 1024, f"pose.chunks = {self.chunks}: 2 or more, at most 1024")


def with_jumps(batch: Batch, pose: PoseConfig, window: int, seed: int) -> Batch:
    """The batch with positions that jump. window: tokens of a training window. seed: of the run."""
    room = pose.window - window
    keys = ((draws.key(seed, _PURPOSE, *place), length) for *place, length in _runs(batch))
    return replace(batch, positions=torch.cat([jumping(length, pose.chunks, room, key) for key, length in keys]))


def jumping(length: int, chunks: int, room: int, key: int) -> Int64[Tensor, " length"]:
    """The positions of a document: from 0, rising by one, but for jumps that add up to at most `room`.

    Chunks end at uniform places; the sum of the jumps up to a chunk is uniform between the sum so far and `room`.
    """
    ends = sorted(1 + int(draws.uniform(key, 0, number) * (length - 1)) for number in range(1, chunks))
    positions, gone = torch.arange(length), 0
    for number, end in enumerate(ends):
        jump = int(draws.uniform(key, 1, number) * (room - gone + 1))
        positions[end:] += jump
        gone += jump
    return positions


def _runs(batch: Batch) -> Iterator[tuple[int, int, int]]:
    """Of every run the sample of its window, its number within the window, and its length."""
    lengths = iter(batch.runs)
    for sample, left in zip(batch.samples, batch.windows, strict=True):
        number = 0
        while left > 0:
            length = next(lengths)
            yield sample, number, length
            number, left = number + 1, left - length
