"""Benchmark cases of block-sparse attention: whole prompts, forward and backward, and one query of each sequence.

Legend: `B` sequences of `N` tokens, `T` = B N, `H` query heads, `G` KV heads, `K` head size.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from longwave.costs import Work
from longwave.ops.attention.benchmark import dense, remembered, sample
from longwave.ops.benchmark import Case, Shape, forms_here
from longwave.ops.block_sparse import BLOCK_SPARSE, Compressed, block_sparse_attention, compress
from longwave.ops.block_sparse.geometry import Geometry, attended_pairs, scored_pairs
from longwave.streams import Located, Places, Runs

_PUBLISHED = Geometry(kernel_size=32, stride=16, block_size=64, init_blocks=1, local_blocks=32, topk=96)
_SMALL = Geometry(kernel_size=4, stride=2, block_size=8, init_blocks=1, local_blocks=2, topk=6)


def cases(shape: Shape) -> list[Case]:
    """A prompt and a decoding step: at MiniCPM-SALA's sizes if a query then sees less than the context, else small."""
    published = replace(_PUBLISHED, topk=shape.blocks)
    geometry = published if shape.context > published.dense(0) else _SMALL
    return [_prefill(shape, geometry), _decode(shape, geometry)]


def _name(use: str, geometry: Geometry) -> str:
    return f"block_sparse {use}, {geometry.topk} blocks of {geometry.block_size}"


def _prefill(shape: Shape, geometry: Geometry) -> Case:
    """Every token of B sequences, laid end to end as in a stream, chooses among the blocks of its past and attends."""
    tokens, size = shape.batch * shape.context, shape.head_size
    query = shape.normal("query", tokens, shape.heads, size)
    key, value = (shape.normal(name, tokens, shape.kv_heads, size) for name in ("key", "value"))
    runs, rows = Runs.of([shape.context] * shape.batch, shape.device), sample(tokens, shape)
    run = partial(_stream, runs=runs, geometry=geometry, scale=size**-0.5)
    attended = 4 * shape.heads * size * shape.batch * attended_pairs(shape.context, geometry)
    scored = 2 * shape.heads * size * shape.batch * scored_pairs(shape.context, geometry)
    read = sum(one.nbytes for one in (query, key, value))
    return Case(
        _name("prefill", geometry),
        shape.context,
        tokens,
        (query, key, value),
        {name: partial(run, form=name) for name in forms_here(BLOCK_SPARSE, shape)},
        partial(_rows_of_prefill, rows=rows, shape=shape, geometry=geometry),
        Work(attended + scored, read),
        Work(2 * attended, 2 * read),
        rows,
        dense(shape, runs),
    )


def _stream(query: Tensor, key: Tensor, value: Tensor, runs: Runs, geometry: Geometry, **options: Any) -> Tensor:
    """Block-sparse attention of a stream to itself, with keys and values (T, G, K) as projections give them."""
    return block_sparse_attention(query, key.transpose(0, 1), value.transpose(0, 1), runs, None, geometry, **options)


def _rows_of_prefill(
    query: Tensor, key: Tensor, value: Tensor, rows: Tensor | None, shape: Shape, geometry: Geometry
) -> Tensor:
    """The reference output of the given rows (all by default), each as the last query over the keys up to it.

    Compressed keys are rounded to the dtype that is timed, so that the reference chooses the same blocks.
    """
    found = []
    for row in range(len(query)) if rows is None else rows.tolist():
        seen = slice(row - row % shape.context, row + 1)
        keys, values = (side[seen].transpose(0, 1) for side in (key, value))
        fine, coarse = (compress(keys.to(shape.dtype), *size).to(key) for size in (geometry.fine, geometry.coarse))
        spans = [(0, keys.shape[1])]
        compressed = Compressed(fine, _even(fine, 1), coarse, _even(coarse, 1))
        past = (keys, values, Runs.of([1]), Places(torch.tensor([0]), torch.tensor(spans[0][1:]), spans))
        options = {"scale": shape.head_size**-0.5, "compressed": compressed, "form": "reference"}
        found.append(block_sparse_attention(query[row : row + 1], *past, geometry, **options, dense_form="reference"))
    return torch.cat(found)


def _decode(shape: Shape, geometry: Geometry) -> Case:
    """One query of each of B sequences attends to N remembered keys, whose compressed keys are remembered as well."""
    past = (shape.kv_heads, shape.batch * shape.context, shape.head_size)
    query = shape.normal("query", shape.batch, shape.heads, shape.head_size)
    keys, values = shape.normal("keys", *past), shape.normal("values", *past)
    of_sequences = keys.unflatten(1, (shape.batch, shape.context)).flatten(0, 1)
    fine, coarse = (
        compress(of_sequences, *size).unflatten(0, (shape.kv_heads, shape.batch)).flatten(1, 2)
        for size in (geometry.fine, geometry.coarse)
    )
    last = shape.context - 1
    attended = attended_pairs(last + 1, geometry) - attended_pairs(last, geometry)
    scored = scored_pairs(last + 1, geometry) - scored_pairs(last, geometry)
    token = shape.batch * shape.kv_heads * shape.head_size * keys.element_size()
    work = 4 * attended + 2 * scored
    run = partial(_decode_of, shape=shape, geometry=geometry)
    return Case(
        _name("decode", geometry),
        shape.context,
        shape.batch,
        (query, keys, values, fine, coarse),
        {name: partial(run, form=name) for name in forms_here(BLOCK_SPARSE, shape)},
        partial(run, form="reference"),
        Work(shape.batch * shape.heads * shape.head_size * work, token * (2 * attended + scored)),
    )


def _decode_of(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    fine: Tensor,
    coarse: Tensor,
    shape: Shape,
    geometry: Geometry,
    form: str,
) -> Tensor:
    compressed = Compressed(fine, _even(fine, shape.batch), coarse, _even(coarse, shape.batch))
    options = {"scale": query.shape[-1] ** -0.5, "compressed": compressed, "form": form}
    return block_sparse_attention(query, keys, values, *remembered(shape), geometry, **options)


def _even(entries: Tensor, sequences: int) -> Located:
    """The places of the entries (G, n, K) of each sequence, all sequences having equally many, end to end."""
    count = entries.shape[1] // sequences
    return Located([(index * count, (index + 1) * count) for index in range(sequences)])
