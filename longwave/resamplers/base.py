"""Brackets and resamplers: layers that run other layers in a way of their own.

A bracket is a name with a body in a layout. A resampler is a bracket that runs its body on fewer tokens: it selects
some, runs the body on those, and mixes what comes out into all of them (SUBLLM; Mixture-of-Depths, arXiv 2404.02258).

Legend: `T` tokens of the stream, `K` kept tokens, `D` hidden size, `R` runs.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn

from longwave.config import ModelConfig
from longwave.costs import At, Cost, weight_bytes
from longwave.part import Layer, Part, Site
from longwave.states import PerToken, State, StateSpec, memory_of
from longwave.streams import Runs, Stream, Windows


@dataclass(frozen=True)
class Clock:
    """The optimizer step that schedules follow, and the seed that draws are keyed by."""

    step: int
    seed: int


class Bracket(Part):
    """A name with a body in a layout, `name(arguments: body)` or `name(body)`.

    arguments: as written. body: the layers in it, which the builder of the model puts there.
    """

    body: nn.Module

    def __init__(self, config: ModelConfig, arguments: tuple[str, ...], site: Site) -> None:
        super().__init__(config, site)
        self.arguments = arguments

    def costs(self, at: At) -> list[Cost]:
        """The costs of the bracket itself and of its body."""
        assert isinstance(self.body, Layer)
        return [*self.own_costs(at), *self.body.costs(at)]

    def own_costs(self, at: At) -> list[Cost]:
        """The costs of the bracket without its body."""
        parameters, spec = self.own_parameters(), self.state_spec()
        return [
            Cost(
                self.kind,
                parameters,
                self.prefill_flops(at.tokens),
                at.chance * self.decode_flops(at.tokens),
                at.chance * (weight_bytes(parameters, at.dtype) + self.read_bytes(at.tokens, at.dtype)),
                spec.bytes(at.tokens, at.dtype),
                self.unlearned_flops(at.tokens),
            )
        ]

    @property
    def kind(self) -> str:
        """Its name in tables of costs."""
        return " ".join([type(self).__name__.lower(), *self.arguments])

    def own_modules(self) -> Iterator[tuple[str, nn.Module]]:
        """Without the body, whose layers draw their own weights."""
        inside = {id(module) for module in self.body.modules()}
        return ((name, module) for name, module in self.named_modules() if id(module) not in inside)

    def own_parameters(self) -> int:
        """Weights of the bracket without its body."""
        inside = {id(weight) for weight in self.body.parameters()}
        return sum(weight.numel() for weight in self.parameters() if id(weight) not in inside)

    def prefill_flops(self, tokens: int) -> int:
        return 0

    def decode_flops(self, context: int) -> int:
        return 0

    def follow(self, clock: Clock) -> None:
        """Told of each optimizer step before it runs, for schedules and the keys of draws."""
        return

    def reset(self) -> None:
        """Gives its buffers, which formats of others do not store, the values that a new model has."""
        return


@dataclass(frozen=True)
class Selection:
    """The tokens that a level keeps.

    rows: of the stream, ascending. runs: how they fall into its runs. weights: the share of the body's result that each
    takes. scores: of all tokens, by which they were chosen. windows: the training windows of the kept tokens.
    """

    rows: Int64[Tensor, " K"]
    runs: Runs
    weights: Float[Tensor, " K"]
    scores: Float[Tensor, " T"]
    windows: Windows | None = None


Watcher = Callable[["Resampler", Stream, Selection], None]


class Resampler(Bracket):
    """A level: its body runs on the tokens that `select` keeps, and `mix` puts the outcome back.

    index: of the level, by which it is named; `site.level` is the level around it.
    """

    def __init__(self, config: ModelConfig, arguments: tuple[str, ...], site: Site, index: int) -> None:
        super().__init__(config, arguments, site)
        self.index = index
        self._watchers: list[Watcher] = []

    @property
    @abstractmethod
    def retention(self) -> Fraction:
        """The share of the tokens entering the level that it is meant to keep."""

    @abstractmethod
    def select(self, hidden: Float[Tensor, "T D"], stream: Stream) -> Selection:
        """Chooses the tokens that the body runs on, some or none of each run."""

    @abstractmethod
    def mix(
        self,
        hidden: Float[Tensor, "T D"],
        kept: Float[Tensor, "K D"],
        changed: Float[Tensor, "K D"],
        selection: Selection,
        stream: Stream,
    ) -> Float[Tensor, "T D"]:
        """All tokens after the level, from what entered it, the kept ones before the body, and after it."""

    def forward(self, hidden: Float[Tensor, "T D"], stream: Stream, state: State | None) -> Float[Tensor, "T D"]:
        selection = self.select(hidden, stream)
        for watcher in self._watchers:
            watcher(self, stream, selection)
        inner = stream.gather(selection.rows, selection.runs, selection.windows)
        if state is not None:
            memory_of(state, self.site.name, inner).append(order=inner.order.view(-1, 1, 1))
        if not inner.tokens and not self.training:
            return hidden  # in training an empty body runs too, so that sharded ranks stay in step
        kept = hidden.index_select(0, selection.rows)
        return self.mix(hidden, kept, self.body(kept, inner, state), selection, stream)

    @contextmanager
    def watched_by(self, watcher: Watcher) -> Iterator[None]:
        """While the block runs, the watcher is told of every selection: the level, its stream, what it keeps."""
        self._watchers.append(watcher)
        try:
            yield
        finally:
            self._watchers.remove(watcher)

    def metrics(self, selection: Selection) -> Mapping[str, Float[Tensor, ""]]:
        """Figures of one selection, for the log of a training run; nothing by default."""
        return {}

    def force(self, scores: Float[Tensor, " T"]) -> None:
        """Makes inference keep the nominal share of tokens of such scores, for measurements; nothing by default."""
        return

    @property
    def cutoff(self) -> float | None:
        """The score above which inference keeps a token, if it goes by one."""
        return None

    def state_spec(self) -> StateSpec:
        """The place in the sequence of every kept token, by which states are truncated."""
        return StateSpec({"order": PerToken(1, 1, torch.int32)}, level=self.index, places="order")

    def costs(self, at: At) -> list[Cost]:
        """The costs of the level and of its body, at its nominal retention or the one that `at` gives."""
        assert isinstance(self.body, Layer)
        share = at.kept.get(self.index, float(self.retention))
        kept = kept_count(at.tokens, self.retention) if share == float(self.retention) else math.ceil(at.tokens * share)
        parameters = self.own_parameters()
        own = Cost(
            self.kind,
            parameters,
            decode_bytes=at.chance * weight_bytes(parameters, at.dtype),
            state_bytes=self.state_spec().bytes(kept, at.dtype),
        )
        return [own, *self.body.costs(at.inside(kept, share))]


def kept_count(tokens: int, retention: Fraction) -> int:
    """ceil(tokens * retention), with the retention as the exact decimal it was written as."""
    return -(-tokens * retention.numerator // retention.denominator)


def runs_above(kept: Tensor, runs: Runs) -> tuple[Int64[Tensor, " K"], Runs]:
    """The rows where `kept` (T) is true, and how they fall into runs; the host reads one vector of the device."""
    if runs.count == 1:  # a sequence by itself, whose steps are made of small operations
        rows = kept.nonzero().flatten()
        tokens = rows.shape[0]
        return rows, Runs(runs.bounds.clamp(max=tokens), tokens, (tokens,))
    counts = F.pad(kept.cumsum(0), (1, 0))
    inner = Runs(counts.index_select(0, runs.bounds), 0)
    tokens = sum(inner.lengths)
    rows = torch.searchsorted(counts[1:], torch.arange(1, tokens + 1, device=counts.device))
    return rows, Runs(inner.bounds, tokens, inner.lengths)


def runs_of(rows: Int64[Tensor, " K"], runs: Runs, lengths: tuple[int, ...] | None = None) -> Runs:
    """The runs of chosen rows (ascending), found without a read by the host. lengths: of the new runs, if known."""
    return Runs(torch.searchsorted(rows, runs.bounds), rows.shape[0], lengths, runs.most)


@dataclass
class Kept:
    """Tokens that every level has met and kept, by its index, while it was watched."""

    met: dict[int, int]
    kept: dict[int, int]

    @classmethod
    def of(cls, levels: Iterable[Resampler]) -> Kept:
        """Nothing seen yet of these levels."""
        return cls({level.index: 0 for level in levels}, {level.index: 0 for level in levels})

    def __call__(self, level: Resampler, stream: Stream, selection: Selection) -> None:
        self.met[level.index] += stream.tokens
        self.kept[level.index] += selection.rows.shape[0]

    @property
    def shares(self) -> tuple[float, ...]:
        """The share of the tokens entering each level that it kept, in the order of the levels."""
        return tuple(self.kept[index] / max(met, 1) for index, met in self.met.items())
