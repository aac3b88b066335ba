"""The layers that the students of a conversion keep, by rules that measure: figures, rankings, what to say of them."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longwave import trial
from longwave.conversion.figures import Figure
from longwave.conversion.measures import Divergence, Measure, NextTokenAccuracy, TaskAccuracy
from longwave.conversion.measuring import Greedy, Measuring
from longwave.conversion.rankings import Rankings, rankings
from longwave.conversion.recipe import MeasureConfig, Rule
from longwave.conversion.selection import Sweep
from longwave.errors import require
from longwave.evaluation.suite import Asked
from longwave.model import Decoder
from longwave.training.data import TrainingData
from longwave.units import counted

FOLDER = "selection"
_BY_KL = "kl"
_FEW = 2  # windows and samples in a trial run


@dataclass(frozen=True)
class Measured:
    """What was measured of the layers, and what every rule makes of it."""

    sweep: Sweep | None
    greedy: Greedy | None
    rankings: Rankings

    def ranking(self, rule: Rule) -> tuple[int, ...]:
        """The layers by a rule, most important first. UserError where it tells no layer from another.

        The models of a trial run recall nothing: there the layers stand in their order.
        """
        if trial.is_on() and rule not in self.rankings.rankings:
            return tuple(self.rankings.layers)
        why = self.rankings.left_out.get(rule, "was not measured")
        require(rule in self.rankings.rankings, f"select.rule = {rule!r}: {why}; choose another rule")
        return self.rankings.rankings[rule]

    def record(self) -> dict[str, Any]:
        """The figures as plain values, for the record and the page."""
        found, columns = self.rankings, dict[str, list[float | None]]()
        if self.sweep is not None:
            columns["recall without it"] = list(self.sweep.recall)
            columns |= {"sense without it": list(self.sweep.sense)} if self.sweep.sense else {}
        places = {name: [1 + order.index(layer) for layer in found.layers] for name, order in found.rankings.items()}
        columns |= {f"rank by {name}": [float(place) for place in order] for name, order in places.items()}
        agreement = {
            name: {other: 1.0 if other == name else row[other] for other in found.correlations}
            for name, row in found.correlations.items()
        }
        return {"layers": columns, "agreement": agreement, "words": self._words(), "left_out": dict(found.left_out)}

    def _words(self) -> str:
        sweep, greedy, words = self.sweep, self.greedy, list[str]()
        if sweep is not None and sweep.teacher_recall is not None:
            sense = "" if sweep.teacher_sense is None else f", its sense {sweep.teacher_sense:.1%}"
            words.append(f"The teacher's recall is {sweep.teacher_recall:.1%}{sense}.")
        if greedy is not None:
            path = ", ".join(f"{one:.4f}" for one in greedy.divergences)
            words.append(f"KL from the teacher with no layer restored, and after each: {path}.")
        return " ".join(words)


def measured_layers(
    teacher: Decoder,
    aligned: Decoder,
    data: TrainingData,
    rules: Collection[Rule],
    rounds: int,
    asked: MeasureConfig,
    output: Path,
    say: Callable[[str], None],
) -> Measured:
    """Measures what the rules of the students need; figures are kept in the output folder as each is known.

    rounds: of layers that are restored one after the other, where a rule goes by that. data: of the alignment, on whose
    held-out text layers are judged; recall tasks have the length of its windows,
    unless the recipe says another. Raises UserError for tasks that do not fit the model.
    """
    texts, swept = [one.held_out for one in data.sources], any(rule != _BY_KL for rule in rules)
    length, named = asked.length or data.recipe.training.window, [f"lm-eval:{name}" for name in asked.sense]
    windows = trial.at_most(asked.windows, _FEW)
    recall: Measure | None = None
    sense: Measure | None = None
    if swept:
        samples = trial.at_most(asked.samples, _FEW)
        recall = TaskAccuracy(asked.recall, Asked(lengths=length, samples=samples, seed=asked.seed))
        sense = TaskAccuracy(named) if named else NextTokenAccuracy(texts, windows)
    divergence = Divergence(teacher, texts, windows) if _BY_KL in rules else None

    def told(figure: Figure) -> None:
        layers = counted(len(figure.linear), "layer")
        say(f"select: {figure.measure} {figure.value:.4f} with {layers} replaced: {', '.join(map(str, figure.linear))}")

    folder = output / FOLDER
    measuring = Measuring(teacher, aligned, folder, recall=recall, sense=sense, divergence=divergence, watcher=told)
    sweep = measuring.sweep() if swept else None
    greedy = measuring.greedy(rounds) if divergence is not None else None
    if sweep is not None and (theirs := sweep.teacher_recall or 0.0) < asked.least_recall:
        say(f"select: the teacher's recall is {theirs:.1%}: there is little that a conversion could lose")
    return Measured(sweep, greedy, rankings(measuring.layers, sweep, greedy))
