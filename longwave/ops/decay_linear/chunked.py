"""Decay linear attention in chunks: matrix products within a chunk, a recurrent state between chunks.

The tiling of Lightning Attention (arXiv 2401.04658, section 3) and of chunked simple GLA, for decays that may differ
from token to token. Every exponent is at most 0: a decay is never split into a growing and a shrinking factor.

Legend: `T` tokens, `N` chunks, `C` tokens of a chunk, `R` runs, `H` heads, `K` key size, `V` value size.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from longwave.ops.decay_linear.chunks import Chunks, Decays
from longwave.stream import Runs

CHUNK = 64
SPAN = 2048  # tokens worked on at a time: what a call needs beside its inputs and outputs does not grow with them


def decay_linear_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_decay: Tensor,
    runs: Runs,
    scale: float,
    states: Tensor,
) -> tuple[Tensor, Tensor]:
    """Spans of the stream in turn, each through the memory that the former one left."""
    if not runs.tokens:
        return value + (query.sum() + key.sum()), states  # of nothing, but every projection gets its gradient
    if runs.longest == 1 and not torch.is_grad_enabled():
        return _one_token(query, key, value, log_decay, runs, scale, states)
    spans = runs.once("decay_linear spans", lambda: _spans(runs))
    sizes = [span.chunks.tokens for span in spans]
    decays = [log_decay] * len(spans) if log_decay.shape[0] == 1 else log_decay.split(sizes)
    outputs, finals, carried = list[Tensor](), list[Tensor](), None
    parts = zip(query.split(sizes), key.split(sizes), value.split(sizes), decays, strict=True)
    for span, (q, k, v, decay) in zip(spans, parts, strict=True):
        before = states[span.first : span.last + 1]
        if carried is not None:  # the span goes on with the run that the former one has ended in
            before = torch.cat([carried, before[1:]])
        output, after = _Chunked.apply(q, k, v, decay, before, span.chunks, scale)
        outputs.append(output)
        carried = after[-1:]
        finals.append(after if span is spans[-1] else after[:-1])
    return (outputs[0], finals[0]) if len(spans) == 1 else (torch.cat(outputs), torch.cat(finals))


@dataclass(frozen=True)
class _Stretch:
    """At most SPAN tokens of the stream: a piece of each of the runs from `first` to `last`, in chunks."""

    first: int
    last: int
    chunks: Chunks


def _spans(runs: Runs) -> list[_Stretch]:
    """The stream in stretches that follow each other; a run is cut at whole chunks only."""
    found, start = list[_Stretch](), 0
    for first, pieces in _pieces(runs.lengths):
        stop = start + sum(pieces)
        sizes = runs.bounds[first : first + len(pieces) + 1].clamp(start, stop).diff()
        found.append(_Stretch(first, first + len(pieces) - 1, Chunks(pieces, sizes, CHUNK)))
        start = stop
    return found


def _pieces(lengths: tuple[int, ...]) -> Iterator[tuple[int, tuple[int, ...]]]:
    """The first run of each stretch, and how many tokens of it and of the following runs; some have none."""
    first, pieces = 0, list[int]()
    for run, length in enumerate(lengths):
        while True:
            room = SPAN - sum(pieces)
            pieces.append(length if length <= room else room // CHUNK * CHUNK)
            length -= pieces[-1]
            if not length:
                break
            yield first, tuple(pieces)
            first, pieces = run, []
    yield first, tuple(pieces)


def _one_token(
    query: Tensor, key: Tensor, value: Tensor, log_decay: Tensor, runs: Runs, scale: float, states: Tensor
) -> tuple[Tensor, Tensor]:
    """Decoding: one step of the recurrence for every run that has a token."""
    whole, wide = runs.tokens == runs.count, states.dtype
    before = states if whole else states.index_select(0, runs.of_token)
    decay = log_decay.exp().to(wide)[:, :, None, None]
    after = before * decay + torch.matmul(key.to(wide).unsqueeze(3), value.to(wide).unsqueeze(2))
    output = scale * torch.matmul(query.to(wide).unsqueeze(2), after).squeeze(2)
    return output.to(value.dtype), after if whole else states.index_copy(0, runs.of_token, after)


class _Chunked(torch.autograd.Function):
    """One span; it keeps its inputs only, and works everything else out again in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        log_decay: Tensor,
        states: Tensor,
        chunks: Chunks,
        scale: float,
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(query, key, value, log_decay, states)
        ctx.chunks, ctx.scale = chunks, scale
        span = _Span(query, key, value, log_decay, states, chunks, scale)
        return span.chunks.join(span.output().transpose(1, 2)).to(value.dtype), span.after

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, log_decay, states = ctx.saved_tensors
        span = _Span(query, key, value, log_decay, states, ctx.chunks, ctx.scale)
        learned = ctx.needs_input_grad[3]
        return *span.backward(gradients[0], gradients[1], learned), None, None


