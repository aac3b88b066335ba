"""The roofline bound: the machine's measured bandwidth and FLOP/s, and a model's work, which takes a least time there.

Williams et al. 2009. Each part of a model is bounded by its bytes or by its FLOPs, and parts run one after the other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from longwave.benchmarks.measure.timing import Task, seconds_of, swift_collections
from longwave.costs import At, Peaks, Work, weight_bytes
from longwave.model import Decoder

_REPEATS = 5
_SIZES = {"cpu": (1 << 28, 2048), "cuda": (1 << 32, 8192)}  # bytes that are read; rows of the matrices


def measure_peaks(dtype: torch.dtype, device: torch.device | str = "cpu") -> Peaks:
    """Measures the machine's peaks, on the threads that models run on, at sizes beside which a launch is nothing."""
    size, side = _SIZES[torch.device(device).type]
    large, row = torch.ones(size // (4 * side), side, device=device), torch.ones(side, device=device)
    square = torch.randn(side, side, device=device).to(dtype)  # a GPU is faster on zeros and ones
    with swift_collections():
        reading = min(_best(large.sum), _best(lambda: large @ row))
        return Peaks(size / reading, 2 * side**3 / _best(lambda: square @ square))


def _best(task: Task) -> float:
    return min(seconds_of(task) for _ in range(_REPEATS))


@dataclass(frozen=True)
class Level:
    """The tokens at one level of a model in decoding.

    held: tokens that each sequence remembers there. rows: tokens of all sequences that reach the level per step. runs:
    share of the steps at which any token reaches it, so that its weights are read.
    """

    held: float
    rows: float
    runs: float

    @classmethod
    def whole(cls, context: int, sequences: int, steps: int) -> Level:
        """The outermost level, which every token reaches."""
        return cls(context + (steps - 1) / 2, sequences, 1.0)


@dataclass(frozen=True)
class Load:
    """The tokens at every level in decoding. levels: by the index of the level's resampler, or -1 outside of all."""

    levels: Mapping[int, Level]

    @property
    def retention(self) -> tuple[float, ...]:
        """The share of all decoded tokens that reaches each level."""
        return tuple(level.rows / self.levels[-1].rows for index, level in self.levels.items() if index >= 0)


def decode_work(model: Decoder, load: Load) -> list[Work]:
    """The work of each part in one decoding step; without the embedding, which reads one row per token."""
    dtype, outermost = model.embed.weight.dtype, load.levels[-1]
    parts = []
    for block in model.blocks:
        level = load.levels[block.site.level]
        cost = block.costs(At(round(level.held), dtype))[0]
        weights = weight_bytes(cost.parameters, dtype)
        state = cost.decode_bytes - weights
        parts.append(Work(level.rows * cost.decode_flops, level.runs * weights + level.rows * state))
    head = next(cost for cost in model.costs(1) if cost.kind == "norm and head")
    return [*parts, Work(outermost.rows * head.decode_flops, head.decode_bytes)]


def prefill_work(model: Decoder, tokens: int, retention: Sequence[float]) -> Work:
    """The work of the prefill of one sequence; retention: the share that each level really kept of it."""
    kept = {level.index: share for level, share in zip(model.resamplers, retention, strict=True)}
    return Work(model.prefill_flops(tokens, kept), _all_weights(model))


def training_work(model: Decoder, tokens: int, windows: int) -> Work:
    """The work of a training step over so many windows, forward and backward, at the nominal retention."""
    return Work(windows * model.training_flops(tokens), 3 * _all_weights(model))


def _all_weights(model: Decoder) -> int:
    return sum(weight.numel() * weight.element_size() for weight in model.parameters())
