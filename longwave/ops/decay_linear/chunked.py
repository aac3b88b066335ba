"""The torch form of decay linear attention: matrix products within chunks, a recurrent memory between them.

This is the tiling of Lightning Attention (arXiv 2401.04658, section 3) and of chunked simple GLA, for decays that may
differ from token to token. With D(s, t) the decay from after token s to token t, token t of a chunk gets

    o_t = scale (D(start, t) q_t S + sum_{s <= t} D(s, t) (q_t . k_s) v_s),    S the memory before the chunk.

Every decay is the exponential of a number that is at most 0. The usual split D(s, t) = (1 / D(0, s)) D(0, t) would be
cheaper, but its first factor overflows.

Within a span everything is in the dtype of the memory, fp32 or wider, whatever the inputs are: with decays, weights and
memory rounded to bf16 for the products, outputs were off by 4.2e-3 of their norm, and rounding only the outputs, which
cannot be avoided, is 1.7e-3.

Legend: `T` tokens, `N` chunks, `C` tokens of a chunk, `R` runs, `H` heads, `K` key size, `V` value size.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from longwave.ops.decay_linear.chunks import Chunks, Decays
from longwave.streams import Runs

CHUNK = 64
SPAN = 2048  # tokens processed at a time, so that the memory for intermediate results does not grow with the stream


def decay_linear_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_decay: Tensor,
    runs: Runs,
    scale: float,
    states: Tensor,
) -> tuple[Tensor, Tensor]:
    """Decay linear attention, one span of the stream after the other, the memory handed on from each to the next."""
    if not runs.tokens:
        # Nothing attends, but query, key and value take part in the result, so that their weights get gradients of 0.
        return value + (query.sum() + key.sum()), states
    if runs.longest == 1 and not torch.is_grad_enabled():
        return _one_token(query, key, value, log_decay, runs, scale, states)
    spans = runs.once("decay_linear spans", lambda: _spans(runs))  # made by the first layer of a step, used by all
    sizes = [span.chunks.tokens for span in spans]
    decays = [log_decay] * len(spans) if log_decay.shape[0] == 1 else log_decay.split(sizes)
    outputs, finals, carried = list[Tensor](), list[Tensor](), None
    parts = zip(query.split(sizes), key.split(sizes), value.split(sizes), decays, strict=True)
    for span, (q, k, v, decay) in zip(spans, parts, strict=True):
        before = states[span.first : span.last + 1]
        if carried is not None:  # the span continues the run in which the one before it ended
            before = torch.cat([carried, before[1:]])
        output, after = _Chunked.apply(q, k, v, decay, before, span.chunks, scale)
        outputs.append(output)
        carried = after[-1:]  # the run continues in the next span, if there is one, which gives its final memory
        finals.append(after if span is spans[-1] else after[:-1])
    return (outputs[0], finals[0]) if len(spans) == 1 else (torch.cat(outputs), torch.cat(finals))


@dataclass(frozen=True)
class _Stretch:
    """A span of at most SPAN tokens of the stream: a piece of each of the runs from `first` to `last`, in chunks."""

    first: int
    last: int
    chunks: Chunks


def _spans(runs: Runs) -> list[_Stretch]:
    """The stream cut into stretches. Cuts fall between chunks, so a run's chunks do not depend on the other runs."""
    found, start = list[_Stretch](), 0
    for first, pieces in _pieces(runs.lengths):
        stop = start + sum(pieces)
        sizes = runs.bounds[first : first + len(pieces) + 1].clamp(start, stop).diff()
        found.append(_Stretch(first, first + len(pieces) - 1, Chunks(pieces, sizes, CHUNK)))
        start = stop
    return found


def _pieces(lengths: tuple[int, ...]) -> Iterator[tuple[int, tuple[int, ...]]]:
    """For each stretch its first run, and the number of tokens (perhaps 0) of this run and of each following one."""
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
    """Decoding: one step of the recurrence for every run that has a token; the other runs keep their memory."""
    whole, wide = runs.tokens == runs.count, states.dtype
    before = states if whole else states.index_select(0, runs.of_token)
    decay = log_decay.exp().to(wide)[:, :, None, None]
    after = before * decay + torch.matmul(key.to(wide).unsqueeze(3), value.to(wide).unsqueeze(2))
    output = scale * torch.matmul(query.to(wide).unsqueeze(2), after).squeeze(2)
    return output.to(value.dtype), after if whole else states.index_copy(0, runs.of_token, after)


class _Chunked(torch.autograd.Function):
    """One span with its gradient. Only its inputs are kept: the backward pass computes everything else again."""

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
        with torch.autocast(query.device.type, enabled=False):  # which would round what products take
            span = _Span(query, key, value, log_decay, states, chunks, scale)
            return span.joined(span.output()).to(value.dtype), span.after

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, log_decay, states = ctx.saved_tensors
        learned = ctx.needs_input_grad[3]  # whether the log-decay needs a gradient
        with torch.autocast(query.device.type, enabled=False):
            span = _Span(query, key, value, log_decay, states, ctx.chunks, ctx.scale)
            of_query, of_key, of_value, *others = span.backward(gradients[0], gradients[1], learned)
        return of_query.to(query.dtype), of_key.to(key.dtype), of_value.to(value.dtype), *others, None, None


