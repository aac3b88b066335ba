"""Runs cut into chunks of equal size for chunked linear attention, and the decays within and between chunks.

Legend: `N` chunks, `C` tokens of a chunk, `T` tokens, `R` runs, `H` heads, `E` 1 or N.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor


class Chunks:
    """Runs cut into chunks of `size` tokens, the last chunk of a run padded with zeros.

    Chunks are ordered by their number within the run: the first chunks of all runs, then all second ones, and so on;
    and within one number by run, runs with more chunks first. The runs that have a chunk number i are then neighbours
    in every number, so a scan over the numbers takes slices and needs no gather.
    lengths: tokens of each run, on the host. sizes: the same on the device, from which all index tensors are made.
    """

    def __init__(self, lengths: Sequence[int], sizes: Int64[Tensor, " R"], size: int) -> None:
        self.size, self.sizes, self.tokens = size, sizes, sum(lengths)
        counts = [-(-length // size) for length in lengths]
        self.active = [sum(count > number for count in counts) for number in range(max(counts, default=0))]
        self.count = sum(counts)
        self.plain = sum(length > 0 for length in lengths) == 1  # a single run: its chunks are its tokens in order

    @property
    def bounds(self) -> list[tuple[int, int]]:
        """For each number the index of its first chunk, and how many chunks have it."""
        return list(zip([0, *accumulate(self.active)], self.active, strict=False))

    @cached_property
    def _counts(self) -> Int64[Tensor, " R"]:
        """The number of chunks of each run."""
        return (self.sizes + (self.size - 1)) // self.size

    @cached_property
    def order(self) -> Int64[Tensor, " R"]:
        """The runs, in the order of their chunks: those with the most chunks first."""
        return self._counts.sort(descending=True, stable=True).indices

    @cached_property
    def _begins(self) -> Int64[Tensor, " numbers"]:
        """The index of the first chunk of each number, and at the end the number of all chunks."""
        numbers = torch.arange(len(self.active), device=self.sizes.device)
        active = (self._counts > numbers.unsqueeze(1)).sum(1)
        return F.pad(active.cumsum(0), (1, 0))

    @cached_property
    def filled(self) -> Int64[Tensor, " N"]:
        """The number of tokens of each chunk, padding not counted."""
        number = torch.repeat_interleave(self._begins.diff(), output_size=self.count)
        rank = torch.arange(self.count, device=number.device) - self._begins.index_select(0, number)
        run = self.order.index_select(0, rank)
        return (self.sizes.index_select(0, run) - number * self.size).clamp(max=self.size)

    @cached_property
    def places(self) -> Int64[Tensor, " T"]:
        """For each token its row in the padded chunks (N C rows)."""
        run = torch.repeat_interleave(self.sizes, output_size=self.tokens)
        starts = self.sizes.cumsum(0) - self.sizes
        place = torch.arange(self.tokens, device=run.device) - starts.index_select(0, run)
        rank = self.order.argsort().index_select(0, run)
        chunk = self._begins.index_select(0, place // self.size) + rank
        return chunk * self.size + place % self.size

    def cut(self, tokens: Tensor) -> Tensor:
        """Tokens to chunks: (T, ...) -> (N, C, ...), zeros where there is no token."""
        rows = self.count * self.size
        if not self.plain:
            laid = tokens.new_zeros(rows, *tokens.shape[1:]).index_copy_(0, self.places, tokens)
        elif rows > tokens.shape[0]:
            laid = F.pad(tokens, (0, 0) * (tokens.ndim - 1) + (0, rows - tokens.shape[0]))
        else:
            laid = tokens
        return laid.unflatten(0, (self.count, self.size))

    def join(self, chunks: Tensor) -> Tensor:
        """Chunks back to tokens: (N, C, ...) -> (T, ...)."""
        rows = chunks.flatten(0, 1)
        return rows[: self.tokens] if self.plain else rows.index_select(0, self.places)


@dataclass(frozen=True)
class Decays:
    """The decays within chunks, each the exponential of a number that is at most 0, so that nothing overflows.

    within: from before the chunk to each of its tokens. since: entry (t, s) from token s to token t; 0 for s > t.
    until: from each token to the end of the chunk. whole: over the whole chunk.
    """

    within: Float[Tensor, "E H C 1"]
    since: Float[Tensor, "E H C C"]
    until: Float[Tensor, "N H C 1"]
    whole: Float[Tensor, "N H 1 1"]

    @classmethod
    def of(cls, log_decay: Float[Tensor, "E H"], chunks: Chunks, constant: bool) -> Decays:
        """The decays of chunks, from log-decays (1, H) if `constant`, else (T, H). Padding does not decay.

        Log-decays are summed in double precision: differences of long sums would lose the digits of the slowest heads.
        """
        size, filled, exact = chunks.size, chunks.filled, log_decay.double()
        if constant:
            steps = torch.arange(1, size + 1, device=log_decay.device)
            total = exact.T.unsqueeze(0) * steps.view(1, 1, -1)  # (1, H, C)
            last = exact.unsqueeze(2) * filled.view(-1, 1, 1)  # (N, H, 1)
        else:
            total = chunks.cut(exact).cumsum(1).transpose(1, 2)  # (N, H, C)
            last = total[..., -1:]
        # The clamps keep rounding from turning a decay of nothing into a tiny growth.
        later = torch.ones(size, size, dtype=torch.bool, device=log_decay.device).triu(1)
        between = (total.unsqueeze(3) - total.unsqueeze(2)).clamp(max=0).masked_fill(later, -torch.inf)
        exponents = (total.unsqueeze(3), between, (last - total).clamp(max=0).unsqueeze(3), last.unsqueeze(3))
        return cls(*(exponent.to(log_decay.dtype).exp() for exponent in exponents))
