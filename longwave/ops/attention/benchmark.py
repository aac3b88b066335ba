"""Benchmark cases of attention: whole prompts, forward and backward, and one query of each sequence after its past.

Legend: `B` sequences of `N` tokens, `T` = B N, `H` query heads, `G` KV heads, `K` head size.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from longwave.costs import Work, visible_pairs
from longwave.ops.attention import ATTENTION, Pattern, attention
from longwave.ops.benchmark import Beside, Case, Shape, forms_here
from longwave.streams import Places, Runs

_OF_ONE_QUERY = ("compiled",)  # forms with a kernel for single queries only, which in a prompt would time torch again
_FEW, _SAMPLED = 512, 24  # up to so many queries all are checked; of more, a sample of so many


def cases(shape: Shape) -> list[Case]:
    """A prompt and a decoding step; both again with a sliding window, where the model has one."""
    windows = [None] if shape.window is None else [None, shape.window]
    return [make(shape, window) for window in windows for make in (_prefill, _decode)]


def _prefill(shape: Shape, window: int | None) -> Case:
    """Every token of B sequences attends to its own past; the sequences lie end to end as in a stream."""
    tokens = shape.batch * shape.context
    query = shape.normal("query", tokens, shape.heads, shape.head_size)
    key, value = (shape.normal(name, tokens, shape.kv_heads, shape.head_size) for name in ("key", "value"))
    runs, rows = Runs.of([shape.context] * shape.batch, shape.device), sample(tokens, shape)
    options = {"pattern": Pattern(window), "scale": shape.head_size**-0.5}
    pairs = shape.batch * visible_pairs(shape.context, window)
    flops, read = 4 * shape.heads * shape.head_size * pairs, sum(one.nbytes for one in (query, key, value))
    names = [name for name in forms_here(ATTENTION, shape) if name not in _OF_ONE_QUERY]
    return Case(
        f"attention prefill{_suffix(window)}",
        shape.context,
        tokens,
        (query, key, value),
        {name: partial(_stream, form=name, runs=runs, **options) for name in names},
        partial(_rows_of_prefill, rows=rows, context=shape.context, **options),
        Work(flops, read),
        Work(2 * flops, 2 * read),
        rows,
    )


def dense(shape: Shape, runs: Runs, kv_heads: int | None = None) -> dict[str, Beside]:
    """Causal softmax attention over the same queries, keys and values, for the benchmark of another op.

    kv_heads: number of KV heads, where it is not the shape's.
    """
    flops = 4 * shape.heads * shape.head_size * shape.batch * visible_pairs(shape.context)
    heads = shape.heads + 2 * (kv_heads or shape.kv_heads)
    read = runs.tokens * heads * shape.head_size * shape.dtype.itemsize
    run = partial(_stream, runs=runs, scale=shape.head_size**-0.5)
    return {"dense attention": Beside(run, Work(flops, read), Work(2 * flops, 2 * read))}


def _stream(query: Tensor, key: Tensor, value: Tensor, runs: Runs, **options: Any) -> Tensor:
    """Attention of a stream to itself, with keys and values (T, G, K) as a layer's projections give them."""
    return attention(query, key.transpose(0, 1), value.transpose(0, 1), runs, **options).output


def _decode(shape: Shape, window: int | None) -> Case:
    """One query of each of B sequences attends to N remembered keys, head-major."""
    past = (shape.kv_heads, shape.batch * shape.context, shape.head_size)
    query = shape.normal("query", shape.batch, shape.heads, shape.head_size)
    keys, values = shape.normal("keys", *past), shape.normal("values", *past)
    runs, places = remembered(shape)
    seen = min(window or shape.context, shape.context)

    def run(query: Tensor, keys: Tensor, values: Tensor, form: str) -> Tensor:
        options = {"pattern": Pattern(window), "scale": shape.head_size**-0.5, "form": form}
        return attention(query, keys, values, runs, places, **options).output

    return Case(
        f"attention decode{_suffix(window)}",
        shape.context,
        shape.batch,
        (query, keys, values),
        {name: partial(run, form=name) for name in forms_here(ATTENTION, shape)},
        partial(run, form="reference"),
        Work(
            4 * shape.heads * shape.head_size * shape.batch * seen,
            2 * keys.nbytes * seen // shape.context,
        ),
    )


def remembered(shape: Shape) -> tuple[Runs, Places]:
    """B runs of one new token, the last of the N keys of its sequence; the sequences' keys lie one after another."""
    ends = torch.arange(1, shape.batch + 1, device=shape.device) * shape.context
    return Runs.of([1] * shape.batch, shape.device), Places(ends - shape.context, ends)


def _suffix(window: int | None) -> str:
    return "" if window is None else f", window {window:,}"


def sample(tokens: int, shape: Shape) -> Tensor | None:
    """The rows to check, all from the later halves of their runs, with the last of the stream; None for every row.

    Rows in the first half are left out, since their gradients are differences of large numbers, whose rounding would
    hide the errors of the others.
    """
    if tokens <= _FEW:
        return None
    generator = torch.Generator().manual_seed(shape.seed)
    run = torch.randint(shape.batch, (_SAMPLED,), generator=generator)
    place = torch.randint(shape.context // 2, shape.context, (_SAMPLED,), generator=generator)
    return torch.cat([run * shape.context + place, torch.tensor([tokens - 1])]).unique().to(shape.device)


def _rows_of_prefill(
    query: Tensor, key: Tensor, value: Tensor, rows: Tensor | None, context: int, pattern: Pattern, scale: float
) -> Tensor:
    """The reference output of the given rows (all by default), each as the last query over the keys up to it."""
    found = []
    for row in range(len(query)) if rows is None else rows.tolist():
        begin, end = row - row % context, row + 1
        places = Places(torch.tensor([begin]), torch.tensor([end]), [(begin, end)])
        past = (key.transpose(0, 1), value.transpose(0, 1), Runs.of([1]), places)
        found.append(attention(query[row:end], *past, pattern=pattern, scale=scale, form="reference").output)
    return torch.cat(found)
