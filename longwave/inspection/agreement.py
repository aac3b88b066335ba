"""Agreement of the tokens that a level keeps with the tokens that get attention just before it, beside chance.

The published analysis of SUBLLM (arXiv 2406.06571) lays the distribution of kept positions beside that of attention, in
the same model and in a Llama at the same depth. Here each comparison is also a number, beside that number for random
choices of the same size.

- A token's attention is relative to that of tokens seen from the same distances (`BlockAttention`).
- The first token is left out: models put attention there that they need nowhere else (Xiao et al. 2023). The last
  tokens are left out too, since few queries can see them.
- Trends along the text remain. `nearby` figures compare a token with its neighbours only, where trends hardly matter.

Legend: `M` tokens that are compared.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from longwave.draws import keys_of, uniforms
from longwave.inspection.attention import BlockAttention
from longwave.inspection.trace import LevelTrace
from longwave.units import counted

STRETCH = 64  # tokens that count as neighbours
_EDGE = 32  # queries that must be able to see a token
_FEWEST = 16  # tokens below which nothing is compared
_DRAWS = 200  # random choices that tell what chance gives
_BINS = 40


class Statistic(NamedTuple):
    """A figure, its mean over random choices of the same size (chance), and the range of 95 % of those choices."""

    value: float
    chance: float
    low: float
    high: float

    @property
    def verdict(self) -> str:
        """The figure against the range of chance, in words."""
        if self.low <= self.value <= self.high:
            return "no more than chance"
        return "above chance" if self.value > self.high else "below chance"


@dataclass(frozen=True)
class Distribution:
    """Shares of the kept tokens and of the attention that lie in each stretch of the text between two edges."""

    edges: tuple[int, ...]
    kept: tuple[float, ...]
    attention: tuple[float, ...]


@dataclass(frozen=True)
class Agreement:
    """One level against the attention of one block, by its depth (None: there is none to compare with).

    compared: tokens that reach both, without those left out. first_share: the first token's share of all attention.
    overlap: of n kept tokens, the share that is among the n most attended. correlation: Spearman's, of score and
    attention. `nearby` figures are those among neighbours. distance: total variation of the two distributions over the
    text, 0 where they are the same. reason: why there are no figures.
    """

    depth: int | None
    compared: int = 0
    first_share: float = 0.0
    reason: str = ""
    overlap: Statistic | None = None
    overlap_nearby: Statistic | None = None
    correlation: Statistic | None = None
    correlation_nearby: Statistic | None = None
    distance: Statistic | None = None
    distribution: Distribution | None = None

    def statistics(self) -> dict[str, dict[str, float]]:
        """Every figure by its name, as plain values."""
        return {name: figure._asdict() for name, figure in vars(self).items() if isinstance(figure, Statistic)}

    def plain(self) -> dict[str, Any]:
        """The figures as plain values, with what they were made of."""
        return {"block": self.depth, "compared": self.compared, "reason": self.reason, **self.statistics()}


def agreement(level: LevelTrace, attention: BlockAttention) -> Agreement:
    """Compares what a level kept of a text with the attention of a block, of the same model or of another."""
    pair = _pair(level, attention)
    reason = _problem(pair)
    if reason:
        return Agreement(attention.depth, len(pair.places), attention.first_share, reason)
    everywhere, nearby = torch.zeros_like(pair.places), torch.arange(len(pair.places)) // STRETCH
    overlap, correlation, distance = _statistics(pair, everywhere)
    overlap_nearby, correlation_nearby, _ = _statistics(pair, nearby)
    return Agreement(
        attention.depth,
        len(pair.places),
        attention.first_share,
        "",
        overlap,
        overlap_nearby,
        correlation,
        correlation_nearby,
        distance,
        _distribution(pair),
    )


@dataclass(frozen=True)
class _Pair:
    """The tokens that reach both level and block: places, scores, whether they were kept, and attention received."""

    places: Int64[Tensor, " M"]
    scores: Float[Tensor, " M"]
    kept: Bool[Tensor, " M"]
    attention: Float[Tensor, " M"]


def _pair(level: LevelTrace, attention: BlockAttention) -> _Pair:
    seen = attention.viewers >= min(_EDGE, int(attention.viewers.max()) // 8)
    seen[:1] = False
    of_level = torch.isin(level.places, attention.places[seen])
    of_block = seen & torch.isin(attention.places, level.places)
    return _Pair(level.places[of_level], level.scores[of_level], level.kept[of_level], attention.received[of_block])


def _problem(pair: _Pair) -> str:
    count, kept = len(pair.places), int(pair.kept.sum())
    if count < _FEWEST:
        return f"only {counted(count, 'token')} can be compared, too few for a figure"
    return "" if 0 < kept < count else f"{'every' if kept else 'no'} token that can be compared was kept"


def _statistics(pair: _Pair, groups: Tensor) -> tuple[Statistic, Statistic, Statistic]:
    """Overlap, correlation and distance, beside those with kept and scores shuffled within the groups."""
    score_ranks, attention_ranks = _ranks(pair.scores.double(), groups), _ranks(pair.attention.double(), groups)
    norm = (score_ranks.square().sum() * attention_ranks.square().sum()).sqrt().clamp(min=1e-12)
    top, target = _most_attended(pair, groups), _histogram(pair.places, pair.attention)
    found = []
    for order in [torch.arange(len(groups)), *_shuffles(groups)]:
        kept = pair.kept[order]
        overlap = (kept & top).sum() / kept.sum()
        correlation = (score_ranks[order] * attention_ranks).sum() / norm
        distance = (_histogram(pair.places, kept) - target).abs().sum() / 2
        found.append(torch.stack([overlap.double(), correlation, distance]))
    first, second, third = (_against_chance(row) for row in torch.stack(found, dim=1))
    return first, second, third


def _against_chance(values: Tensor) -> Statistic:
    """The first value, with the mean and range of the others as chance."""
    low, high = torch.quantile(values[1:], torch.tensor([0.025, 0.975], dtype=values.dtype)).tolist()
    return Statistic(float(values[0]), float(values[1:].mean()), low, high)


def _shuffles(groups: Tensor) -> list[Tensor]:
    """Random orders within the groups, whose numbers ascend in steps of one."""
    keys = keys_of(0, torch.arange(_DRAWS, device=groups.device))
    return [(groups + uniforms(one, groups.numel())).argsort() for one in keys]


def _ranks(values: Tensor, groups: Tensor) -> Tensor:
    """Ranks within each group, ties sharing their mean rank, less the mean of the group."""
    order = _ordered(values, groups)
    pairs = torch.stack([groups[order].double(), values[order]])
    _, run, sizes = torch.unique_consecutive(pairs, dim=1, return_inverse=True, return_counts=True)
    ranks = torch.empty_like(values)
    ranks[order] = (sizes.cumsum(0) - (sizes + 1) / 2)[run].double()
    return ranks - (torch.bincount(groups, ranks) / torch.bincount(groups))[groups]


def _most_attended(pair: _Pair, groups: Tensor) -> Tensor:
    """Whether each token is among the most attended of its group, of which as many are taken as the level kept."""
    order, sizes = _ordered(-pair.attention, groups), torch.bincount(groups)
    place = torch.arange(len(groups)) - (sizes.cumsum(0) - sizes)[groups]
    top = torch.empty_like(pair.kept)
    top[order] = place < torch.bincount(groups, pair.kept.double())[groups]
    return top


def _ordered(values: Tensor, groups: Tensor) -> Tensor:
    """The order by group, and by value within a group."""
    order = values.argsort(stable=True)
    return order[groups[order].argsort(stable=True)]


def _distribution(pair: _Pair) -> Distribution:
    kept, attention = (_histogram(pair.places, weights) for weights in (pair.kept, pair.attention))
    return Distribution(_edges(pair.places), tuple(kept.tolist()), tuple(attention.tolist()))


def _histogram(places: Tensor, weights: Tensor) -> Tensor:
    """The share of the weights in each bin between the first place and the last."""
    edges = torch.tensor(_edges(places))
    sums = torch.bincount(torch.bucketize(places, edges[1:], right=True), weights.double(), minlength=len(edges) - 1)
    return sums / sums.sum()


def _edges(places: Tensor) -> tuple[int, ...]:
    first, span = int(places[0]), int(places[-1]) + 1 - int(places[0])
    bins = max(1, min(_BINS, span // 16))
    return tuple(first + span * bin // bins for bin in range(bins + 1))
