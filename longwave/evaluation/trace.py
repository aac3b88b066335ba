"""Which tokens of a text each level keeps, with their scores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from longwave.model import Decoder
from longwave.stream import Stream


@dataclass(frozen=True)
class TracedToken:
    """scores: one per level that the token reached, outermost first. kept: how many levels kept it."""

    scores: tuple[float, ...]
    kept: int


@torch.no_grad()
def trace_selection(model: Decoder, tokens: Sequence[int]) -> list[TracedToken]:
    """Runs one text as at inference and tells what each of its nested levels made of every token.

    Levels are those along the first chain of nesting, as in every published layout.
    """
    model.eval()
    seen: list[Tensor] = []
    levels = [one for one in model.resamplers if one.site.level == one.index - 1]

    def note(module: nn.Module, inputs: object, scores: Tensor) -> None:
        seen.append(scores)

    hooks = [one.score.register_forward_hook(note) for one in levels]
    model.hidden(torch.tensor(tokens, device=model.embed.weight.device), Stream.of([len(tokens)]))
    for hook in hooks:
        hook.remove()
    scores: list[list[float]] = [[] for _ in tokens]
    inside = list(range(len(tokens)))
    for level, found in zip(levels, seen, strict=False):
        for place, score in zip(inside, found.tolist(), strict=True):
            scores[place].append(score)
        inside = [place for place in inside if scores[place][-1] > float(level.threshold.low)]
    deepest = set(inside)
    return [TracedToken(tuple(one), len(one) - (place not in deepest)) for place, one in enumerate(scores)]
