"""Measuring which layers a conversion can do without: a sweep over single layers, and layers restored one by one.

Both ask one question after the other of models between the teacher and the model aligned to it. Every figure is written
to a file as soon as it is known, so that what was stopped goes on and measures nothing twice.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from longwave.conversion.figures import Figure, Figures, fingerprint
from longwave.conversion.measures import Measure
from longwave.conversion.selection import Sweep
from longwave.conversion.swapping import convertible, mixers, swapped
from longwave.errors import MachineError, require
from longwave.model import Decoder

MEASURED = "measured.json"


@dataclass(frozen=True)
class Greedy:
    """Layers in the order in which restoring them lowers the divergence most (KL-LS, arXiv 2512.20569, without its
    training between).

    ranking: the numbers of all convertible layers. rounds: the first so many were chosen in a round of their own; the
    others stand by their divergence in the last round. divergences: of the model with no layer restored, and after
    every round, in nats per token.
    """

    ranking: tuple[int, ...]
    rounds: int
    divergences: tuple[float, ...]


class Measuring:
    """Measures models in which some layers of a teacher are replaced by those aligned to them.

    folder: where the figures are kept, as `measured.json`; a file of other models or settings is refused by a
    UserError. recall, sense: what a sweep measures, larger being better. divergence: what restoring layers lowers.
    watcher: told of every figure that is measured, not of those that were known.
    """

    def __init__(
        self,
        teacher: Decoder,
        aligned: Decoder,
        folder: str | Path,
        *,
        recall: Measure | None = None,
        sense: Measure | None = None,
        divergence: Measure | None = None,
        watcher: Callable[[Figure], None] | None = None,
    ) -> None:
        self._teacher, self._aligned, self._watcher = teacher, aligned, watcher
        self.layers = tuple(convertible(teacher, aligned))
        given = {"recall": recall, "sense": sense, "divergence": divergence}
        self._measures = {name: measure for name, measure in given.items() if measure is not None}
        models = {"teacher": fingerprint(teacher), "aligned": fingerprint(aligned, mixers(self.layers))}
        settings = {name: dict(measure.settings) for name, measure in self._measures.items()}
        self._kept = Figures(Path(folder) / MEASURED, models, settings)

    @property
    def figures(self) -> tuple[Figure, ...]:
        """All figures that are known, in the order in which they were measured."""
        return self._kept.all

    def sweep(self) -> Sweep:
        """Recall, and sense if that is measured, of the teacher and of it with every convertible layer replaced alone.

        The shares stand in the order of `layers`. UserError without a measure of recall.
        """
        self._require("recall", "a sweep measures it")
        singles = [(layer,) for layer in self.layers]
        found = [{name: self._figure(name, one) for name in self._swept} for one in [(), *singles]]
        recall, sense = ([one[name] for one in found if name in one] for name in ("recall", "sense"))
        return Sweep(recall[1:], tuple(sense[1:]), recall[0], sense[0] if sense else None)

    def greedy(self, count: int | None = None) -> Greedy:
        """Restores the layer that lowers the divergence most, again and again, beginning with no layer restored.

        count: of rounds; by default until the order of all layers is known. One round alone ranks layers by what
        restoring each by itself does. L layers take L + 1 measured models for one round, L - 1 more for the next.
        """
        self._require("divergence", "layers are restored by it")
        rounds, left, chosen = self._rounds(count), list(self.layers), list[int]()
        found, divergences = dict[int, float](), [self._figure("divergence", self.layers)]
        for _ in range(rounds):
            found = {layer: self._figure("divergence", [one for one in left if one != layer]) for layer in left}
            best = min(left, key=lambda layer: found[layer])
            chosen.append(best)
            left.remove(best)
            divergences.append(found[best])
        rest = sorted(left, key=lambda layer: found.get(layer, 0.0))
        return Greedy((*chosen, *rest), rounds, tuple(divergences))

    @property
    def _swept(self) -> list[str]:
        return [name for name in ("recall", "sense") if name in self._measures]

    def _rounds(self, count: int | None) -> int:
        most = len(self.layers)
        require(count is None or 0 < count <= most, f"count = {count}: 1 to {most}, as many as layers were aligned")
        return min(most if count is None else count, most - 1)  # after which one layer is left, the last

    def _require(self, name: str, why: str) -> None:
        require(name in self._measures, f"{name}: no measure; {why}")

    def _figure(self, name: str, linear: Sequence[int]) -> float:
        """A figure of the model in which these layers are replaced: a known one, or measured now."""
        known = self._kept.value(name, linear)
        return self._measured(name, tuple(linear)) if known is None else known

    def _measured(self, name: str, linear: tuple[int, ...]) -> float:
        started = time.monotonic()
        layers = ", ".join(map(str, linear)) or "none"
        try:
            value = self._measures[name](swapped(self._teacher, self._aligned, linear))
        except MachineError as error:
            raise MachineError(f"{name} with layers {layers} replaced: {error}") from error
        if not math.isfinite(value):
            raise MachineError(f"{name} with layers {layers} replaced = {value}: not a number; align once more")
        figure = Figure(name, linear, float(value), round(time.monotonic() - started, 3))
        self._kept.add(figure)
        if self._watcher is not None:
            self._watcher(figure)
        return figure.value
