"""Which layers of a converted model keep softmax attention: published rules, simple ones, and how far they agree.

The rules that measure replace one layer at a time by its linear student and ask how that model does in recall (R) and
in common sense (C). Layers are numbered from 0; a rule is judged by the layers it keeps, and by its whole ranking.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from longwave.errors import require

Rule = Literal["halo", "halo_corrected", "jet_nemotron", "even", "last"]
_EPSILON, _MOST = 1e-10, 50.0  # of the published code; the paper has 1e-6 and no bound


@dataclass(frozen=True)
class Sweep:
    """How models do in which one layer alone was replaced. Shares in [0, 1], the layers in order.

    recall, sense: of each model. teacher_recall, teacher_sense: of the model in which none was replaced; only some
    rules need them.
    """

    recall: Sequence[float]
    sense: Sequence[float] = ()
    teacher_recall: float | None = None
    teacher_sense: float | None = None

    def __post_init__(self) -> None:
        layers = len(self.recall)
        require(layers > 0, "recall: no layers; give a share for each")
        require(len(self.sense) in (0, layers), f"sense: {len(self.sense)} layers; recall has {layers}")


def halo(sweep: Sweep) -> list[float]:
    """HALO's importance of each layer (arXiv 2601.22156): (max R - R) / (max C - C + epsilon), at most 50.

    The maxima are over the models of the sweep, as published. So the layer with the largest C is divided by epsilon: it
    is always kept, unless its R is the largest too, whatever it does for recall (`halo_corrected` has no such layer).
    """
    require(bool(sweep.sense), "halo: needs sense as well as recall")
    best_recall, best_sense = max(sweep.recall), max(sweep.sense)
    pairs = zip(sweep.recall, sweep.sense, strict=True)
    return [min((best_recall - recall) / (best_sense - sense + _EPSILON), _MOST) for recall, sense in pairs]


def halo_corrected(sweep: Sweep) -> list[float]:
    """HALO's ratio with losses against the teacher, and the median loss of sense added below, so that none explodes."""
    require(bool(sweep.sense) and sweep.teacher_sense is not None, "halo_corrected: needs sense, and the teacher's")
    assert sweep.teacher_sense is not None
    teacher = max(sweep.recall) if sweep.teacher_recall is None else sweep.teacher_recall
    lost = [max(0.0, sweep.teacher_sense - sense) for sense in sweep.sense]
    typical = float(np.median(lost)) or 1.0
    return [(teacher - recall) / (loss + typical) for recall, loss in zip(sweep.recall, lost, strict=True)]


def jet_nemotron(sweep: Sweep) -> list[float]:
    """Jet-Nemotron's importance (arXiv 2508.15884): the recall that is lost with the layer."""
    teacher = sweep.teacher_recall
    require(teacher is not None, "jet_nemotron: needs the teacher's recall")
    assert teacher is not None
    return [teacher - recall for recall in sweep.recall]


def ranking(importance: Sequence[float]) -> list[int]:
    """The layers, most important first; of equals the earlier one."""
    finite = all(math.isfinite(one) for one in importance)
    require(finite, "importance: a value is not a finite number; a layer was not measured")
    return sorted(range(len(importance)), key=lambda layer: (-importance[layer], layer))


def even(layers: int, count: int) -> list[int]:
    """So many layers at equal distances, each in the middle of its share of the stack."""
    _require_count(count, layers)
    return [(2 * number + 1) * layers // (2 * count) for number in range(count)]


def last(layers: int, count: int) -> list[int]:
    """The last layers."""
    _require_count(count, layers)
    return list(range(layers - count, layers))


def kept(ranked: Sequence[int], count: int, pinned: Sequence[int] = ()) -> list[int]:
    """The layers that keep softmax, ascending: the pinned ones, and of the others the first of a ranking.

    pinned: kept whatever the ranking says, such as the first and the last layer, as MiniCPM-SALA does.
    """
    layers = len(ranked)
    _require_count(count, layers)
    unknown = [layer for layer in pinned if layer not in ranked]
    require(not unknown, f"pinned = {unknown[:1]}: no such layer; there are 0 to {layers - 1}")
    fixed = sorted(set(pinned))
    require(len(fixed) <= count, f"softmax layers = {count}: fewer than the {len(fixed)} that are pinned")
    others = [layer for layer in ranked if layer not in fixed]
    return sorted([*fixed, *others[: count - len(fixed)]])


def _require_count(count: int, layers: int) -> None:
    require(0 <= count <= layers, f"softmax layers = {count}: 0 to {layers}, as many as the source has")


def rank_correlation(one: Sequence[int], other: Sequence[int]) -> float:
    """Spearman's rank correlation of two rankings of the same layers: 1 if they agree, -1 for the reverse."""
    require(sorted(one) == sorted(other) and len(one) > 1, "rankings: of the same two layers or more")
    places = np.argsort(np.asarray([one, other]), axis=1)  # of every layer, in either ranking
    return float(np.asarray(np.corrcoef(places))[0, 1])


def importance_correlation(one: Sequence[float], other: Sequence[float]) -> float:
    """Spearman's rank correlation of two importances of the same layers; layers that are alike share their mean place.

    UserError for importances by which all layers are alike.
    """
    require(len(one) == len(other), f"importances: of {len(one)} layers and of {len(other)}; give those of the same")
    apart = min(len(set(one)), len(set(other))) > 1
    require(apart, "importances: all layers are alike, which agrees with no ranking")
    places = [_mean_places(np.asarray(values, np.float64)) for values in (one, other)]
    return float(np.asarray(np.corrcoef(places))[0, 1])


def _mean_places(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """The place of every value in ascending order, and of equal values the mean of their places."""
    column = values[:, None]
    return (column > values).sum(1) + (column == values).sum(1) / 2