class _Span:
    """A span in chunks: queries, keys and values (N, H, C, K), and the memory before every chunk (N, H, K, V)."""

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
        self.whole, self.until = decays.whole, decays.until
        self.within, self.since = decays.within * scale, decays.since * scale
        self.wide = states.dtype
        self.query, self.key, self.value = (self._by_head(tensor) for tensor in (query, key, value))
        self.before, self.after = self._scan(states)

    def _by_head(self, tokens: Tensor) -> Tensor:
        """(T, H, K) -> (N, H, C, K), in the dtype of the memory."""
        laid = self.chunks.cut(tokens).transpose(1, 2)
        return laid.to(self.wide, memory_format=torch.contiguous_format)

    def _scan(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """The memory before every chunk, and the memory of every run after its last chunk."""
        # What each chunk adds to the memory does not depend on the memory, so all chunks compute it at once.
        added = self._added()
        before = torch.empty_like(added)
        order = self.chunks.order
        current = states.index_select(0, order)
        # Step i takes chunk i of every run that has one; runs lie in `order`, so these are the first `count` of them.
        for begin, count in self.chunks.bounds:
            here = slice(begin, begin + count)
            before[here] = current[:count]
            current[:count] = current[:count].mul_(self.whole[here]).add_(added[here])
        return before, torch.empty_like(current).index_copy_(0, order, current)

    def _added(self) -> Tensor:
        """The part of the memory after each chunk that its own tokens have added: (N, H, K, V)."""
        return torch.matmul((self.key * self.until).transpose(2, 3), self.value)

    def _weights(self) -> Tensor:
        """The attention weights within chunks, scale D(s, t) (q_t . k_s) for s <= t: (N, H, C, C)."""
        return torch.matmul(self.query, self.key.transpose(2, 3)).mul_(self.since)

    def output(self) -> Tensor:
        """The outputs (N, H, C, V): the part that each token reads from the memory, plus the part from its chunk."""
        remembered = torch.matmul(self.query * self.within, self.before)
        return remembered.add_(torch.matmul(self._weights(), self.value))

    def backward(
        self, output: Tensor, finals: Tensor, learned: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor]:
        """Gradients of query, key, value, log-decay (if `learned`) and states.

        output, finals: the gradients of the outputs and of every run's final memory.
        """
        gradient = self._by_head(output)
        faded = gradient * self.within  # the gradient of the part of the outputs that was read from the memory
        after, states = self._scan_back(faded, finals)
        pairs = torch.matmul(gradient, self.value.transpose(2, 3)).mul_(self.since)  # the gradient of q_t . k_s
        query = torch.matmul(pairs, self.key).add_(torch.matmul(faded, self.before.transpose(2, 3)))
        key = torch.matmul(pairs.transpose(2, 3), self.query)
        key.add_(torch.matmul(self.value, after.transpose(2, 3)).mul_(self.until))
        value = torch.matmul(self._weights().transpose(2, 3), gradient)
        value.add_(torch.matmul(self.key * self.until, after))
        decay = self._decay_gradient(query, key, after) if learned else None
        return self.joined(query), self.joined(key), self.joined(value), decay, states

    def _scan_back(self, faded: Tensor, finals: Tensor) -> tuple[Tensor, Tensor]:
        """The gradients of the memory after every chunk, and of the memory before every run: `_scan` backwards."""
        added = torch.matmul(self.query.transpose(2, 3), faded)
        after = torch.empty_like(added)
        order = self.chunks.order
        current = finals.index_select(0, order)
        for begin, count in reversed(self.chunks.bounds):
            here = slice(begin, begin + count)
            after[here] = current[:count]
            current[:count] = current[:count].mul_(self.whole[here]).add_(added[here])
        return after, torch.empty_like(current).index_copy_(0, order, current)

    def _decay_gradient(self, query: Tensor, key: Tensor, after: Tensor) -> Tensor:
        """The gradient of the log-decays, (T, H), or (1, H) for one decay of all tokens; from those of query and key.

        Outputs and memory depend on log-decays only by their sum b_t from the start of the chunk up to token t: q_t is
        always multiplied by exp(b_t) and k_t by exp(-b_t), so the gradient of b_t is q_t . dq_t - k_t . dk_t. The last
        b_t of a chunk also multiplies all of the memory that is handed on. A log-decay is in every b_t from its token
        on.
        """
        of_total = (self.query * query).sum(3) - (self.key * key).sum(3)
        handed_on = self.before * self.whole + self._added()
        of_total[..., -1] += (handed_on * after).sum((2, 3))
        gradient = self.chunks.join(of_total.flip(2).cumsum(2).flip(2).transpose(1, 2))
        return gradient.sum(0, keepdim=True) if self.constant else gradient

    def joined(self, chunks: Tensor) -> Tensor:
        """(N, H, C, K) -> (T, H, K)."""
        return self.chunks.join(chunks.transpose(1, 2))
