"""Costs, known before they are paid: what each part of a model takes in parameters, FLOPs, state and memory traffic.

FLOPs are those of matrix products and of visible attention pairs, the field's convention; element-wise work (norms,
rotation, softmax, the score of a resampler) is left out.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import nn


@dataclass(frozen=True)
class Cost:
    """One part, or the sum of several of a kind, at a given context of `n` tokens.

    kind: what the part is. parameters: its weights. prefill_flops: FLOPs of a sequence of n tokens. decode_flops:
    expected FLOPs of the token after n others. decode_bytes: expected bytes it reads, weights and state.
    state_bytes: bytes remembered of n tokens. unlearned_flops: those of prefill_flops that have no backward pass.
    parts: how many were added up.
    """

    kind: str
    parameters: int = 0
    prefill_flops: int = 0
    decode_flops: float = 0
    decode_bytes: float = 0
    state_bytes: int = 0
    unlearned_flops: int = 0
    parts: int = 1

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.kind,
            self.parameters + other.parameters,
            self.prefill_flops + other.prefill_flops,
            self.decode_flops + other.decode_flops,
            self.decode_bytes + other.decode_bytes,
            self.state_bytes + other.state_bytes,
            self.unlearned_flops + other.unlearned_flops,
            self.parts + other.parts,
        )


@dataclass(frozen=True)
class At:
    """Where costs are asked for: at a context of `tokens` that a layer meets, with weights and activations in `dtype`.

    chance: that a new token gets there. kept: by the index of a resampler, the share of its tokens that it really
    keeps; its nominal retention by default.
    """

    tokens: int
    dtype: torch.dtype
    chance: float = 1.0
    kept: Mapping[int, float] = field(default_factory=dict[int, float])

    def inside(self, tokens: int, share: float) -> At:
        """Within a bracket that lets `tokens` of these in, and a new one with the chance `share`."""
        return replace(self, tokens=tokens, chance=self.chance * share)


@dataclass(frozen=True)
class Peaks:
    """A machine's best at reading (bytes per second) and at a matrix product (FLOPs per second)."""

    bandwidth: float
    flops: float


@dataclass(frozen=True)
class Work:
    """FLOPs, and bytes that have to be read."""

    flops: float
    bytes: float

    def seconds(self, peaks: Peaks) -> float:
        """The least time it takes."""
        return max(self.flops / peaks.flops, self.bytes / peaks.bandwidth)

    def __add__(self, other: Work) -> Work:
        return Work(self.flops + other.flops, self.bytes + other.bytes)


def total(costs: Iterable[Cost], kind: str = "total") -> Cost:
    """The sum of all."""
    result = Cost(kind, parts=0)
    for cost in costs:
        result += cost
    return result


def by_kind(costs: Iterable[Cost]) -> list[Cost]:
    """The costs added up by kind, in the order in which kinds first appear."""
    kinds: dict[str, Cost] = {}
    for cost in costs:
        kinds[cost.kind] = kinds[cost.kind] + cost if cost.kind in kinds else cost
    return list(kinds.values())


def count(module: nn.Module) -> int:
    """Parameters of a module; shared ones once."""
    return sum(parameter.numel() for parameter in module.parameters())


def weight_bytes(parameters: int, dtype: torch.dtype) -> int:
    """Bytes of so many weights."""
    return parameters * dtype.itemsize


def visible_pairs(tokens: int, window: int | None = None) -> int:
    """Pairs of a query and a key of a causal sequence, in which a query sees `window` keys, its own included."""
    seen = min(window or tokens, tokens)
    return seen * (seen + 1) // 2 + (tokens - seen) * seen
