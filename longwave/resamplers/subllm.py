"""SUBLLM's resampler: a learned score keeps the important tokens, the body runs on those, the rest is put back.

Source: "SUBLLM: A Novel Efficient Architecture with Token Sequence Subsampling for LLM", arXiv 2406.06571, section 3.
The paper's subsampling, upsampling and bypass collapse into one sum: kept tokens take y = x + c w (body(x) - x), and
the others leave exactly as they came. Positions are those of the sequence, at every level.

`causal` selection is our own variant: training keeps what inference keeps, the tokens above a threshold that follows
the quantile of the scores, and a token's weight is its place between that threshold and a second, upper one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from decimal import Decimal, InvalidOperation
from fractions import Fraction
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float, Float64
from torch import Tensor, nn

from longwave.config import ModelConfig, Strict
from longwave.draws import uniform
from longwave.errors import UserError, require
from longwave.laws import ALL, Law, Laws
from longwave.part import InitialDraws, Site
from longwave.resamplers.balancer import balance, limit, limits
from longwave.resamplers.base import Clock, Resampler, Selection, kept_count, runs_above, runs_of
from longwave.resamplers.selection import SAMPLERS, top_scores, window_keys
from longwave.streams import Runs, Stream, Windows

_BALANCER_DRAW, _BYPASS_DRAW, _DISCARD_DRAW = range(3)
_CAUSAL_ONLY = ("threshold_memory", "threshold_ramp")
_PUBLISHED_ONLY = ("discard_sampling", "ranking", "balancer", "exact_gaussian")


@dataclass(frozen=True)
class SubllmConfig(Strict):
    """SUBLLM's subsampling, balancer and bypass (arXiv 2406.06571); the defaults are the published ones.

    selection: `published` trains with top-k over the window and runs with a threshold at 0; `causal` trains and runs
        the same function, with a threshold that follows the quantile of the scores (ours).
    discard_sampling: which discarded weight is subtracted from a kept one: a `uniform` draw, the next in `ranked`
        order, or `none` (a control that keeps nearly everything at inference).
    ranking: tokens compete within the training `window` or within their own `document`.
    balancer_*: the gradient nudge that centres the scores; `exact_gaussian` mends its missing square root of 2.
    bypass_*: range of the per-channel bypass, whose lower end falls linearly over `bypass_steps` optimizer steps.
    score_lr_scale: learning rate of the score vector, relative to the model's.
    threshold_memory: how much of the causal threshold is kept at each optimizer step.
    threshold_ramp: the share of the kept tokens whose causal weight lies below 1.
    retention_steps: optimizer steps over which training comes to a level's retention, from `retention_start` on a
        straight line; 0 for the retention at once. Inference follows: causal thresholds by themselves, published scores
        by what training makes of them.
    """

    selection: Literal["published", "causal"] = "published"
    discard_sampling: Literal["uniform", "ranked", "none"] = "uniform"
    ranking: Literal["window", "document"] = "window"
    balancer: bool = True
    balancer_margin: float = 0.05
    balancer_min_abs: float = 1.0
    balancer_max_abs: float = 4.0
    balancer_grad_scale: float = 0.04
    balancer_steps: int = 8000
    balancer_final_probability: float = 0.25
    exact_gaussian: bool = False
    bypass_probability: float = 0.6
    bypass_floor: float = 0.9
    bypass_final_floor: float = 0.2
    bypass_steps: int = 20000
    score_lr_scale: float = 0.5
    threshold_memory: float = 0.98
    threshold_ramp: float = 0.5
    retention_start: float = 0.9
    retention_steps: int = 0

    def __post_init__(self) -> None:
        for name in ("balancer_final_probability", "bypass_probability", "threshold_memory"):
            value = getattr(self, name)
            require(0 <= value <= 1, f"subllm.{name} = {value}: between 0 and 1")
        for name in ("threshold_ramp", "retention_start"):
            value = getattr(self, name)
            require(0 < value <= 1, f"subllm.{name} = {value}: more than 0, at most 1")
        for name in ("balancer_steps", "bypass_steps"):
            value = getattr(self, name)
            require(value > 0, f"subllm.{name} = {value}: 1 or more optimizer steps")
        require(self.retention_steps >= 0, f"subllm.retention_steps = {self.retention_steps}: 0 or more")
        idle = self.retention_start != SubllmConfig.retention_start and not self.retention_steps
        require(not idle, "subllm.retention_start has no effect without subllm.retention_steps; give both")
        idle = _CAUSAL_ONLY if self.selection == "published" else _PUBLISHED_ONLY
        for entry in fields(self):
            changed = entry.name.startswith(idle) and getattr(self, entry.name) != entry.default
            require(not changed, f"subllm.{entry.name} has no effect with selection = {self.selection!r}; leave it out")


SubllmConfig.only_training = frozenset(entry.name for entry in fields(SubllmConfig)) - {"selection"}


class Subllm(Resampler):
    """One subsampling level around a body of layers; its one argument is the retention ratio.

    `threshold` holds the score above which a token is kept, and, for causal selection, the one where its weight
    reaches 1.
    """

    tables: ClassVar[Mapping[str, type]] = {"subllm": SubllmConfig}
    reads_trees = True  # a token is kept by its own score

    def __init__(self, config: ModelConfig, arguments: tuple[str, ...], site: Site, index: int) -> None:
        super().__init__(config, arguments, site, index)
        require(len(arguments) == 1, f"layout: subllm takes one argument, its retention, not {len(arguments)}")
        self.config: SubllmConfig = config.table("subllm")
        self._retention = retention_of(arguments[0])
        self._start = Fraction(str(self.config.retention_start)) if self.config.retention_steps else self._retention
        starts = f"subllm.retention_start = {self.config.retention_start}"
        require(self._start >= self._retention, f"{starts}: at least the retention of the levels, here {arguments[0]}")
        self.score = _Score(config.hidden_size, self.config.score_lr_scale)
        self.bypass = nn.Parameter(torch.full((config.hidden_size,), 0.5))
        self.threshold = _Threshold()
        self.clock: Clock | None = None

    @property
    def retention(self) -> Fraction:
        return self._retention

    @property
    def laws(self) -> Laws:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Published training ranks tokens against later ones, and against the other documents of their window."""
        if self.config.selection == "causal":
            return Laws(training=frozenset({Law.COMPANY, Law.CAUSALITY}), inference=ALL)
        by_document = self.config.ranking == "document"
        return Laws(training=frozenset({Law.COMPANY}) if by_document else frozenset(), inference=ALL)

    def select(self, hidden: Float[Tensor, "T D"], stream: Stream) -> Selection:
        scores = self.score(hidden)
        if not self.training:
            return self._above(scores, stream.runs, None)
        clock, windows = self._running_clock(), stream.windows or Windows.each(stream.runs)
        if self.config.selection == "published":
            return self._top(self._balanced(scores, clock, windows), stream.runs, windows, clock)
        if torch.is_grad_enabled():
            shares = [float(self.retention_at(step)) for step in (clock.step, clock.step + 1)]
            self.threshold.observe(scores.detach(), shares, self.config.threshold_ramp)
        return self._above(scores, stream.runs, windows)

    def mix(
        self,
        hidden: Float[Tensor, "T D"],
        kept: Float[Tensor, "K D"],
        changed: Float[Tensor, "K D"],
        selection: Selection,
        stream: Stream,
    ) -> Float[Tensor, "T D"]:
        """Kept tokens take y = x + c w (body(x) - x); the others leave as they came."""
        share = (selection.weights.unsqueeze(1) * self._bypass(stream)).to(kept)
        return hidden.index_add(0, selection.rows, (changed - kept) * share)

    def _above(self, scores: Tensor, runs: Runs, windows: Windows | None) -> Selection:
        """The tokens whose score exceeds the threshold: a choice that looks at each token alone."""
        rows, inner = runs_above(scores > self.threshold.low, runs)
        weights = self.weights_of(scores).index_select(0, rows)
        return Selection(rows, inner, weights, scores, None if windows is None else windows.by_run(inner))

    def _top(self, scores: Tensor, runs: Runs, windows: Windows, clock: Clock) -> Selection:
        """The highest scores of each window, less what is subtracted of them; their number is known beforehand."""
        if self.config.ranking == "document":
            windows = windows.by_run(runs)
        assert windows.ids is not None
        keys = window_keys(clock.seed, clock.step, self._draw(_DISCARD_DRAW), windows.ids)
        sampler, share = SAMPLERS[self.config.discard_sampling], self.retention_at(clock.step)
        rows, weights = top_scores(scores, self.weights_of(scores), windows.sizes, keys, share, sampler)
        kept = tuple([kept_count(size, share) for size in windows.sizes])
        inner = runs_of(rows, runs, kept if windows.are_runs else None)
        return Selection(rows, inner, weights, scores, windows.resized(kept))

    def weights_of(self, scores: Tensor) -> Tensor:
        """The share of the body's result that a token takes, from its score."""
        if self.config.selection == "causal":
            scores = (scores - self.threshold.low) / self.threshold.width
        return scores.clamp(0, 1)

    def _balanced(self, scores: Tensor, clock: Clock, windows: Windows) -> Tensor:
        probability = self.balancer_probability(clock.step)
        if not self.config.balancer or not (scores.requires_grad and torch.is_grad_enabled()):
            return scores
        if uniform(clock.seed, clock.step, self._draw(_BALANCER_DRAW), *windows.samples[:1]) >= probability:
            return scores
        target, margin = float(self.retention_at(clock.step)), self.config.balancer_margin
        shape = (self.config.balancer_min_abs, self.config.balancer_max_abs, self.config.balancer_grad_scale)
        return balance(scores, limits(target - margin, target + margin, *shape, self.config.exact_gaussian))

    def _bypass(self, stream: Stream) -> Tensor:
        if not (self.training and torch.is_grad_enabled()):
            return self.bypass
        clock, first = self._running_clock(), (0,) if stream.windows is None else stream.windows.samples[:1]
        draw = uniform(clock.seed, clock.step, self._draw(_BYPASS_DRAW), *first)
        if draw >= self.config.bypass_probability:
            return self.bypass
        return limit(self.bypass, self.bypass_floor(clock.step), 1.0)

    def retention_at(self, step: int) -> Fraction:
        """The share of tokens to keep at a training step: the scheduled one at first, the level's own in the end."""
        steps = self.config.retention_steps
        left = Fraction(max(steps - step, 0), max(steps, 1))
        return self.retention + left * (self._start - self.retention)

    def balancer_probability(self, step: int) -> float:
        """The probability that the Balancer acts: 1 at first, falling linearly to its final value."""
        done = min(1.0, step / self.config.balancer_steps)
        return 1 + done * (self.config.balancer_final_probability - 1)

    def bypass_floor(self, step: int) -> float:
        """The lower end of the bypass's range, falling linearly."""
        done = min(1.0, step / self.config.bypass_steps)
        return self.config.bypass_floor + done * (self.config.bypass_final_floor - self.config.bypass_floor)

    def follow(self, clock: Clock) -> None:
        """Told of the optimizer step; what causal thresholds saw since the last one is folded in."""
        if self.clock is not None and clock.step > self.clock.step:
            self.threshold.follow(self.config.threshold_memory)
        self.clock = clock

    def _running_clock(self) -> Clock:
        if self.clock is None:
            raise UserError(
                "a SUBLLM in training mode needs the optimizer step, which its schedules follow: "
                "call model.set_step(step, seed) before each step, or model.eval() to run it"
            )
        return self.clock

    def _draw(self, purpose: int) -> int:
        return 3 * self.index + purpose

    @torch.no_grad()
    def metrics(self, selection: Selection) -> Mapping[str, Float[Tensor, ""]]:
        """Shares of the entering tokens: above the threshold, live (0 < w < 1), wrongly kept or dropped by top-k."""
        scores = selection.scores.detach()
        above, weights = scores > self.threshold.low, self.weights_of(scores)
        kept = torch.zeros_like(above).index_fill(0, selection.rows, True)
        dropped = ~kept
        return {
            "positive": above.float().mean(),
            "live": ((weights > 0) & (weights < 1)).float().mean(),
            "false_keep": (kept & ~above).float().mean(),
            "false_drop": (dropped & above).float().mean(),
            "discarded_weight": (weights * dropped).sum() / dropped.sum().clamp(min=1),
        }

    @torch.no_grad()
    def force(self, scores: Float[Tensor, " T"]) -> None:
        """Puts the threshold between the last score of the nominal share and the first beyond it."""
        ordered = scores.double().sort(descending=True).values
        kept = min(round(ordered.numel() * float(self.retention)), ordered.numel() - 1)
        self.threshold.low.copy_((ordered[kept - 1] + ordered[kept]) / 2 if kept else ordered[0])

    @property
    def cutoff(self) -> float:
        return float(self.threshold.low)

    def reset(self) -> None:
        self.threshold = _Threshold()

    def draw(self, draws: InitialDraws) -> None:
        draws.uniform(self.score.weight, draws.width**-0.5, self.site.name)


