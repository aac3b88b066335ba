"""How runs are cut into chunks, and the decays within and between them.

Legend: `N` chunks, `C` tokens of a chunk, `T` tokens, `R` runs, `H` heads, `E` 1 or N.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor


class Chunks:
    """Runs cut into chunks of `size` tokens, the last of a run padded with zeros.

    Chunks are laid out by their number within the run, the first of every run before all second ones, and runs by how
    many they have: those that still have a chunk number i are then neighbours, and a scan over i takes slices.
    """

    def __init__(self, lengths: Sequence[int], size: int, device: torch.device) -> None:
        self.lengths, self.size, self.device = lengths, size, device
        counts = [-(-length // size) for length in lengths]
        self.runs = sorted(range(len(lengths)), key=lambda run: -counts[run])
        most = max(counts, default=0)
        self.active = [sum(count > number for count in counts) for number in range(most)]
        self.count = sum(counts)
        filled = [length for length in lengths if length]
        self.plain = len(filled) == 1  # one run lies as it is, but for padding at its end
        self.tokens = sum(lengths)

    @property
    def bounds(self) -> list[tuple[int, int]]:
        """Where the chunks of each number begin, and how many there are."""
        begins, begin = [], 0
        for active in self.active:
            begins.append((begin, active))
            begin += active
        return begins

    @cached_property
    def filled(self) -> Int64[Tensor, " N"]:
        """Tokens of each chunk that are no padding."""
        left = [
            min(self.size, self.lengths[run] - number * self.size)
            for number, active in enumerate(self.active)
            for run in self.runs[:active]
        ]
        return torch.tensor(left, device=self.device)

    @cached_property
    def places(self) -> Int64[Tensor, " T"]:
        """The row of the padded chunks that each token goes to."""
        begins = [begin for begin, _ in self.bounds]
        rank = {run: rank for rank, run in enumerate(self.runs)}
        pieces = [
            torch.arange(min(self.size, length - start), device=self.device)
            + (begins[start // self.size] + rank[run]) * self.size
            for run, length in enumerate(self.lengths)
            for start in range(0, length, self.size)
        ]
        return torch.cat(pieces)

    def cut(self, tokens: Tensor) -> Tensor:
        """(T, ...) -> (N, C, ...), zeros where there is no token."""
        rows = self.count * self.size
        if not self.plain:
            laid = tokens.new_zeros(rows, *tokens.shape[1:]).index_copy_(0, self.places, tokens)
        elif rows > tokens.shape[0]:
            laid = F.pad(tokens, (0, 0) * (tokens.ndim - 1) + (0, rows - tokens.shape[0]))
        else:
            laid = tokens
        return laid.unflatten(0, (self.count, self.size))

    def join(self, chunks: Tensor) -> Tensor:
        """(N, C, ...) -> (T, ...)."""
        rows = chunks.flatten(0, 1)
        return rows[: self.tokens] if self.plain else rows.index_select(0, self.places)


@dataclass(frozen=True)
class Decays:
    """Every decay that a chunk needs; each is exp of something that is at most 0, so nothing overflows.

    within: from before the chunk to each of its tokens. since: from each token to each later one, 0 to earlier ones.
    until: from each token to the end of the chunk. whole: over the chunk.
    """

    within: Float[Tensor, "E H C 1"]
    since: Float[Tensor, "E H C C"]
    until: Float[Tensor, "N H C 1"]
    whole: Float[Tensor, "N H 1 1"]

    @classmethod
    def of(cls, log_decay: Float[Tensor, "E H"], chunks: Chunks, constant: bool) -> Decays:
        """log_decay: (1, H) if `constant`, otherwise (T, H), added up in double precision. Padding does not decay."""
        size, filled, exact = chunks.size, chunks.filled, log_decay.double()
        if constant:
            steps = torch.arange(1, size + 1, device=log_decay.device)
            total = exact.T.unsqueeze(0) * steps.view(1, 1, -1)  # (1, H, C)
            last = exact.unsqueeze(2) * filled.view(-1, 1, 1)  # (N, H, 1)
        else:
            total = chunks.cut(exact).cumsum(1).transpose(1, 2)  # (N, H, C)
            last = total[..., -1:]
        later = torch.ones(size, size, dtype=torch.bool, device=log_decay.device).triu(1)
        between = (total.unsqueeze(3) - total.unsqueeze(2)).clamp(max=0).masked_fill(later, -torch.inf)
        exponents = (total.unsqueeze(3), between, (last - total).clamp(max=0).unsqueeze(3), last.unsqueeze(3))
        return cls(*(exponent.to(log_decay.dtype).exp() for exponent in exponents))
