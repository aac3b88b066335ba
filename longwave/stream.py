"""The stream: a batch of token runs laid end to end, without padding - the one data shape inside the model.

Legend: `T` tokens of the stream, `R` runs, `W` training windows, `O` rows whose outputs are needed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import accumulate

import torch
from jaxtyping import Int64
from torch import Tensor


@dataclass(frozen=True)
class Windows:
    """Training windows: groups of whole runs among which a resampler ranks its tokens.

    sizes: tokens of each window, in the order of the stream; they add up to T.
    samples: the index of each window in the data order, which keys its random draws.
    """

    sizes: tuple[int, ...]
    samples: tuple[int, ...]


@dataclass(frozen=True)
class Stream:
    """What the layers know about the rows of `hidden (T, D)`.

    lengths: tokens of each run, as host integers. A run is a piece of one sequence (in training, of one document), and
        attention never leaves it.
    order: each token's place in its sequence, which causality goes by.
    positions: what rotation goes by; the same tensor as `order` unless a position scheme says otherwise.
    slots: the state slot that each run continues, or None without a state.
    windows: the training windows, or None outside training.
    outputs: rows whose outputs are needed, or None for all.
    passengers: per-token tensors (T, ...) that travel along when a resampler gathers tokens.
    """

    lengths: tuple[int, ...]
    order: Int64[Tensor, " T"]
    positions: Int64[Tensor, " T"]
    slots: tuple[int, ...] | None = None
    windows: Windows | None = None
    outputs: Int64[Tensor, " O"] | None = None
    passengers: Mapping[str, Tensor] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        lengths: Sequence[int],
        *,
        starts: Sequence[int] | None = None,
        slots: Sequence[int] | None = None,
        windows: Windows | None = None,
        device: torch.device | str = "cpu",
    ) -> Stream:
        """A stream of runs, run `r` beginning at place `starts[r]` (0 by default) of its sequence."""
        pieces = zip(lengths, starts or [0] * len(lengths), strict=True)
        order = torch.cat([torch.arange(start, start + n, device=device) for n, start in pieces] or [torch.arange(0)])
        return cls(tuple(lengths), order, order, None if slots is None else tuple(slots), windows)

    @property
    def tokens(self) -> int:
        """T, the rows of the stream."""
        return sum(self.lengths)

    @cached_property
    def bounds(self) -> tuple[int, ...]:
        """Row where each run begins, and T at the end: R + 1 integers."""
        return (0, *accumulate(self.lengths))

    @cached_property
    def run_of_token(self) -> Int64[Tensor, " T"]:
        """The run that each row belongs to."""
        lengths = torch.tensor(self.lengths, device=self.order.device)
        return torch.repeat_interleave(torch.arange(len(self.lengths), device=self.order.device), lengths)

    def last_rows(self) -> Stream:
        """The same stream, with outputs needed at the last row of each run that has one."""
        rows = [end - 1 for end, length in zip(self.bounds[1:], self.lengths, strict=True) if length]
        return replace(self, outputs=torch.tensor(rows, device=self.order.device))

    def carrying(self, **passengers: Tensor) -> Stream:
        """The same stream with more passengers."""
        return replace(self, passengers={**self.passengers, **passengers})

    def gather(self, rows: Int64[Tensor, " K"], lengths: Sequence[int], windows: Windows | None = None) -> Stream:
        """The stream of the given rows (ascending), of which run `r` keeps `lengths[r]`; empty runs stay."""
        order = self.order.index_select(0, rows)
        positions = order if self.positions is self.order else self.positions.index_select(0, rows)
        passengers = {name: value.index_select(0, rows) for name, value in self.passengers.items()}
        return Stream(tuple(lengths), order, positions, self.slots, windows, None, passengers)
