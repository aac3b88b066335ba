"""The rules by which layers are selected, side by side over the same figures, and how far they agree."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from longwave.conversion.measuring import Greedy
from longwave.conversion.selection import (
    Sweep,
    halo,
    halo_corrected,
    importance_correlation,
    jet_nemotron,
    ranking,
)
from longwave.errors import UserError, require

_BY_RECALL = {"halo": halo, "halo_corrected": halo_corrected, "jet_nemotron": jet_nemotron}


@dataclass(frozen=True)
class Rankings:
    """The rules side by side.

    layers: the numbers of the layers. rankings: of every rule these numbers, most important first. importances: of
    every rule, in the order of `layers`. correlations: Spearman's, of every rule with every other. left_out: the rules
    that do not rank these layers, and why.
    """

    layers: tuple[int, ...]
    rankings: Mapping[str, tuple[int, ...]]
    importances: Mapping[str, tuple[float, ...]]
    correlations: Mapping[str, Mapping[str, float]]
    left_out: Mapping[str, str]


def rankings(layers: Sequence[int], sweep: Sweep | None = None, greedy: Greedy | None = None) -> Rankings:
    """What every rule makes of the same figures.

    layers: the numbers of the layers that were measured (`Measuring.layers`). Beside the published rules there are
    `sense`, by the loss of sense alone, `kl`, the order in which layers were restored, and `last`, the last layers.
    """
    found, left_out = dict[str, tuple[float, ...]](), dict[str, str]()
    for name, rule in _rules(layers, sweep, greedy).items():
        try:
            found[name] = _told_apart(tuple(rule()))
        except UserError as error:
            left_out[name] = str(error)
    ranked = {name: tuple(layers[place] for place in ranking(values)) for name, values in found.items()}
    correlations = {name: _with_others(name, found) for name in found}
    return Rankings(tuple(layers), ranked, found, correlations, left_out)


def _rules(
    layers: Sequence[int], sweep: Sweep | None, greedy: Greedy | None
) -> dict[str, Callable[[], Sequence[float]]]:
    """Of every rule that these figures are for, what gives its importances."""
    found = dict[str, Callable[[], Sequence[float]]]()
    if sweep is not None:
        found |= {name: partial(_by_recall, sweep, rule) for name, rule in _BY_RECALL.items()}
        found["sense"] = partial(_sense_lost, sweep)
    if greedy is not None:
        found["kl"] = lambda: [-float(greedy.ranking.index(layer)) for layer in layers]
    return {**found, "last": lambda: [float(layer) for layer in layers]}


def _by_recall(sweep: Sweep, rule: Callable[[Sweep], list[float]]) -> list[float]:
    alike = len(set(sweep.recall)) == 1
    require(not alike, f"recall = {sweep.recall[0]:.3f}, whichever layer is replaced: it tells none from another")
    return rule(sweep)


def _sense_lost(sweep: Sweep) -> list[float]:
    require(bool(sweep.sense), "sense: was not measured")
    return [(sweep.teacher_sense or 0.0) - sense for sense in sweep.sense]


def _told_apart(importances: tuple[float, ...]) -> tuple[float, ...]:
    require(len(set(importances)) > 1, "all layers are alike by it")
    return importances


def _with_others(name: str, importances: Mapping[str, tuple[float, ...]]) -> dict[str, float]:
    return {
        other: importance_correlation(importances[name], values)
        for other, values in importances.items()
        if other != name
    }
