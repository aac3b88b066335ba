"""How models' costs grow with the context: measured in bounded time, and computed on to where nobody would wait.

Every model reads one sequence that grows through the contexts, in turn with the others, until its share of the time is
spent. From there on the state is what the cost formulas give at the retention that was really kept, and times are those
formulas' FLOPs and bytes, fitted to what was measured of the same model.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from longwave.benchmarks.context.options import ContextOptions
from longwave.benchmarks.context.sequence import Growing, Reading, Stopped
from longwave.benchmarks.measure.others import other_work
from longwave.costs import total
from longwave.model import Decoder

MEASURED = tuple(1 << power for power in range(10, 17))  # 1k to 64k tokens
COMPUTED = tuple(1 << power for power in range(10, 21))  # on to 1M
_CHUNK, _STEPS = 4096, 16  # tokens that are read at a time; tokens that are decoded at each context
_CHECKED = 256  # tokens whose logits are checked first
_TRUSTED = 0.2  # the largest relative error of a fit that times are computed with

Ids = Int[Tensor, " N"]


class GrowthPoint(NamedTuple):
    """Figures after a context of `tokens`.

    first_token: seconds until the first token is written. per_token: seconds for the next one, the mean of 16. Both
    are None where they could not be computed. state: bytes remembered.
    """

    tokens: int
    first_token: float | None
    per_token: float | None
    state: int


@dataclass(frozen=True)
class GrowthCurve:
    """One model's figures over the context.

    model: its key. measured: points by measurement. computed: points beyond, by the formulas. misfit: the largest
    relative error of the fit at a context that was measured; times that scatter by more than a fifth are not computed
    on. window: tokens that the model was trained for. stopped: why it was not measured at all contexts, in words.
    """

    model: str
    measured: tuple[GrowthPoint, ...]
    computed: tuple[GrowthPoint, ...]
    misfit: float
    window: int
    stopped: str = ""

    @property
    def points(self) -> dict[int, GrowthPoint]:
        """All points by their tokens."""
        return {point.tokens: point for point in (*self.measured, *self.computed)}


@dataclass(frozen=True)
class Growth:
    """The curves of models that were measured in turn.

    seconds: how long that took in all. note: how busy the machine was with other work. disturbed: whether that was
    enough to disturb the times.
    """

    curves: tuple[GrowthCurve, ...]
    seconds: float
    note: str = ""
    disturbed: bool = False


def measure_growth(
    models: Mapping[str, Decoder],
    ids: Mapping[str, Ids],
    seconds: float = 60.0,
    measured: Sequence[int] = MEASURED,
    computed: Sequence[int] = COMPUTED,
) -> Growth:
    """Measures the models, by key, at the contexts `measured`, ascending; `seconds` are shared out evenly.

    The shortest context is measured in any case, so that a busy machine can exceed `seconds`.

    ids: a text in each model's tokens, repeated where it is shorter than the longest context. computed: contexts of
    which those beyond the measured ones are computed. MachineError where a model's logits are wrong.
    """
    started, share = time.monotonic(), seconds / len(models)
    with other_work() as others:
        growing = [_Measured(key, model, ids[key], tuple(measured), share) for key, model in models.items()]
        for context in measured:
            for one in growing:
                one.grow(context)
    curves = tuple(one.curve(computed) for one in growing)
    return Growth(curves, time.monotonic() - started, others.words(), others.disturbs)


class _Measured:
    """A model that is measured at one context after the other, until its share of the time is spent."""

    def __init__(self, key: str, model: Decoder, ids: Ids, contexts: tuple[int, ...], share: float) -> None:
        options = ContextOptions(contexts=contexts, chunk=_CHUNK, decode_steps=_STEPS)
        text = torch.from_numpy(np.resize(ids.numpy().astype(np.int32), options.tokens))
        self._key, self._model, self._share = key, model, share
        self._readings: list[Reading] = []
        self._took: list[float] = []
        self._stopped = ""
        started = time.monotonic()
        Growing(model, text, replace(options, contexts=(min(contexts[0], _CHECKED),), decode_steps=4)).check()
        self._growing = Growing(model, text, options)
        self._spent = time.monotonic() - started

    def grow(self, context: int) -> None:
        """Reads on to the context, unless the model has been stopped or would be beyond its share by then.

        The first context is read whatever has passed, so that a busy machine leaves something to show.
        """
        if self._stopped:
            return
        needed = self._expected(context)
        if self._readings and self._spent + needed > self._share:
            words = f"{context:,} tokens would have taken about {needed:,.0f} s more"
            self._stopped = f"{words}, and of its share of {self._share:,.0f} s {self._left:,.0f} s were left"
            return
        started = time.monotonic()
        try:
            self._readings.append(self._growing.grow(context))
        except Stopped as reason:
            self._stopped = str(reason)
        self._took.append(time.monotonic() - started)
        self._spent += self._took[-1]

    @property
    def _left(self) -> float:
        return max(0.0, self._share - self._spent)

    def _expected(self, context: int) -> float:
        """The seconds that the next context will take: as the last one, in proportion to the FLOPs it adds."""
        if not self._readings:
            return 0.0
        seen = [0, *(reading.context for reading in self._readings)]
        before, last, following = (self._flops(tokens) for tokens in (*seen[-2:], context))
        return self._took[-1] * (following - last) / (last - before)

    # What the formulas say, at the retention that was kept.

    @property
    def _kept(self) -> dict[int, float]:
        return {level.index: share for level, share in zip(self._model.resamplers, self._retention, strict=True)}

    @property
    def _retention(self) -> tuple[float, ...]:
        return self._readings[-1].retention

    def _flops(self, tokens: int) -> float:
        """FLOPs of reading so many tokens, without those of the logits, which are needed once."""
        return self._model.prefill_flops(tokens, self._kept) - self._model.head_flops() if tokens else 0.0

    def _read(self, tokens: int) -> float:
        """Bytes that are read for the token after so many."""
        return total(self._model.costs(tokens, kept=self._kept)).decode_bytes

    def _state(self, tokens: int) -> int:
        return total(self._model.costs(tokens, kept=self._kept)).state_bytes

    def curve(self, contexts: Sequence[int]) -> GrowthCurve:
        """The measured points, and those of the contexts beyond."""
        measured = tuple(_point(reading) for reading in self._readings)
        facts = {"window": self._model.config.context_window, "stopped": self._stopped}
        if not measured:
            return GrowthCurve(self._key, (), (), 0.0, **facts)
        prefill = _fit([(self._flops(one.context), one.context, one.first_token) for one in self._readings])
        decode = _fit([(self._read(one.context), 1.0, one.per_token) for one in self._readings])

        def at(tokens: int) -> GrowthPoint:
            times = prefill.at(self._flops(tokens), tokens), decode.at(self._read(tokens), 1.0)
            return GrowthPoint(tokens, *times, self._state(tokens))

        beyond = tuple(at(tokens) for tokens in contexts if tokens > measured[-1].tokens)
        return GrowthCurve(self._key, measured, beyond, max(prefill.misfit, decode.misfit), **facts)


def _point(reading: Reading) -> GrowthPoint:
    return GrowthPoint(reading.context, reading.first_token, reading.per_token, reading.used)


class _Fit(NamedTuple):
    """seconds = by_count * count + by_extra * extra, where extra = work - base * count.

    base: the work for each count at the first point, so that what grows beyond it, such as attention, has a rate of its
    own. misfit: the largest relative error at the points that it was fitted to.
    """

    base: float
    by_extra: float
    by_count: float
    misfit: float = 0.0

    def at(self, work: float, count: float) -> float | None:
        """The seconds; None where the fit is not to be trusted."""
        if self.misfit > _TRUSTED:
            return None
        return self.by_count * count + self.by_extra * (work - self.base * count)


def _fit(points: Sequence[tuple[float, float, float]]) -> _Fit:
    """The fit of (work, count, seconds) with the least relative errors and neither rate below zero.

    A single point gives seconds in proportion to the work.
    """
    work, count, seconds = np.array(points, dtype=np.float64).T
    if len(points) == 1:
        return _Fit(0.0, float(seconds[0] / work[0]), 0.0)
    base = work[0] / count[0]
    columns = np.stack([(work - base * count) / seconds, count / seconds], 1)
    tries = []
    for used in ([0, 1], [1]):
        rates = np.zeros(2)
        rates[used] = np.linalg.lstsq(columns[:, used], np.ones(len(points)), rcond=None)[0]
        if (rates >= 0).all():
            tries.append(_Fit(float(base), float(rates[0]), float(rates[1]), float(abs(columns @ rates - 1).max())))
    return tries[0]
