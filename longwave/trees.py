"""Trees of drafts: tokens at the end of a run on several paths, each of which sees its own path and no other.

A run is the text, and then drafts: each is put behind another draft, or behind the text. All run in one forward (tree
attention: SpecInfer, Miao et al. 2023, arXiv 2305.09781; Medusa, arXiv 2401.10774): a draft sees the text and the
drafts that lead to it, and stands at the place that it would have there.

A draft has a bit of its own, and knows the bits of its path. Both are numbers of their token, which travel with it when
a resampler takes some of the tokens: what is left of a tree is a tree, in which the nearest one kept leads to a draft.

Legend: `T` tokens of the stream, `L` tokens of a run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int64
from torch import Tensor

MOST_DRAFTS = 63  # of one tree, whose bits are those of an integer


@dataclass(frozen=True)
class Tree:
    """The drafts among the tokens of a stream. own: the bit of each; path: its bits and its own; 0 for the text."""

    own: Int64[Tensor, " T"]
    path: Int64[Tensor, " T"]

    def gather(self, rows: Int64[Tensor, " K"]) -> Tree:
        """The same of chosen rows."""
        return Tree(self.own.index_select(0, rows), self.path.index_select(0, rows))

    def visible(self, begin: int, end: int) -> Bool[Tensor, "L L"]:
        """Which tokens of a run, rows begin ... end - 1, each of them sees: what leads to it, and itself."""
        own, path = self.own[begin:end], self.path[begin:end]
        return ((own == 0) | (own & path.unsqueeze(1) != 0)).tril()


def depths(parents: Sequence[int]) -> list[int]:
    """How many drafts lead to each, itself included. parents: each one's, before it in the list; -1 for the text."""
    found = list[int]()
    for parent in parents:
        found.append(1 + (found[parent] if parent >= 0 else 0))
    return found


def paths(parents: Sequence[int]) -> list[int]:
    """The bits of the drafts that lead to each, its own included."""
    assert len(parents) <= MOST_DRAFTS
    found = list[int]()
    for number, parent in enumerate(parents):
        found.append(1 << number | (found[parent] if parent >= 0 else 0))
    return found


def chain(count: int) -> tuple[int, ...]:
    """The parents of drafts that follow each other."""
    return tuple(range(-1, count - 1))


def tree_of(lengths: Sequence[int], parents: Sequence[Sequence[int]], device: torch.device) -> tuple[Tree, Tensor]:
    """The tree of a stream, and how much earlier than its row says each token stands in its sequence.

    lengths: of the runs. parents: of the drafts at the end of each run.
    """
    own, path, early = list[int](), list[int](), list[int]()
    for length, its in zip(lengths, parents, strict=True):
        text = [0] * (length - len(its))
        own += [*text, *(1 << number for number in range(len(its)))]
        path += [*text, *paths(its)]
        early += [*text, *(number + 1 - depth for number, depth in enumerate(depths(its)))]
    numbers = torch.tensor([own, path, early], device=device)
    return Tree(numbers[0], numbers[1]), numbers[2]
