"""Benchmark cases of decay linear attention: whole prompts beside softmax attention, and one token of each sequence.

Legend: `B` sequences of `N` tokens, `T` = B N, `H` heads, `K` head size.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from longwave.costs import Work
from longwave.ops.attention.benchmark import dense, sample
from longwave.ops.benchmark import Case, Shape, forms_here
from longwave.ops.decay_linear import DECAY_LINEAR, decay_linear_attention
from longwave.streams import Runs


def cases(shape: Shape) -> list[Case]:
    """A prompt and a decoding step, with Lightning Attention's decays and as many KV heads as heads."""
    slopes = 2.0 ** (-8 * torch.arange(1, shape.heads + 1, dtype=torch.float32) / shape.heads)
    return [
        _prefill(shape, -slopes.unsqueeze(0).to(shape.device)),
        _decode(shape, -slopes.unsqueeze(0).to(shape.device)),
    ]


def _prefill(shape: Shape, log_decay: Tensor) -> Case:
    """B sequences, laid end to end as in a stream."""
    tokens, runs = shape.batch * shape.context, Runs.of([shape.context] * shape.batch, shape.device)
    inputs = tuple(shape.normal(name, tokens, shape.heads, shape.head_size) for name in ("query", "key", "value"))
    rows, scale = sample(tokens, shape), shape.head_size**-0.5
    flops = 4 * tokens * shape.heads * shape.head_size**2
    read = sum(one.nbytes for one in inputs)

    def run(query: Tensor, key: Tensor, value: Tensor, form: str) -> Tensor:
        return decay_linear_attention(query, key, value, log_decay, runs, scale=scale, form=form)[0]

    return Case(
        "decay_linear prefill",
        shape.context,
        tokens,
        inputs,
        {name: partial(run, form=name) for name in forms_here(DECAY_LINEAR, shape)},
        partial(_rows_of_prefill, log_decay=log_decay, rows=rows, context=shape.context, scale=scale),
        Work(flops, read),
        Work(2 * flops, 2 * read),
        rows,
        beside=dense(shape, runs, kv_heads=shape.heads),
    )


def _rows_of_prefill(
    query: Tensor, key: Tensor, value: Tensor, log_decay: Tensor, rows: Tensor | None, context: int, scale: float
) -> Tensor:
    """The given rows (all by default) of o_t = scale sum_{s <= t} exp((t - s) g) (q_t . k_s) v_s."""
    found = []
    for row in range(len(query)) if rows is None else rows.tolist():
        seen = slice(row - row % context, row + 1)
        distance = torch.arange(row % context, -1, -1, dtype=query.dtype, device=query.device).unsqueeze(1)
        weights = (query[row] * key[seen]).sum(-1) * (log_decay.to(query.dtype) * distance).exp()
        found.append(scale * torch.einsum("th,thv->hv", weights, value[seen]))
    return torch.stack(found)


def _decode(shape: Shape, log_decay: Tensor) -> Case:
    """One new token of each of B sequences, whose memory is given."""
    one = (shape.batch, shape.heads, shape.head_size)
    inputs = tuple(shape.normal(name, *one) for name in ("query", "key", "value"))
    states, runs = shape.normal("states", *one, shape.head_size).float(), Runs.of([1] * shape.batch, shape.device)

    def run(query: Tensor, key: Tensor, value: Tensor, states: Tensor, form: str) -> Tensor:
        wide = states.to(torch.promote_types(query.dtype, torch.float32))
        options = {"scale": shape.head_size**-0.5, "states": wide, "form": form}
        return decay_linear_attention(query, key, value, log_decay, runs, **options)[0]

    return Case(
        "decay_linear decode",
        1,
        shape.batch,
        (*inputs, states),
        {name: partial(run, form=name) for name in forms_here(DECAY_LINEAR, shape)},
        partial(run, form="reference"),
        Work(4 * states.numel(), 2 * states.nbytes),
    )
