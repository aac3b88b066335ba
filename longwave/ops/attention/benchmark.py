"""How attention is timed: whole prompts, forward and backward, and one query of each sequence after its past.

Legend: `B` sequences of `N` tokens, `T` = B N, `H` query heads, `G` KV heads, `K` head size.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from longwave.costs import Work, visible_pairs
from longwave.ops.attention import FORMS, attention, reference
from longwave.ops.benchmark import Beside, Case, Shape, forms_here

_OF_ONE_QUERY = ("compiled",)  # forms that leave all else to torch's
_FEW, _SAMPLED = 512, 24  # queries that are all checked, and how many of more


def cases(shape: Shape) -> list[Case]:
    """A prompt and a decoding step; the same with a sliding window, where the model has one."""
    windows = [None] if shape.window is None else [None, shape.window]
    return [make(shape, window) for window in windows for make in (_prefill, _decode)]


def _prefill(shape: Shape, window: int | None) -> Case:
    """Every token of B sequences attends to its own past, in the layout of a stream."""
    tokens = shape.batch * shape.context
    query = shape.normal("query", tokens, shape.heads, shape.head_size)
    key, value = (shape.normal(name, tokens, shape.kv_heads, shape.head_size) for name in ("key", "value"))
    lengths, rows = (shape.context,) * shape.batch, sample(tokens, shape)
    options = {"window": window, "scale": shape.head_size**-0.5}
    pairs = shape.batch * visible_pairs(shape.context, window)
    flops, read = 4 * shape.heads * shape.head_size * pairs, sum(one.nbytes for one in (query, key, value))
    names = [name for name in forms_here(FORMS, shape.device) if name not in _OF_ONE_QUERY]
    return Case(
        f"attention prefill{_suffix(window)}",
        shape.context,
        tokens,
        (query, key, value),
        {name: partial(_stream, form=name, lengths=lengths, **options) for name in names},
        partial(_rows_of_prefill, rows=rows, context=shape.context, **options),
        Work(flops, read),
        Work(2 * flops, 2 * read),
        rows,
    )


def dense(shape: Shape, lengths: tuple[int, ...], kv_heads: int | None = None) -> dict[str, Beside]:
    """Causal softmax attention over the same queries, keys and values, as what another op is compared with.

    kv_heads: where they are not those of the shape.
    """
    flops = 4 * shape.heads * shape.head_size * shape.batch * visible_pairs(shape.context)
    heads = shape.heads + 2 * (kv_heads or shape.kv_heads)
    read = sum(lengths) * heads * shape.head_size * shape.dtype.itemsize
    run = partial(attention, lengths=lengths, scale=shape.head_size**-0.5)
    return {"dense attention": Beside(run, Work(flops, read), Work(2 * flops, 2 * read))}


def _stream(query: Tensor, key: Tensor, value: Tensor, form: str, lengths: tuple[int, ...], **options: Any) -> Tensor:
    """A form over a stream, which only torch's takes as it is."""
    if form == "torch":
        return attention(query, key, value, lengths, form=form, **options)
    keys, values = ([piece.transpose(0, 1) for piece in part.split(lengths)] for part in (key, value))
    return attention(query, keys, values, lengths, form=form, **options)


def _decode(shape: Shape, window: int | None) -> Case:
    """One query of each of B sequences attends to N remembered keys, head-major."""
    past = (shape.batch, shape.kv_heads, shape.context, shape.head_size)
    query = shape.normal("query", shape.batch, shape.heads, shape.head_size)
    keys, values = shape.normal("keys", *past), shape.normal("values", *past)
    seen = min(window or shape.context, shape.context)

    def run(query: Tensor, keys: Tensor, values: Tensor, form: str) -> Tensor:
        lengths, past = (1,) * len(query), (list(keys.unbind()), list(values.unbind()))
        return attention(query, *past, lengths, window=window, scale=shape.head_size**-0.5, form=form)

    return Case(
        f"attention decode{_suffix(window)}",
        shape.context,
        shape.batch,
        (query, keys, values),
        {name: partial(run, form=name) for name in forms_here(FORMS, shape.device)},
        partial(run, form="reference"),
        Work(4 * shape.heads * shape.head_size * shape.batch * seen, 2 * keys[:, :, :seen].nbytes),
    )


def _suffix(window: int | None) -> str:
    return "" if window is None else f", window {window:,}"


def sample(tokens: int, shape: Shape) -> Tensor | None:
    """Rows to check, of the later halves of their runs and the last of all; None for all of few.

    The gradients of the first rows are differences of large numbers, which would hide those of the others.
    """
    if tokens <= _FEW:
        return None
    generator = torch.Generator().manual_seed(shape.seed)
    run = torch.randint(shape.batch, (_SAMPLED,), generator=generator)
    place = torch.randint(shape.context // 2, shape.context, (_SAMPLED,), generator=generator)
    return torch.cat([run * shape.context + place, torch.tensor([tokens - 1])]).unique().to(shape.device)


def _rows_of_prefill(
    query: Tensor, key: Tensor, value: Tensor, rows: Tensor | None, context: int, window: int | None, scale: float
) -> Tensor:
    """The reference of those rows, of all by default: each is the last query of the keys before it."""
    found = []
    for row in range(len(query)) if rows is None else rows.tolist():
        seen = slice(row - row % context, row + 1)
        past = ([key[seen].transpose(0, 1)], [value[seen].transpose(0, 1)])
        found.append(reference.attention(query[row : row + 1], *past, (1,), window, scale))
    return torch.cat(found)
