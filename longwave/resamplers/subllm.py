"""SUBLLM's resampler: a learned score keeps the important tokens, the body runs on those, the rest is put back.

Source: "SUBLLM: A Novel Efficient Architecture with Token Sequence Subsampling for LLM", arXiv 2406.06571, section 3.
The paper's subsampling, upsampling and bypass collapse into one sum: kept tokens take y = x + c w (body(x) - x), and
the others leave exactly as they came. Positions are those of the sequence, at every level.

`causal` selection is our own variant: training keeps what inference keeps, the tokens above a threshold that follows
the quantile of the scores, and a token's weight is its place between that threshold and a second, upper one.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from longwave.config import ModelConfig, SubllmConfig, retention_of
from longwave.costs import Cost, weight_bytes
from longwave.draws import uniform
from longwave.errors import UserError, require
from longwave.laws import ALL, Law, Laws
from longwave.layers.block import Stack
from longwave.mixers import Site
from longwave.resamplers.regulators import balance, limit, limits
from longwave.resamplers.selection import SAMPLERS, Selection, above_threshold, kept_count, top_scores, window_keys
from longwave.states import PerToken, State, StateSpec
from longwave.stream import Stream, Windows

_BALANCER_DRAW, _BYPASS_DRAW, _DISCARD_DRAW = range(3)


@dataclass(frozen=True)
class Clock:
    """The optimizer step that schedules follow, and the seed that draws are keyed by."""

    step: int
    seed: int


class Subllm(nn.Module):
    """One subsampling level around a body of layers.

    arguments: the retention ratio, of the tokens that enter this level. site.level is the enclosing level, `index` this
    one. `threshold` holds the score above which a token is kept, and, for causal selection, the one where its weight
    reaches 1; `expected_retention` is what the cost formulas assume.
    """

    def __init__(self, config: ModelConfig, arguments: tuple[str, ...], body: Stack, site: Site, index: int) -> None:
        super().__init__()
        require(len(arguments) == 1, f"layout: subllm takes one argument, its retention, not {len(arguments)}")
        self.config = config.subllm or SubllmConfig()
        self.retention, self.retention_text = retention_of(arguments[0]), arguments[0]
        self.expected_retention = float(self.retention)
        self.site, self.index = site, index
        self.score = _Score(config.hidden_size, self.config.score_lr_scale)
        self.bypass = nn.Parameter(torch.full((config.hidden_size,), 0.5))
        self.threshold = _Threshold()
        self.body = body
        self.clock: Clock | None = None
        self.shares: dict[str, Tensor] = {}
        self.kept_of = [0, 0]  # tokens kept and tokens met at inference, for whoever asks how much is really kept

    @property
    def laws(self) -> Laws:
        """Published training ranks tokens against later ones, and against the other documents of their window."""
        if self.config.selection == "causal":
            return Laws(training=frozenset({Law.COMPANY, Law.CAUSALITY}), inference=ALL)
        by_document = self.config.ranking == "document"
        return Laws(training=frozenset({Law.COMPANY}) if by_document else frozenset(), inference=ALL)

    def forward(self, hidden: Float[Tensor, "T D"], stream: Stream, state: State | None) -> Float[Tensor, "T D"]:
        windows = stream.windows or Windows(stream.lengths, tuple(range(len(stream.lengths))))
        chosen = self._select(hidden, stream, windows)
        inner = self._inner_stream(stream, windows, chosen)
        if state is not None:
            self._remember(inner, state)
        if not inner.tokens and not self.training:
            return hidden  # in training an empty body runs too, so that sharded ranks stay in step
        kept = hidden.index_select(0, chosen.rows)
        change = (self.body(kept, inner, state) - kept) * (chosen.weights.unsqueeze(1) * self._bypass(windows)).to(kept)
        return hidden.index_add(0, chosen.rows, change)

    def _select(self, hidden: Tensor, stream: Stream, windows: Windows) -> Selection:
        scores = self.score(hidden)
        if not self.training:
            chosen = above_threshold(scores, self._weights(scores), self.threshold.low)
            self.kept_of[0] += chosen.rows.numel()
            self.kept_of[1] += scores.numel()
            return chosen
        clock = self._running_clock()
        if self.config.selection == "causal":
            if torch.is_grad_enabled():
                self.threshold.observe(scores.detach(), float(self.retention))
            chosen = above_threshold(scores, self._weights(scores), self.threshold.low)
        else:
            chosen = self._top(self._balanced(scores, clock, windows), stream, windows, clock)
        self._count(scores.detach(), chosen)
        return chosen

    def _top(self, scores: Tensor, stream: Stream, windows: Windows, clock: Clock) -> Selection:
        keys = window_keys(clock.seed, clock.step, self._draw(_DISCARD_DRAW), windows.samples)
        sizes = windows.sizes
        if self.config.ranking == "document":
            keys = [keys[window] for window in _window_of_runs(stream.lengths, sizes)]
            sizes = stream.lengths
        return top_scores(
            scores, self._weights(scores), sizes, keys, self.retention, SAMPLERS[self.config.discard_sampling]
        )

    def _weights(self, scores: Tensor) -> Tensor:
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
        target, margin = float(self.retention), self.config.balancer_margin
        shape = (self.config.balancer_min_abs, self.config.balancer_max_abs, self.config.balancer_grad_scale)
        return balance(scores, limits(target - margin, target + margin, *shape, self.config.exact_gaussian))

    def _bypass(self, windows: Windows) -> Tensor:
        if not (self.training and torch.is_grad_enabled()):
            return self.bypass
        clock = self._running_clock()
        draw = uniform(clock.seed, clock.step, self._draw(_BYPASS_DRAW), *windows.samples[:1])
        return (
            limit(self.bypass, self.bypass_floor(clock.step), 1.0)
            if draw < self.config.bypass_probability
            else self.bypass
        )

    def balancer_probability(self, step: int) -> float:
        """How often the Balancer acts: 1 at first, falling linearly to its final probability."""
        done = min(1.0, step / self.config.balancer_steps)
        return 1 + done * (self.config.balancer_final_probability - 1)

    def bypass_floor(self, step: int) -> float:
        """The lower end of the bypass's range, falling linearly."""
        done = min(1.0, step / self.config.bypass_steps)
        return self.config.bypass_floor + done * (self.config.bypass_final_floor - self.config.bypass_floor)

    def set_clock(self, clock: Clock) -> None:
        """Tells the optimizer step about to run; what causal thresholds saw since the last call is folded in."""
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

    def _inner_stream(self, stream: Stream, windows: Windows, chosen: Selection) -> Stream:
        if len(stream.lengths) == 1:
            lengths = [chosen.rows.numel()]
        else:
            runs = stream.run_of_token.index_select(0, chosen.rows)
            lengths = torch.bincount(runs, minlength=len(stream.lengths)).tolist()
        return stream.gather(
            chosen.rows, lengths, self._inner_windows(stream, windows, lengths) if self.training else None
        )

    def _inner_windows(self, stream: Stream, windows: Windows, lengths: list[int]) -> Windows:
        """Windows of the kept tokens; only a selection of known size per window can go on ranking within it."""
        by_window = self.config.selection == "published" and self.config.ranking == "window"
        if by_window:
            return Windows(tuple(kept_count(size, self.retention) for size in windows.sizes), windows.samples)
        samples = tuple(windows.samples[window] for window in _window_of_runs(stream.lengths, windows.sizes))
        return Windows(tuple(lengths), samples)

    def _remember(self, inner: Stream, state: State) -> None:
        assert inner.slots is not None
        for slot, order in zip(inner.slots, inner.order.split(inner.lengths), strict=True):
            if order.numel():
                state.of(self.site.name, slot).append(order=order.view(1, -1, 1))

    @torch.no_grad()
    def _count(self, scores: Tensor, chosen: Selection) -> None:
        """Shares of the entering tokens: above the threshold, live (0 < w < 1), wrongly kept or dropped by top-k."""
        above = scores > self.threshold.low
        weights = self._weights(scores)
        kept = torch.zeros_like(above).index_fill(0, chosen.rows, True)
        dropped = ~kept
        self.shares = {
            "positive": above.float().mean(),
            "live": ((weights > 0) & (weights < 1)).float().mean(),
            "false_keep": (kept & ~above).float().mean(),
            "false_drop": (dropped & above).float().mean(),
            "discarded_weight": (weights * dropped).sum() / dropped.sum().clamp(min=1),
        }

    def state_spec(self) -> StateSpec:
        """The place in the sequence of every kept token, by which states are truncated."""
        return StateSpec({"order": PerToken(1, 1, torch.int32)}, None, self.index)

    def costs(self, tokens: int, chance: float, dtype: torch.dtype) -> list[Cost]:
        """What the level and its body cost at `tokens` tokens entering it, at the expected retention."""
        parameters = self.score.weight.numel() + self.bypass.numel()
        kept = self.kept(tokens)
        own = Cost(
            f"subllm {self.retention_text}",
            parameters,
            decode_bytes=chance * weight_bytes(parameters, dtype),
            state_bytes=self.state_spec().bytes(kept, dtype),
        )
        return [own, *self.body.costs(kept, chance * self.expected_retention, dtype)]

    def kept(self, tokens: int) -> int:
        """Tokens that are expected to stay of `tokens`."""
        if self.expected_retention == float(self.retention):
            return kept_count(tokens, self.retention)
        return math.ceil(tokens * self.expected_retention)


