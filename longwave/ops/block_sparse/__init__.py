"""Block-sparse attention (InfLLM-V2, arXiv 2509.24663): every query sees the blocks of keys that score best for it.

A block's score is the largest attention to the means of windows of keys that overlap it, summed over the heads of a
group; the first blocks and those just before a query are always seen. Nothing is learned for it, and no gradient flows
through the choice. Work grows with the context only in the scores, of 1 / stride as many entries as there are keys.

Legend: `T` tokens of the stream, `H` query heads, `G` KV heads, `N` keys of one run, `K` and `V` sizes of
a head's keys and values, `n` windows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal, TypeAlias

import torch
from jaxtyping import Float, Int32
from torch import Tensor

from longwave.ops.attention import ByRun, attention, by_run
from longwave.ops.block_sparse import differentiable, kernels, reference, tiles
from longwave.ops.block_sparse.geometry import Geometry, attended_pairs, compress, scored_pairs, windows
from longwave.ops.forms import pick

__all__ = [
    "FORMS",
    "Form",
    "Geometry",
    "attend",
    "attended_pairs",
    "block_sparse_attention",
    "choose",
    "compress",
    "scored_pairs",
    "select",
    "windows",
]

Denominator: TypeAlias = Literal["coarse", "exact"]
Compressed: TypeAlias = "tuple[Float[Tensor, 'G _ K'], Float[Tensor, 'G _ K']]"


_SPAN = 1 << 14  # queries whose lists of blocks are held at once, where no gradient needs them later


@dataclass(frozen=True)
class Form:
    """How blocks are chosen, and how queries attend to them, of one run: `select` and `attend` say with what."""

    select: Callable[[Tensor, Tensor, Tensor, int, Geometry, float, bool, int], Tensor]
    attend: Callable[[Tensor, Tensor, Tensor, Tensor, int, int, float], Tensor]


FORMS: dict[str, Form] = {
    "reference": Form(reference.select, reference.attend),
    "torch": Form(tiles.select, partial(differentiable.attend, differentiable.TILES)),
    "compiled": Form(kernels.select, kernels.attend),
}


def choose(form: str | None = None) -> tuple[str, str]:
    """The form that block-sparse attention will run and why."""
    kernels = "scores, choice and attention on a CPU; tiles of queries in torch elsewhere"
    return pick("block_sparse", FORMS, form, kernels=kernels, torch="tiles of queries")


def select(
    query: Float[Tensor, "T H K"],
    fine: Float[Tensor, "G n1 K"],
    coarse: Float[Tensor, "G n2 K"],
    first: int,
    geometry: Geometry,
    *,
    scale: float,
    denominator: Denominator = "coarse",
    budget: int | None = None,
    form: str = "torch",
) -> Int32[Tensor, "G T topk"]:
    """The blocks that each query sees, ascending, -1 behind the last; query i stands at place first + i of its run.

    fine, coarse: `compress` of its keys. denominator: of the softmax whose weights score windows, "exact" over the fine
    windows themselves. Of blocks that score alike the one before is taken. budget: bytes of scores held at once, about.
    """
    for table, size in ((fine, geometry.fine), (coarse, geometry.coarse)):
        assert table.shape[1] >= windows(first + query.shape[0], *size), "windows of the last keys are missing"
    most = tiles.budget_of(query.device) if budget is None else budget
    return FORMS[form].select(query, fine, coarse, first, geometry, scale, denominator == "exact", most)


def attend(
    query: Float[Tensor, "T H K"],
    keys: Float[Tensor, "G N K"],
    values: Float[Tensor, "G N V"],
    blocks: Int32[Tensor, "G T topk"],
    first: int,
    block_size: int,
    *,
    scale: float,
    form: str = "torch",
) -> Float[Tensor, "T H V"]:
    """Every query attends to the keys of its group's blocks up to itself; query i stands at place first + i."""
    assert first + query.shape[0] <= keys.shape[1], "keys of the last queries are missing"
    return FORMS[form].attend(query, keys, values, blocks, first, block_size, scale)


def block_sparse_attention(
    query: Float[Tensor, "T H K"],
    keys: Float[Tensor, "T G K"] | ByRun,
    values: Float[Tensor, "T G K"] | ByRun,
    lengths: tuple[int, ...],
    geometry: Geometry,
    *,
    scale: float,
    compressed: list[Compressed] | None = None,
    dense_below: int | tuple[int, ...] = 0,
    denominator: Denominator = "coarse",
    form: str = "torch",
) -> Float[Tensor, "T H K"]:
    """Every query attends to the best blocks of its run up to itself.

    keys, values: in the layout of the stream, or head-major (G, N, K) per run where a state holds the past as well; the
    queries of run `r` are then the last `lengths[r]` of its keys. compressed: per run the fine and the coarse windows
    of its keys, made here by default. dense_below: a query sees everything while its context, itself included, is
    shorter than this (or this of its run), and in any case while that is at most `topk` blocks.
    """
    below = (dense_below,) * len(lengths) if isinstance(dense_below, int) else dense_below
    dense = [geometry.dense(one) for one in below]
    if isinstance(keys, Tensor) and isinstance(values, Tensor):
        if all(length <= bound for length, bound in zip(lengths, dense, strict=True)):
            return attention(query, keys, values, lengths, scale=scale, form=form)
        keys, values = by_run(keys, lengths), by_run(values, lengths)
    assert isinstance(keys, list)
    assert isinstance(values, list)
    firsts = [key.shape[1] - length for key, length in zip(keys, lengths, strict=True)]
    heads = tuple(min(max(end - first, 0), n) for end, first, n in zip(dense, firsts, lengths, strict=True))
    pieces = query.split([n for head, length in zip(heads, lengths, strict=True) for n in (head, length - head)])
    early = _early(pieces[::2], keys, values, firsts, heads, scale, form)
    late = [
        _late(
            piece, keys[run], values[run], compressed[run] if compressed else None, geometry, scale, denominator, form
        )
        for run, piece in enumerate(pieces[1::2])
    ]
    return torch.cat([part for pair in zip(early, late, strict=True) for part in pair]) if late else query


def _early(
    queries: tuple[Tensor, ...],
    keys: list[Tensor],
    values: list[Tensor],
    firsts: list[int],
    lengths: tuple[int, ...],
    scale: float,
    form: str,
) -> tuple[Tensor, ...]:
    """The first queries of every run, which see all their keys."""
    if not any(lengths):
        return queries
    ends = [first + length for first, length in zip(firsts, lengths, strict=True)]
    keys, values = ([part[:, :end] for part, end in zip(side, ends, strict=True)] for side in (keys, values))
    return attention(torch.cat(queries), keys, values, lengths, scale=scale, form=form).split(lengths)


def _late(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    compressed: Compressed | None,
    geometry: Geometry,
    scale: float,
    denominator: Denominator,
    form: str,
) -> Tensor:
    """The last queries of one run, which see the best blocks."""
    if not query.shape[0]:
        return query
    windows_of = compressed or (compress(keys, *geometry.fine), compress(keys, *geometry.coarse))
    span = query.shape[0] if torch.is_grad_enabled() else _SPAN
    first, found = keys.shape[1] - query.shape[0], []
    for piece in query.split(span):
        options = {"scale": scale, "form": form}
        blocks = select(piece, *windows_of, first, geometry, denominator=denominator, **options)
        found.append(attend(piece, keys, values, blocks, first, geometry.block_size, **options))
        first += piece.shape[0]
    return found[0] if len(found) == 1 else torch.cat(found)
