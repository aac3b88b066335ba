"""The content of a report about trained models, as typed data: what was trained, how it learned, what it costs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from longwave.benchmarks.growth import Growth
from longwave.reports.page import Fact, PassageToken, Verdict


class LossPoint(NamedTuple):
    """A loss after `step` optimizer steps, and what had been spent by then.

    tokens: trained on. flops: counted FLOPs of training. seconds: of training that passed. loss: in nats per token;
    None where it is not finite.
    """

    step: int
    tokens: int
    flops: float
    seconds: float
    loss: float | None


@dataclass(frozen=True)
class SeedRun:
    """One run of a model, from one seed: its loss curves, and its final figures on all held-out text.

    train: losses with tokens selected as in training, which says nothing about the quality of a model whose training
    looks ahead. held_out, final_loss, bits_per_byte: with tokens selected as at inference. Points are in the order of
    their steps.
    """

    seed: int
    train: Sequence[LossPoint]
    held_out: Sequence[LossPoint]
    final_loss: float
    bits_per_byte: float

    @property
    def end(self) -> LossPoint | None:
        """The last point of either curve: what the run spent in all."""
        return max([*self.train[-1:], *self.held_out[-1:]], key=lambda point: point.step, default=None)


class Generation(NamedTuple):
    """A sample of a model's text."""

    prompt: str
    continuation: str


@dataclass(frozen=True)
class RetentionLevel:
    """The selection of one level of subsampling during training. Shares are of the tokens entering it, in [0, 1].

    target: nominal share of tokens kept. steps: the optimizer steps of the following shares, one each.
    kept: tokens with a score above the threshold, which inference would keep. live: tokens with a score in (0, 1); only
    these learn. falsely_kept: tokens kept by top-k that inference would drop; falsely_dropped: the reverse.
    final: the share kept on held-out text, selected as at inference.
    """

    name: str
    target: float
    steps: Sequence[int]
    kept: Sequence[float]
    live: Sequence[float]
    falsely_kept: Sequence[float]
    falsely_dropped: Sequence[float]
    final: float | None = None

    def __post_init__(self) -> None:
        for field in ("kept", "live", "falsely_kept", "falsely_dropped"):
            if (length := len(getattr(self, field))) != len(self.steps):
                raise ValueError(
                    f"{self.name}: {field} has {length} values; steps has {len(self.steps)}, one value each"
                )


@dataclass(frozen=True)
class ModelRun:
    """A trained model: its runs, one for each seed, its levels, and samples of its text.

    key: identifies the model within a report and in speed rows. name: the name that is shown. setting: what was chosen
    for this model alone, such as `optimizer.lr = 1.5e-3`. levels: of subsampling, outermost first; their curves are of
    the first run. selection: how training selects tokens: by top-k or, like inference, by a threshold. selected_loss:
    the first run's final held-out loss with tokens selected as in training; None where that is no other selection.
    """

    key: str
    name: str
    parameters: int
    layout: str
    runs: Sequence[SeedRun]
    levels: Sequence[RetentionLevel] = ()
    selection: Literal["top-k", "threshold"] = "top-k"
    selected_loss: float | None = None
    generations: Sequence[Generation] = ()
    setting: str = ""

    def __post_init__(self) -> None:
        seeds = [run.seed for run in self.runs]
        if not seeds or len(set(seeds)) < len(seeds):
            raise ValueError(f"{self.name}: runs of the seeds {seeds}; one run or more, each of another seed")


@dataclass(frozen=True)
class Statement:
    """A sentence that the intervals allow, such as "SUBLLM is 1.2 to 2.0 % lower than Llama at equal FLOPs"."""

    text: str
    verdict: Verdict


@dataclass(frozen=True)
class Grid:
    """The values of one setting that were tried for a model, and the held-out loss that each gave.

    model: the key of the model. key: of the setting, such as `optimizer.lr`. losses: one for each value, None where
    training diverged. best: the value of the lowest loss. at_edge: whether it is the first or the last value that was
    tried, so that a better one may lie beyond.
    """

    model: str
    key: str
    values: Sequence[float]
    losses: Sequence[float | None]
    best: float
    at_edge: bool = False

    def __post_init__(self) -> None:
        if len(self.values) != len(self.losses) or self.best not in self.values:
            raise ValueError(f"{self.key}: one loss for each value, of which best ({self.best}) is one")


