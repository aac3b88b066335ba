"""Which tokens of a text each level keeps, with their scores."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from longwave.model import Decoder
from longwave.resamplers import Resampler, Selection
from longwave.streams import Stream


@dataclass(frozen=True)
class LevelTrace:
    """What one level made of the M tokens that reached it.

    index: the level. places: where the tokens stand in the text, ascending. scores: what the level gave them. kept:
    which of them it kept.
    """

    index: int
    places: Int64[Tensor, " M"]
    scores: Float[Tensor, " M"]
    kept: Bool[Tensor, " M"]


@dataclass(frozen=True)
class TracedToken:
    """scores: one per level, None at a level that the token did not reach. kept: the levels that kept it."""

    scores: tuple[float | None, ...]
    kept: tuple[int, ...]


@torch.no_grad()
def trace_levels(model: Decoder, tokens: Sequence[int]) -> list[LevelTrace]:
    """Runs one text as at inference and tells what every level, however nested, made of the tokens that reached it."""
    device = model.embed.weight.device
    with watching_levels(model) as levels, model.mode(training=False):
        model.hidden(torch.tensor(tokens, device=device), Stream.of([len(tokens)], device=device))
    return levels


def by_token(levels: Sequence[LevelTrace], tokens: int) -> list[TracedToken]:
    """The same, told of each token of the text."""
    scores: list[list[float | None]] = [[None] * len(levels) for _ in range(tokens)]
    kept: list[list[int]] = [[] for _ in range(tokens)]
    for level in levels:
        for place, score, stays in zip(level.places.tolist(), level.scores.tolist(), level.kept.tolist(), strict=True):
            scores[place][level.index] = score
            kept[place] += [level.index] * stays
    return [TracedToken(tuple(one), tuple(other)) for one, other in zip(scores, kept, strict=True)]


@contextmanager
def watching_levels(model: Decoder) -> Iterator[list[LevelTrace]]:
    """Watches every level while one text runs through the model; the list is filled when the block ends.

    A level that no token reaches has seen nothing.
    """
    nothing = torch.zeros(0)
    seen = {level.index: LevelTrace(level.index, nothing.long(), nothing, nothing.bool()) for level in model.resamplers}

    def watch(level: Resampler, stream: Stream, selection: Selection) -> None:
        kept = torch.zeros(stream.tokens, dtype=torch.bool).index_fill_(0, selection.rows.cpu(), True)
        seen[level.index] = LevelTrace(level.index, stream.order.cpu(), selection.scores.detach().cpu(), kept)

    found: list[LevelTrace] = []
    with model.watching(watch):
        yield found
    found += seen.values()
