"""Where a text is cheap and where it is dear: the FLOPs of each of its tokens, from the blocks' own formulas.

What counts is the layers. The logits cost the same for every token, and only where they are needed.
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
class Spending:
    """FLOPs of the layers for each of T tokens.

    spent: as it ran, every block at the context that its level remembered by then. dense: if no level had left anything
    out. head: FLOPs of one row of logits, which neither counts.
    """

    spent: Float64[Tensor, " T"]
    dense: Float64[Tensor, " T"]
    head: int


@dataclass(frozen=True)
class Passage:
    """Tokens start ... stop - 1 of a text: FLOPs per token, and what share of the dense model's that is."""

    start: int
    stop: int
    spent: float
    share: float


def spending(model: Decoder, levels: Sequence[LevelTrace], tokens: int) -> Spending:
    """The FLOPs of every token, given what each level kept: a block sees a token if its level did."""
    places = {-1: torch.arange(tokens), **{level.index: level.places[level.kept] for level in levels}}
    spent, dense = torch.zeros(2, tokens, dtype=torch.float64)
    for block in model.blocks:
        reached = places[block.site.level]
        after = torch.tensor([block.decode_flops(context) for context in range(tokens)], dtype=torch.float64)
        spent[reached] += after[: len(reached)]  # the n-th token of a level follows n others
        dense += after
    return Spending(spent, dense, model.head_flops())


def extremes(costs: Spending, size: int, count: int) -> tuple[list[Passage], list[Passage]]:
    """The `count` cheapest and dearest passages of `size` tokens, by their share of the dense model's cost.

    They do not overlap. A share, because more context makes every token dearer: by FLOPs alone the last passage would
    always be the dearest.
    """
    pieces = [slice(start, start + size) for start in range(0, len(costs.spent) - size + 1, size)]
    passages = [_passage(costs, piece) for piece in pieces]
    ordered = sorted(passages, key=lambda one: one.share)
    count = min(count, len(ordered) // 2)
    return ordered[:count], ordered[len(ordered) - count :][::-1]


def _passage(costs: Spending, piece: slice) -> Passage:
    spent, dense = float(costs.spent[piece].mean()), float(costs.dense[piece].mean())
    return Passage(piece.start, piece.stop, spent, spent / dense)