@dataclass(frozen=True)
class Bound:
    """The best possible value of a figure, by arithmetic.

    basis: the quantities that were counted for it, in words. kind: a `gain` is the largest possible ratio to the
    baseline of the same row (1.4: 1.4 times faster or smaller), a `floor` the smallest possible figure, in its unit.
    """

    value: float
    basis: str
    kind: Literal["gain", "floor"] = "gain"


@dataclass(frozen=True)
class Figure:
    """A measured quantity: the median, the smallest and the largest of its repeats. Less is always better.

    rounds: the repeats in order, for figures that were measured in turn; those of one row are compared round by round,
    so that what slows the machine for a while does not count.
    """

    median: float
    low: float
    high: float
    bound: Bound | None = None
    rounds: Sequence[float] = ()


@dataclass(frozen=True)
class Missing:
    """A figure that was not measured. reason: why, in words."""

    reason: str


@dataclass(frozen=True)
class SpeedRow:
    """A quantity at a context of `tokens` tokens. figures: by model key, in milliseconds, or in bytes for `memory`."""

    kind: Literal["prefill", "decode", "training", "memory"]
    label: str
    tokens: int
    figures: Mapping[str, Figure | Missing]


@dataclass(frozen=True)
class Speed:
    """Speed and memory of models. columns: the titles of the models' columns by key, in order.

    Models that were timed but not trained here, such as another library's, have a column too. Every row needs a figure
    for every column (ValueError). note: how busy the machine was with other work. disturbed: whether that was enough to
    disturb the figures.
    """

    columns: Mapping[str, str]
    rows: Sequence[SpeedRow]
    note: str = ""
    disturbed: bool = False

    def __post_init__(self) -> None:
        for row in self.rows:
            if set(row.figures) != set(self.columns):
                raise ValueError(
                    f"{row.label}: figures of {', '.join(row.figures)}; columns: {', '.join(self.columns)}"
                )


@dataclass(frozen=True)
class Passage:
    """A passage of held-out text as a model read it. code: whether it is shown in a monospaced face."""

    source: str = ""
    tokens: Sequence[PassageToken] = ()
    code: bool = False


@dataclass(frozen=True)
class Report:
    """The content of a report. baseline: the key of the model among `models` with which the others are compared.

    Whatever is left empty, from the speed to the command, has no section on the page. loss_comparable: False where
    models read text through different tokenizers, so that a token of one is not a token of another; all comparisons are
    in bits per byte then. curve_note: how the held-out losses along the training differ from the final ones.
    """

    title: str
    created: str
    models: Sequence[ModelRun]
    baseline: str
    subtitle: str = ""
    statements: Sequence[Statement] = ()
    grids: Sequence[Grid] = ()
    speed: Speed = Speed({}, ())
    growth: Growth | None = None
    passage: Passage = Passage()
    notes: Sequence[str] = ()
    curve_note: str = ""
    run: Sequence[Fact] = ()
    machine: Sequence[Fact] = ()
    command: str = ""
    loss_comparable: bool = True

    def __post_init__(self) -> None:
        keys = [model.key for model in self.models]
        named = [("baseline", self.baseline), *(("grids", grid.model) for grid in self.grids)]
        named += [("growth", curve.model) for curve in self.growth.curves] if self.growth else []
        for field, key in named:
            if key not in keys:
                raise ValueError(f"{field} = {key!r}: no such model; the models are {', '.join(keys)}")

    @property
    def yardstick(self) -> ModelRun:
        """The model with which the others are compared."""
        return next(model for model in self.models if model.key == self.baseline)

    @property
    def others(self) -> list[ModelRun]:
        """All models but the baseline."""
        return [model for model in self.models if model.key != self.baseline]
