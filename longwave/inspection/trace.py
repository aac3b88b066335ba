"""Which tokens of a text each level keeps, with their scores."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from longwave.model import Decoder
from longwave.resamplers import Subllm
from longwave.stream import Stream


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
    with watching_levels(model) as levels:
        model.eval().hidden(torch.tensor(tokens, device=model.embed.weight.device), Stream.of([len(tokens)]))
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
    """Watches every level while one text runs through the model; the list is filled when the block ends."""
    watches = [_Watch(resampler) for resampler in model.resamplers]
    found: list[LevelTrace] = []
    try:
        yield found
    finally:
        for watch in watches:
            watch.remove()
    found += [watch.trace() for watch in watches]


class _Watch:
    """Hooks on one level; one that no token reaches is never called and has seen nothing."""

    def __init__(self, level: Subllm) -> None:
        self._index = level.index
        self._places, self._scores, self._kept = torch.zeros(0, dtype=torch.int64), torch.zeros(0), torch.zeros(0)
        self._hooks = [
            level.register_forward_pre_hook(self._enter),
            level.score.register_forward_hook(self._score),
            level.body.register_forward_pre_hook(self._stay),
        ]

    def _enter(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        self._places = inputs[1].order.cpu()

    def _score(self, module: nn.Module, inputs: tuple[Any, ...], scores: Tensor) -> None:
        self._scores = scores.cpu()

    def _stay(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        self._kept = inputs[1].order.cpu()

    def trace(self) -> LevelTrace:
        return LevelTrace(self._index, self._places, self._scores, torch.isin(self._places, self._kept))

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()