class _Score(nn.Module):
    """x . a in fp32, each row by itself, so that a token scores the same alone and in company."""

    def __init__(self, size: int, lr_scale: float) -> None:
        super().__init__()
        self.lr_scale = lr_scale
        self.weight = nn.Parameter(torch.empty(size).uniform_(-(size**-0.5), size**-0.5))

    def forward(self, hidden: Float[Tensor, "T D"]) -> Float[Tensor, " T"]:
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        return (hidden.to(dtype) * self.weight.to(dtype)).sum(-1)


class _Threshold(nn.Module):
    """The score above which a token is kept and the one where its weight is 1; always in double precision."""

    low: Tensor
    high: Tensor
    following: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("low", torch.zeros((), dtype=torch.float64))
        self.register_buffer("high", torch.ones((), dtype=torch.float64))
        self._seen: list[Tensor] = []
        self.register_buffer("following", torch.zeros((), dtype=torch.int64))

    @property
    def width(self) -> Tensor:
        """Distance of the two, kept away from zero."""
        return (self.high - self.low).clamp(min=1e-6)

    def start(self, low: Tensor, high: Tensor) -> None:
        """Puts both where they are known to lie, from which they then move gradually."""
        self.low.copy_(low)
        self.high.copy_(high)
        self.following.fill_(1)

    @torch.no_grad()
    def observe(self, scores: Tensor, shares: Sequence[float], ramp: float) -> None:
        """Notes quantiles of a training stream, for the share to keep now and for that of the next step."""
        if scores.numel():
            ordered = scores.double().sort(descending=True).values
            self._seen.append(torch.stack([quantiles(ordered, share, ramp) for share in shares]))

    @torch.no_grad()
    def follow(self, memory: float) -> None:
        """Moves both towards what was observed since the last call, at once the first time.

        What the next share changes in the quantiles is added whole, so that a schedule is followed without delay.
        """
        if not self._seen:
            return
        now, following = torch.stack(self._seen).mean(0)
        step = 1 - memory * (self.following > 0).double()
        self.low.lerp_(now[0], step).add_(following[0] - now[0])
        self.high.lerp_(now[1], step).add_(following[1] - now[1])
        self.following += 1
        self._seen.clear()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Moves with the model, but is never rounded to its dtype."""
        low, high = self.low, self.high
        super()._apply(fn, recurse)
        self.low, self.high = _unrounded(low, self.low), _unrounded(high, self.high)
        return self


def quantiles(ordered: Float64[Tensor, " T"], share: float, ramp: float) -> Float64[Tensor, " bounds"]:
    """Of descending scores the one above which `share` of all lie, and the one with `ramp` of these below it."""
    count = ordered.numel()
    places = [min(count - 1, round(count * part)) for part in (share, share * (1 - ramp))]
    return torch.stack([ordered[place] for place in places])


def _unrounded(before: Tensor, after: Tensor) -> Tensor:
    """The value of `before` where `after` lies; a meta tensor has no value to keep."""
    return after.double() if before.is_meta else before.to(after.device)


def retention_of(text: str) -> Fraction:
    """A retention ratio as the exact decimal that was written; a UserError if it is outside (0, 1]."""
    try:
        ratio = Decimal(text)
        legal = Decimal("1e-9") <= ratio <= 1
    except InvalidOperation:
        raise UserError(f"layout: retention {text!r} is not a number in (0, 1]") from None
    require(legal, f"layout: retention {text} is outside (0, 1]")
    return Fraction(ratio)
