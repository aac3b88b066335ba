"""FLOPs of every token of a text, from the blocks' own formulas, and the passages that cost least and most.

Only the layers are counted: logits cost the same for every token, and are computed only where they are needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float64
from torch import Tensor

from longwave.inspection.trace import LevelTrace
from longwave.model import Decoder


@dataclass(frozen=True)
class TokenFlops:
    """FLOPs of the layers for each of T tokens.

    spent: as the model ran, each block at the context that its level remembered by then. dense: the same model if every
    level kept all tokens. head: FLOPs of one row of logits, which neither includes.
    """

    spent: Float64[Tensor, " T"]
    dense: Float64[Tensor, " T"]
    head: int


@dataclass(frozen=True)
class Passage:
    """Tokens start ... stop - 1 of a text. spent: FLOPs per token; share: of the dense model's FLOPs."""

    start: int
    stop: int
    spent: float
    share: float


def token_flops(model: Decoder, levels: Sequence[LevelTrace], tokens: int) -> TokenFlops:
    """The FLOPs of every token, given what each level kept: a block runs on the tokens that reach its level."""
    places = {-1: torch.arange(tokens), **{level.index: level.places[level.kept] for level in levels}}
    spent, dense = torch.zeros(2, tokens, dtype=torch.float64)
    for block in model.blocks:
        reached = places[block.site.level]
        after = torch.tensor([block.decode_flops(context) for context in range(tokens)], dtype=torch.float64)
        spent[reached] += after[: len(reached)]  # the n-th token of a level follows n others
        dense += after
    return TokenFlops(spent, dense, model.head_flops())


def extremes(flops: TokenFlops, size: int, count: int) -> tuple[list[Passage], list[Passage]]:
    """The `count` cheapest and dearest passages of `size` tokens, by their share of the dense model's cost.

    They do not overlap. Passages are compared by share because every token costs more than the one before it: by FLOPs
    alone the last passage would always be the dearest.
    """
    pieces = [slice(start, start + size) for start in range(0, len(flops.spent) - size + 1, size)]
    passages = [_passage(flops, piece) for piece in pieces]
    ordered = sorted(passages, key=lambda one: one.share)
    count = min(count, len(ordered) // 2)
    return ordered[:count], ordered[len(ordered) - count :][::-1]


def _passage(flops: TokenFlops, piece: slice) -> Passage:
    spent, dense = float(flops.spent[piece].mean()), float(flops.dense[piece].mean())
    return Passage(piece.start, piece.stop, spent, spent / dense)
