"""The FLOPs of a training step, counted from the runs of tokens that really reached every part."""

from __future__ import annotations

from collections import Counter, defaultdict

from longwave.model import Decoder
from longwave.part import Part
from longwave.resamplers import Resampler, Selection
from longwave.streams import Runs, Stream

_OUTSIDE = -1  # the level of parts that lie in none


class StepFlops:
    """Counts the FLOPs of forward and backward of one step: by the formulas of the parts, at the tokens really kept.

    It watches the resamplers of the model (`Decoder.watching`), and is given the stream of every micro-batch. Blocks
    that run again in the backward pass (`training.recompute`) count once, as is the field's custom.
    """

    def __init__(self, model: Decoder) -> None:
        self._model, self._rows = model, 0
        self._runs: dict[int, list[Runs]] = defaultdict(list)

    def began(self, stream: Stream) -> None:
        """Counts a micro-batch, whose logits are made for `stream.outputs` only."""
        self._runs[_OUTSIDE].append(stream.runs)
        self._rows += stream.tokens if stream.outputs is None else stream.outputs.shape[0]

    def __call__(self, level: Resampler, stream: Stream, selection: Selection) -> None:
        self._runs[level.index].append(selection.runs)

    @property
    def total(self) -> int:
        """All FLOPs so far. Reads the lengths of runs that the host does not know yet, so ask when a step is over."""
        lengths = {level: Counter(n for one in runs for n in one.lengths) for level, runs in self._runs.items()}
        of_parts = sum(trained_flops(part, lengths.get(part.site.level, Counter())) for part in self._model.parts)
        return of_parts + 3 * self._rows * self._model.head_flops()


def trained_flops(part: Part, lengths: Counter[int]) -> int:
    """Forward and backward of a part over runs of these lengths: a product's backward pass takes two like it."""
    return sum(many * (3 * part.prefill_flops(n) - 2 * part.unlearned_flops(n)) for n, many in lengths.items() if n)
