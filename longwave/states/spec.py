"""The declaration of what a part has to remember of a sequence; the memory itself lies in a store outside the model."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from longwave.states.memory import Store


@dataclass(frozen=True)
class PerToken:
    """An array with one (heads, size) entry per token; `dtype` None means that of the model's activations.

    width, every: an entry may sum up `width` tokens instead, a new one beginning every `every` tokens; it exists once
    all of its tokens do.
    """

    heads: int
    size: int
    dtype: torch.dtype | None = None
    width: int = 1
    every: int = 1

    @property
    def sums_up(self) -> bool:
        """Whether entries are made of several tokens, or not of all."""
        return (self.width, self.every) != (1, 1)

    @property
    def ahead(self) -> int:
        """How many strides (of `every` tokens) lie between an entry's first token and its last."""
        return (self.width - 1) // self.every

    def count(self, tokens: int) -> int:
        """Entries of `tokens` tokens."""
        return max(0, (tokens - self.width) // self.every + 1)

    def bytes(self, tokens: int, dtype: torch.dtype) -> int:
        """Bytes of the entries of `tokens` tokens."""
        return self.count(tokens) * self.heads * self.size * (self.dtype or dtype).itemsize


@dataclass(frozen=True)
class PerSequence:
    """An array of fixed shape that every token replaces; `dtype` None means that of the activations, at least fp32."""

    shape: tuple[int, ...]
    dtype: torch.dtype | None = None

    def of(self, dtype: torch.dtype) -> torch.dtype:
        """Its type in a model whose activations are `dtype`."""
        return self.dtype or torch.promote_types(dtype, torch.float32)

    def bytes(self, dtype: torch.dtype) -> int:
        """Bytes of one sequence."""
        return math.prod(self.shape) * self.of(dtype).itemsize


@dataclass(frozen=True)
class StateSpec:
    """The state of one part.

    per_token: arrays that grow with the tokens that reach the part.
    window: how many of the newest tokens later queries can still see, or None for all; older ones may be forgotten.
    level: the resampler inside which the part lives, as its index, or -1 outside of all; tokens reach a part only if
        that resampler keeps them, so the lengths of different levels differ.
    per_sequence: arrays that do not grow; a token that they have taken in cannot be taken out again.
    places: the per-token array, if any, that holds each token's place in its sequence; by it a level is truncated.
    store: where it is kept; `Extents` by default.
    """

    per_token: Mapping[str, PerToken] = field(default_factory=dict)
    window: int | None = None
    level: int = -1
    per_sequence: Mapping[str, PerSequence] = field(default_factory=dict)
    places: str | None = None
    store: type[Store] | None = None

    @property
    def forgets(self) -> bool:
        """Whether returning to an earlier token needs a copy that was made there."""
        return self.window is not None or bool(self.per_sequence)

    def bytes(self, tokens: int, dtype: torch.dtype) -> int:
        """Bytes used by one sequence of which `tokens` tokens reached the part."""
        held = tokens if self.window is None else min(tokens, self.window)
        fixed = sum(entry.bytes(dtype) for entry in self.per_sequence.values()) if tokens else 0
        return fixed + sum(entry.bytes(held, dtype) for entry in self.per_token.values())
