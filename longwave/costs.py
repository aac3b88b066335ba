"""Costs of a model, computed from formulas: parameters, FLOPs, state bytes and bytes read, of each part and in all.

By the field's convention only matrix products and visible pairs of attention count as FLOPs; element-wise work (norms,
rotation, softmax, the score of a resampler) is left out.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import nn


@dataclass(frozen=True)
class Cost:
    """The cost of one part, or of several of a kind together, at a context of `n` tokens.

    kind: name of the kind of part, such as "mlp". parameters: number of weights.
    prefill_flops: FLOPs of a sequence of n tokens. unlearned_flops: the part of them that has no backward pass.
    decode_flops, decode_bytes: expected FLOPs and expected bytes read (weights and state) of the token after n others.
    state_bytes: bytes of state after n tokens. parts: number of parts added up.
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
    """The conditions under which a layer's costs are asked for.

    tokens: context that reaches the layer. dtype: of weights and activations. chance: the probability that a new token
    reaches the layer. kept: share of tokens that a resampler keeps, by its index; its nominal retention by default.
    """

    tokens: int
    dtype: torch.dtype
    chance: float = 1.0
    kept: Mapping[int, float] = field(default_factory=dict[int, float])

    def inside(self, tokens: int, share: float) -> At:
        """The conditions inside a bracket that lets `tokens` of the context in, and a new token with chance `share`."""
        return replace(self, tokens=tokens, chance=self.chance * share)


@dataclass(frozen=True)
class Peaks:
    """A machine's highest rates: of reading memory (bytes per second) and of a matrix product (FLOPs per second)."""

    bandwidth: float
    flops: float


@dataclass(frozen=True)
class Work:
    """The FLOPs of an operation, and the bytes that it has to read."""

    flops: float
    bytes: float

    def seconds(self, peaks: Peaks) -> float:
        """The least time that the work can take: the longer of computing and reading (roofline model)."""
        return max(self.flops / peaks.flops, self.bytes / peaks.bandwidth)

    def __add__(self, other: Work) -> Work:
        return Work(self.flops + other.flops, self.bytes + other.bytes)


def total(costs: Iterable[Cost], kind: str = "total") -> Cost:
    """The sum of the costs, under the given kind."""
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
    """The number of parameters of a module; shared parameters count once."""
    return sum(parameter.numel() for parameter in module.parameters())


def weight_bytes(parameters: int, dtype: torch.dtype) -> int:
    """The size of so many weights, in bytes."""
    return parameters * dtype.itemsize


def visible_pairs(tokens: int, window: int | None = None) -> int:
    """The number of pairs of a query and a key that it sees, in causal attention over a sequence of `tokens`.

    window: keys of a sliding window, the query's own included; None for all.
    """
    seen = min(window or tokens, tokens)
    return seen * (seen + 1) // 2 + (tokens - seen) * seen
