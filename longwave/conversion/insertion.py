"""The start of SUBLLM's levels in a pretrained model, which breaks as little of it as dropping tokens can.

A new model's score vector is a random direction. The residual stream of a pretrained model has channels far larger than
others, so such scores lie anywhere: all above 1, or all below 0, where they have no gradient. And a new bypass takes
half of what the body does. Here, on a few windows of text:

- A level's score becomes a linear fit to how much its body changes a token, so that what is dropped is missed least. A
  token's change is measured as all tokens run through the body; only its rank counts, as a normal deviate.
- A second fit, to the constant 1, shifts all scores alike, though the score has no bias: the share that a level is to
  keep lies above 0. Their scale puts all of these above 1, where they take the body's whole output, but a `ramp`.
- The bypass takes all of the body's output. Causal thresholds stand at 0 and 1, where published ones always do.

Levels are placed one after the other, in the order in which tokens meet them, each on the tokens that reach it.

Legend: `T` tokens, `D` hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float64
from torch import Tensor, nn

from longwave.data.packed import Batch
from longwave.errors import require
from longwave.model import Decoder
from longwave.resamplers import Resampler
from longwave.resamplers.subllm import Subllm, quantiles

_RIDGE = 0.01  # of the mean square of a channel, which counts as 1: fits stay small in directions of little spread
_MOST_SHIFT, _LEAST_SCALE = 4.0, 0.1  # in units of the scores' spread


@dataclass(frozen=True)
class Insertion:
    """The start of a level, as measured on the tokens that it was placed by.

    name: of the level. target: the share of tokens that it should keep at first. kept: the share above the threshold.
    live: the share with a weight between 0 and 1, by which the score learns. constant: how well the stream lets all
    scores be shifted alike, 1 for perfectly; where it is near 0, `kept` misses the target. fit: the correlation of the
    scores with the ranks of the changes.
    """

    name: str
    target: float
    kept: float
    live: float
    constant: float
    fit: float


@torch.no_grad()
def insert_levels(model: Decoder, batches: Sequence[Batch], ramp: float = 0.15) -> list[Insertion]:
    """Places the score, the bypass and the thresholds of every SUBLLM level, for the first step of training.

    model: with a pretrained model's weights in its blocks (`conversion.transfer.transferred`). batches: some windows of
    text, several times as many tokens as the hidden size. ramp: the share of the kept tokens with a weight below 1, of
    published levels; causal ones have `subllm.threshold_ramp`. A level keeps `subllm.retention_start` of its tokens
    where a schedule begins there, and its own retention otherwise. Levels that no token reaches stay as they are.
    UserError for no batches.
    """
    require(bool(batches), "batches: none; give some windows of text")
    levels = [level for level in model.resamplers if isinstance(level, Subllm)]
    opened = {level: _Opened(level) for level in levels}
    try:
        with model.mode(training=False):
            return [one for level in levels if (one := _placed(model, level, opened[level], batches, ramp))]
    finally:
        for one in opened.values():
            one.close()


class _Opened:
    """A level that lets every token through its body as if it were not there, until it is closed.

    seen: the tokens that enter it, and what leaves the body, once `noting` is set.
    """

    def __init__(self, level: Resampler) -> None:
        self.noting, self.seen = False, list[tuple[Tensor, Tensor]]()
        self._hook = level.register_forward_hook(self._through)

    def close(self) -> None:
        """The level selects again, and what was seen is forgotten."""
        self._hook.remove()
        self.seen.clear()

    def _through(self, level: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        assert isinstance(level, Resampler)
        changed: Tensor = level.body(*inputs)
        if self.noting:
            self.seen.append((inputs[0], changed))
        return changed


def _placed(model: Decoder, level: Subllm, opened: _Opened, batches: Sequence[Batch], ramp: float) -> Insertion | None:
    """Runs the text with the level open, closes it, and places it; None if no token reaches it."""
    opened.noting = True
    for batch in batches:
        tokens, _, stream = batch.inputs(model.embed.weight.device)
        model.hidden(tokens, stream)
    seen = [torch.cat(side).double() for side in zip(*opened.seen, strict=True)]
    opened.close()
    return _place(level, seen[0], (seen[1] - seen[0]).norm(dim=1), ramp) if seen and len(seen[0]) else None


def _place(level: Subllm, entered: Float64[Tensor, "T D"], changes: Float64[Tensor, " T"], ramp: float) -> Insertion:
    share = float(level.retention_at(0))
    ramp = level.config.threshold_ramp if level.config.selection == "causal" else ramp
    ranks, one = _normal(changes), torch.ones_like(changes)
    important, constant = _fits(entered, torch.stack([ranks, one], 1)).unbind(1)
    level.score.weight.copy_(_shifted(entered, important, constant, share, ramp))
    level.bypass.fill_(1.0)
    scores = level.score(entered.to(level.score.weight.dtype)).double()
    if level.config.selection == "causal":
        level.threshold.start(*quantiles(scores.sort(descending=True).values, share, ramp))
    found = level.weights_of(scores)
    return Insertion(
        level.site.name,
        share,
        kept=float((found > 0).double().mean()),
        live=float(((found > 0) & (found < 1)).double().mean()),
        constant=1 - float((entered @ constant - one).square().mean()),
        fit=float(torch.corrcoef(torch.stack([scores, ranks]))[0, 1]),
    )


def _normal(values: Float64[Tensor, " T"]) -> Float64[Tensor, " T"]:
    """The ranks of values, as what a normal distribution has at these ranks."""
    ranks = torch.empty_like(values)
    ranks[values.argsort()] = torch.arange(len(values), device=values.device, dtype=values.dtype)
    return torch.special.ndtri((ranks + 0.5) / len(values))


def _fits(entered: Float64[Tensor, "T D"], wanted: Float64[Tensor, "T n"]) -> Float64[Tensor, "D n"]:
    """The vectors whose products with the tokens come nearest to what is wanted, by ridge regression.

    Channels are brought to one scale first, so that large ones are not favoured.
    """
    scale = entered.square().mean(0).sqrt().clamp(min=1e-12)
    even = entered / scale
    squares = even.T @ even / len(even)
    squares.diagonal().add_(_RIDGE)
    return torch.linalg.solve(squares, even.T @ wanted / len(even)) / scale.unsqueeze(1)


def _shifted(
    entered: Float64[Tensor, "T D"],
    important: Float64[Tensor, " D"],
    constant: Float64[Tensor, " D"],
    share: float,
    ramp: float,
) -> Float64[Tensor, " D"]:
    """The score vector by which `share` of the tokens lie above 0, and all of these but `ramp` of them above 1.

    So many times the constant fit brings a token above 0 as its score is below 0, in units of its constant. Where the
    stream has no constant to speak of, both shift and scale are bounded, and fewer or more lie above 0.
    """
    scores, ones = entered @ important, entered @ constant
    needed = (-scores / ones)[ones > 0].sort().values
    place = min(round(len(needed) * share), len(needed) - 1)
    shift = needed[place].clamp(-_MOST_SHIFT, _MOST_SHIFT) if len(needed) else 0.0
    ordered = (scores + shift * ones).sort(descending=True).values
    _, high = quantiles(ordered, share, ramp)
    return (important + shift * constant) / high.clamp(min=float(_LEAST_SCALE * ordered.square().mean().sqrt() + 1e-30))
