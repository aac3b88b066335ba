"""What a part needs to remember, declared; the memory itself belongs to a pool outside the model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class PerToken:
    """An array with one (heads, size) entry per token; `dtype` None means that of the model's activations."""

    heads: int
    size: int
    dtype: torch.dtype | None = None

    def bytes(self, dtype: torch.dtype) -> int:
        """Bytes per token."""
        return self.heads * self.size * (self.dtype or dtype).itemsize


@dataclass(frozen=True)
class StateSpec:
    """The state of one part.

    per_token: arrays that grow by one entry per token that reaches the part.
    window: how many of the newest tokens later queries can still see, or None for all; older ones may be forgotten.
    level: the resampler inside which the part lives, as its index, or -1 outside of all; tokens reach a part only if
        that resampler keeps them, so the lengths of different levels differ.
    """

    per_token: Mapping[str, PerToken]
    window: int | None = None
    level: int = -1

    def bytes(self, tokens: int, dtype: torch.dtype) -> int:
        """Bytes used by one sequence of which `tokens` tokens reached the part."""
        held = tokens if self.window is None else min(tokens, self.window)
        return held * sum(entry.bytes(dtype) for entry in self.per_token.values())