class _Span:
    """Queries, keys and values by chunk and head (N, H, C, K), and the memory before every chunk (N, H, K, V)."""

    def __init__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        log_decay: Tensor,
        states: Tensor,
        chunks: Chunks,
        scale: float,
    ) -> None:
        self.chunks = chunks
        self.constant = log_decay.shape[0] == 1
        decays = Decays.of(log_decay, self.chunks, self.constant)
        self.whole, low = decays.whole.to(states.dtype), query.dtype
        self.within, self.since = (decays.within * scale).to(low), (decays.since * scale).to(low)
        self.until = decays.until.to(low)
        self.query, self.key, self.value = (self._by_head(tensor) for tensor in (query, key, value))
        self.before, self.after = self._scan(states)

    def _by_head(self, tokens: Tensor) -> Tensor:
        """(T, H, K) -> (N, H, C, K)."""
        return self.chunks.cut(tokens).transpose(1, 2).contiguous()

    def _scan(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """The memory before every chunk, and that of every run after its last one."""
        added = torch.matmul((self.key * self.until).transpose(2, 3), self.value).to(states.dtype)
        before = torch.empty_like(added)
        order = self.chunks.order
        current = states.index_select(0, order)
        for begin, count in self.chunks.bounds:
            here = slice(begin, begin + count)
            before[here] = current[:count]
            current[:count] = current[:count].mul_(self.whole[here]).add_(added[here])
        return before, torch.empty_like(current).index_copy_(0, order, current)

    def _weights(self) -> Tensor:
        """What each token takes of every token of its chunk, (N, H, C, C)."""
        return torch.matmul(self.query, self.key.transpose(2, 3)).mul_(self.since)

    def output(self) -> Tensor:
        """(N, H, C, V)."""
        remembered = torch.matmul(self.query * self.within, self.before.to(self.query.dtype))
        return remembered.add_(torch.matmul(self._weights(), self.value))

    def backward(self, output: Tensor, finals: Tensor, learned: bool) -> tuple[Tensor | None, ...]:
        """Gradients of query, key, value, log-decay (if `learned`) and states, from those of output and finals."""
        low = self.query.dtype
        gradient = self._by_head(output.to(low))
        faded = gradient * self.within
        before, (after, states) = self.before.to(low), self._scan_back(faded, finals)
        pairs = torch.matmul(gradient, self.value.transpose(2, 3)).mul_(self.since)
        query = torch.matmul(pairs, self.key).add_(torch.matmul(faded, before.transpose(2, 3)))
        later = after.to(low)
        key = torch.matmul(pairs.transpose(2, 3), self.query)
        key.add_(torch.matmul(self.value, later.transpose(2, 3)).mul_(self.until))
        value = torch.matmul(self._weights().transpose(2, 3), gradient)
        value.add_(torch.matmul(self.key * self.until, later))
        decay = self._decay_gradient(query, key, after) if learned else None
        return self._joined(query), self._joined(key), self._joined(value), decay, states

    def _scan_back(self, faded: Tensor, finals: Tensor) -> tuple[Tensor, Tensor]:
        """The gradient of the memory after every chunk, and of that before the first one of every run."""
        added = torch.matmul(self.query.transpose(2, 3), faded).to(finals.dtype)
        after = torch.empty_like(added)
        order = self.chunks.order
        current = finals.index_select(0, order)
        for begin, count in reversed(self.chunks.bounds):
            here = slice(begin, begin + count)
            after[here] = current[:count]
            current[:count] = current[:count].mul_(self.whole[here]).add_(added[here])
        return after, torch.empty_like(current).index_copy_(0, order, current)

    def _decay_gradient(self, query: Tensor, key: Tensor, after: Tensor) -> Tensor:
        """Every token fades all that its output takes and frees what later ones take of it (T, H), or summed (1, H).

        The gradient of a sum of log-decays up to token t is q_t . dq_t - k_t . dk_t, and at the end of a chunk that of
        all that is handed on.
        """
        wide = after.dtype
        of_total = (self.query.to(wide) * query.to(wide)).sum(3) - (self.key.to(wide) * key.to(wide)).sum(3)
        handed_on = self.before * self.whole + torch.matmul((self.key * self.until).transpose(2, 3), self.value).to(
            wide
        )
        of_total[..., -1] += (handed_on * after).sum((2, 3))
        gradient = self.chunks.join(of_total.flip(2).cumsum(2).flip(2).transpose(1, 2))
        return gradient.sum(0, keepdim=True) if self.constant else gradient

    def _joined(self, chunks: Tensor) -> Tensor:
        """(N, H, C, K) -> (T, H, K)."""
        return self.chunks.join(chunks.transpose(1, 2))
