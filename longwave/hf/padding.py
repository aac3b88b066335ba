"""From padded batches to streams without pads, and from hidden states of a stream back to a padded batch.

Legend: `B` sequences, `N` columns of the batch (pads included), `T` tokens, `D` hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Bool, Float, Int64, Shaped
from torch import Tensor

from longwave.errors import UserError
from longwave.hf.cache import LongwaveCache
from longwave.streams import Stream, Windows


@dataclass(frozen=True)
class Columns:
    """The tokens and pads of a padded batch. real: True where a column of a row holds a token; pads may be anywhere."""

    real: Bool[Tensor, "B N"]

    @classmethod
    def of(cls, inputs: Shaped[Tensor, "B N ..."], attention_mask: Tensor | None) -> Columns:
        """The columns that an attention mask describes; without a mask, all hold tokens.

        inputs: ids, labels or embedded tokens. attention_mask: (B, N), or with a cache (B, past + N); 0 marks a pad.
        Raises UserError for another shape.
        """
        rows, columns = inputs.shape[:2]
        if attention_mask is None:
            return cls(torch.ones(rows, columns, dtype=torch.bool, device=inputs.device))
        if attention_mask.ndim != 2 or attention_mask.shape[0] != rows or attention_mask.shape[1] < columns:
            shape = list(attention_mask.shape)
            raise UserError(f"attention_mask has shape {shape}; expected [{rows}, {columns} or more]")
        return cls(attention_mask[:, -columns:].bool().to(inputs.device))

    @cached_property
    def lengths(self) -> list[int]:
        """The number of tokens of each row."""
        return self.real.sum(1).tolist()

    @cached_property
    def all_real(self) -> bool:
        return sum(self.lengths) == self.real.numel()

    def unpad(self, values: Tensor) -> Tensor:
        """Drops the pads: (B, N, ...) -> (T, ...), row after row."""
        return values.flatten(0, 1) if self.all_real else values[self.real.to(values.device)]

    def pad(self, hidden: Float[Tensor, "T D"], before: Float[Tensor, "B D"]) -> Float[Tensor, "B N D"]:
        """The hidden states as a padded batch: at a pad, the state of the row's last token before it.

        before: the states of each row's last token before this batch, used at pads in front of its first token.
        """
        if self.all_real:
            return hidden.unflatten(0, self.real.shape)
        return torch.cat([before.to(hidden), hidden])[self._places().to(hidden.device)]

    def _places(self) -> Int64[Tensor, "B N"]:
        """For each column its row in `before` (B rows) and `hidden` (T rows) end to end."""
        lengths, seen = self.real.sum(1), self.real.cumsum(1)
        begins = len(self.real) + lengths.cumsum(0) - lengths
        before = torch.arange(len(self.real), device=self.real.device).unsqueeze(1)
        return torch.where(seen > 0, begins.unsqueeze(1) + seen - 1, before)

    def following(self, labels: Int64[Tensor, "B N"], ignored: int) -> Int64[Tensor, " T"]:
        """The target of each token: the label of the next token in its row, and `ignored` for the last of a row."""
        labels = self.unpad(labels).roll(-1)
        ends = torch.tensor(self.lengths).cumsum(0) - 1
        labels[ends[ends >= 0].to(labels.device)] = ignored
        return labels

    def stream(
        self, position_ids: Tensor | None, cache: LongwaveCache | None, samples: tuple[int, ...], device: torch.device
    ) -> Stream:
        """The stream of the batch, in which every row is a training window.

        position_ids: (B, N); without a cache a row may hold several documents, each with positions from 0, which become
        runs of their own. samples: the index of each row in the optimizer step, which keys its draws.
        Raises UserError for positions that do not count the tokens of a document.
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
        """The number of tokens of each document; one begins at every position 0, and at the start of every row."""
        begins = positions == 0
        starts = torch.tensor([0, *self.lengths[:-1]]).cumsum(0)
        begins[starts[torch.tensor(self.lengths) > 0].to(begins.device)] = True
        places = begins.nonzero().flatten().tolist()
        return [end - start for start, end in zip(places, [*places[1:], len(positions)], strict=True)]