def _window_of_runs(lengths: tuple[int, ...], sizes: tuple[int, ...]) -> list[int]:
    """The window that each run lies in."""
    windows, window, left = [], 0, sum(sizes[:1])
    for length in lengths:
        while left == 0 and window + 1 < len(sizes):
            window += 1
            left = sizes[window]
        windows.append(window)
        left -= length
    return windows


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

    @torch.no_grad()
    def observe(self, scores: Tensor, retention: float) -> None:
        """Notes two quantiles of a training stream: that which keeps `retention`, and that which keeps half of it."""
        if scores.numel():
            ordered = scores.double().sort(descending=True).values
            places = [min(scores.numel() - 1, round(scores.numel() * share)) for share in (retention, retention / 2)]
            self._seen.append(ordered[places])

    @torch.no_grad()
    def follow(self, memory: float) -> None:
        """Moves both towards what was observed since the last call, at once the first time."""
        if not self._seen:
            return
        low, high = torch.stack(self._seen).mean(0)
        memory = memory if self.following else 0.0
        self.low.lerp_(low, 1 - memory)
        self.high.lerp_(high, 1 - memory)
        self.following += 1
        self._seen.clear()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Moves with the model, but is never rounded to its dtype."""
        low, high = self.low, self.high
        super()._apply(fn, recurse)
        self.low, self.high = _unrounded(low, self.low), _unrounded(high, self.high)
        return self


def _unrounded(before: Tensor, after: Tensor) -> Tensor:
    """The value of `before` where `after` lies; a meta tensor has no value to keep."""
    return after.double() if before.is_meta else before.to(after.device)
