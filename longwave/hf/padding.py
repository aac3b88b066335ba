"""Padding: a padded batch becomes a stream without pads, and hidden states become a padded batch again.

Legend: `B` sequences, `N` columns of the batch (pads included), `T` tokens, `D` hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from longwave.errors import UserError
from longwave.hf.cache import LongwaveCache
from longwave.stream import Stream, Windows


@dataclass(frozen=True)
class Columns:
    """Which columns of a batch hold tokens, on whichever side the pads are."""

    real: Bool[Tensor, "B N"]

    @classmethod
    def of(cls, input_ids: Int64[Tensor, "B N"], attention_mask: Tensor | None) -> Columns:
        """attention_mask: (B, N), or wider by what a cache has seen; 0 marks a pad. UserError for another shape."""
        if attention_mask is None:
            return cls(torch.ones_like(input_ids, dtype=torch.bool))
        rows, columns = input_ids.shape
        if attention_mask.ndim != 2 or attention_mask.shape[0] != rows or attention_mask.shape[1] < columns:
            shape = list(attention_mask.shape)
            raise UserError(f"attention_mask has shape {shape}; expected [{rows}, {columns} or more]")
        return cls(attention_mask[:, -columns:].bool().to(input_ids.device))

    @cached_property
    def lengths(self) -> list[int]:
        """Tokens of each row."""
        return self.real.sum(1).tolist()

    @cached_property
    def all_real(self) -> bool:
        return sum(self.lengths) == self.real.numel()

    def unpad(self, values: Tensor) -> Tensor:
        """(B, N, ...) -> (T, ...), row after row."""
        return values.flatten(0, 1) if self.all_real else values[self.real.to(values.device)]

    def pad(self, hidden: Float[Tensor, "T D"], before: Float[Tensor, "B D"]) -> Float[Tensor, "B N D"]:
        """At every column the hidden state of the row's last token up to there: `before` where there is none yet."""
        if self.all_real:
            return hidden.unflatten(0, self.real.shape)
        return torch.cat([before.to(hidden), hidden])[self._places().to(hidden.device)]

    def _places(self) -> Int64[Tensor, "B N"]:
        lengths, seen = self.real.sum(1), self.real.cumsum(1)
        begins = len(self.real) + lengths.cumsum(0) - lengths
        before = torch.arange(len(self.real), device=self.real.device).unsqueeze(1)
        return torch.where(seen > 0, begins.unsqueeze(1) + seen - 1, before)

    def following(self, labels: Int64[Tensor, "B N"], ignored: int) -> Int64[Tensor, " T"]:
        """The label of the next token of each token's row; `ignored` for the last of a row."""
        labels = self.unpad(labels).roll(-1)
        ends = torch.tensor(self.lengths).cumsum(0) - 1
        labels[ends[ends >= 0].to(labels.device)] = ignored
        return labels

    def stream(
        self, position_ids: Tensor | None, cache: LongwaveCache | None, samples: tuple[int, ...], device: torch.device
    ) -> Stream:
        """The stream of the batch: every row is a run and a training window.

        position_ids: (B, N); without a cache a row may hold several documents, each counted from 0, which attention
        then keeps apart. samples: the index of each row in the step, which keys its draws. UserError for positions
        that do not count the tokens of a document.
        """
        if cache is not None:
            stream = cache.state.stream(self.lengths)
        else:
            documents = self.lengths if position_ids is None else self._documents(self._flat(position_ids))
            stream = Stream.of(documents, windows=Windows(tuple(self.lengths), samples), device=device)
        if position_ids is not None and not torch.equal(self._flat(position_ids).to(stream.order), stream.order):
            raise UserError("position_ids do not count 0, 1, 2, ... within each document (or on from the cache)")
        return stream

    def _flat(self, position_ids: Tensor) -> Int64[Tensor, " T"]:
        return self.unpad(position_ids.expand_as(self.real))

    def _documents(self, positions: Int64[Tensor, " T"]) -> list[int]:
        """Tokens of each document, a row beginning one whatever its position."""
        begins = positions == 0
        starts = torch.tensor([0, *self.lengths[:-1]]).cumsum(0)
        begins[starts[torch.tensor(self.lengths) > 0].to(begins.device)] = True
        places = begins.nonzero().flatten().tolist()
        return [end - start for start, end in zip(places, [*places[1:], len(positions)], strict=True)]
