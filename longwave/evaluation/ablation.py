"""What each mixer does: its output is set to zero, one mixer at a time, and loss and recall are measured again.

Hybrids that were converted can ignore a path that they seem to have (component bypass, arXiv 2510.05901): at an equal
loss only taking it away shows whether anything runs through it. Everything is compared window by window and sample by
sample with the whole model.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from longwave.data.packed import NO_TARGET, Batch, PackedTokens
from longwave.data.recall import Family, Sample
from longwave.evaluation.held_out import held_out_loss
from longwave.evaluation.recall import RecallAsked, said, scored, sets_of
from longwave.intervals import Interval, mean_interval
from longwave.model import Decoder
from longwave.part import Part

MOST_WINDOWS = 64  # of held-out text, since every mixer reads them again
_NOTHING = 1e-3  # of the loss, and 20 times as much of the samples: a change within it is none
_ENOUGH = 10  # right answers of the whole model, from which on recall shows whether a mixer matters
_LIKELY = 0.05  # probability with which chance alone turns as many answers to one side


@dataclass(frozen=True)
class Turned:
    """Right answers without a mixer, and `before`, with it. lost, gained: right only with it, or only without it."""

    task: str
    right: int
    before: int
    lost: int
    gained: int
    samples: int

    @property
    def is_nothing(self) -> bool:
        """Whether the mixer makes no difference here: few answers turn, and to either side alike."""
        turned = self.lost + self.gained
        return turned <= 20 * _NOTHING * self.samples and _by_chance(self.lost, self.gained) > _LIKELY


@dataclass(frozen=True)
class Ablated:
    """The model without the output of one mixer.

    mixer: its name, such as `blocks.3.mixer`. letter: of its block. loss: nats per token; None without data. change:
    of the mean loss of a window, with its 95 % interval. recall: for each family. changes_nothing: whether neither the
    loss nor any answer shows that it is gone; None where there is no loss and the whole model answers too little right.
    """

    mixer: str
    letter: str
    loss: float | None
    change: Interval | None
    recall: tuple[Turned, ...]
    changes_nothing: bool | None


@dataclass(frozen=True)
class Ablation:
    """Every mixer taken away in turn. loss: of the whole model, over `windows` windows. recall: its right answers."""

    loss: float | None
    windows: int
    recall: dict[str, int]
    mixers: tuple[Ablated, ...]


def ablate(model: Decoder, data: PackedTokens | None, families: Sequence[Family], asked: RecallAsked) -> Ablation:
    """Measures the whole model, then each mixer's absence, by the loss on data and the recall of families."""
    probe = _Probe(model, data, [(family.name, sets_of(model, family, asked)) for family in families])
    losses, hits = probe.measured()
    found = list[Ablated]()
    for letter, part in mixers_of(model):
        with silenced(part):
            found.append(_ablated(letter, part, probe, losses, hits))
    names = [name for name, _ in probe.sets]
    right = {name: sum(one) for name, one in zip(names, hits, strict=True)}
    return Ablation(_mean(losses), len(losses), right, tuple(found))


def mixers_of(model: Decoder) -> list[tuple[str, Part]]:
    """Every mixer with the letter of its block, in the order of the layout."""
    return [(block.letter, part) for block in model.blocks for part in block.parts if part.role == "mixer"]


@contextmanager
def silenced(part: Part) -> Iterator[None]:
    """While the block runs, the part puts out zeros; it goes on to remember what it reads."""

    def zeros(_: Any, __: Any, output: Tensor) -> Tensor:
        return torch.zeros_like(output)

    hook = part.register_forward_hook(zeros)
    try:
        yield
    finally:
        hook.remove()


@dataclass
class _Probe:
    """What is measured of a model: the loss of windows, and the samples of each family."""

    model: Decoder
    data: PackedTokens | None
    sets: list[tuple[str, list[Sample]]]

    def measured(self) -> tuple[list[float], list[tuple[bool, ...]]]:
        """The mean loss of every window that has a target, and of every family which samples were answered right."""
        losses = _ByWindow()
        if self.data is not None:
            held_out_loss(self.model, self.data, windows=MOST_WINDOWS, watchers=[losses])
        hits = [scored(name, 0, samples, said(self.model, samples)).hits for name, samples in self.sets]
        return losses.means, hits


class _ByWindow:
    """Gathers the mean loss of every window."""

    def __init__(self) -> None:
        self.means = list[float]()

    def __call__(self, batch: Batch, losses: Tensor) -> None:
        counts = [int((targets != NO_TARGET).sum()) for targets in batch.targets.split(list(batch.windows))]
        self.means += [float(part.mean()) for part in losses.split(counts) if len(part)]


def _ablated(
    letter: str, part: Part, probe: _Probe, losses: Sequence[float], hits: Sequence[tuple[bool, ...]]
) -> Ablated:
    without, answered = probe.measured()
    change = mean_interval([one - other for one, other in zip(without, losses, strict=True)]) if losses else None
    triples = zip(probe.sets, hits, answered, strict=True)
    turned = tuple(_turned(name, before, after) for (name, _), before, after in triples)
    same = change is None or _is_within(change, _NOTHING * (_mean(losses) or 0))
    shows = change is not None or any(one.before >= _ENOUGH for one in turned)
    idle = same and all(one.is_nothing for one in turned) if shows else None
    return Ablated(part.site.name, letter, _mean(without), change, turned, idle)


def _turned(task: str, before: Sequence[bool], after: Sequence[bool]) -> Turned:
    pairs = list(zip(before, after, strict=True))
    lost, gained = pairs.count((True, False)), pairs.count((False, True))
    return Turned(task, sum(after), sum(before), lost, gained, len(pairs))


def _is_within(change: Interval, most: float) -> bool:
    """Whether a change is small, and its whole interval too, where there is one."""
    ends = [change.mean, change.mean if change.low is None else change.low, change.high or change.mean]
    return all(abs(end) <= most for end in ends)


def _by_chance(lost: int, gained: int) -> float:
    """The probability that of so many answers chance turns as many, or more, to one side (sign test, two-sided)."""
    turned = lost + gained
    return min(1.0, 2 * sum(math.comb(turned, k) for k in range(min(lost, gained) + 1)) / 2**turned)


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
