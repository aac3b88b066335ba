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
from typing import Literal, NamedTuple, TypeAlias

import torch
from jaxtyping import Float, Int32
from torch import Tensor

from longwave.ops.attention import attention
from longwave.ops.block_sparse import differentiable, kernels, reference, tiles
from longwave.ops.block_sparse.geometry import Geometry, attended_pairs, compress, compressed_count, scored_pairs
from longwave.ops.forms import Form, Op, on_cpu
from longwave.stream import Places, Runs, Spans

__all__ = [
    "BLOCK_SPARSE",
    "Compressed",
    "Geometry",
    "attend",
    "attended_pairs",
    "block_sparse_attention",
    "compress",
    "compressed_count",
    "scored_pairs",
    "select",
]

Denominator: TypeAlias = Literal["coarse", "exact"]


@dataclass(frozen=True)
class Compressed:
    """The means of windows of keys, fine and coarse (G, n, K), and where those of each run lie in them."""

    fine: Float[Tensor, "G n1 K"]
    fine_spans: Spans
    coarse: Float[Tensor, "G n2 K"]
    coarse_spans: Spans

    def of(self, run: int) -> tuple[Tensor, Tensor]:
        """Those of one run."""
        fine, coarse = slice(*self.fine_spans[run]), slice(*self.coarse_spans[run])
        return self.fine[:, fine], self.coarse[:, coarse]


_SPAN = 1 << 14  # queries whose lists of blocks are held at once, where no gradient needs them later


class Passes(NamedTuple):
    """How blocks are chosen, and how queries attend to them, of one run: `select` and `attend` say with what."""

    select: Callable[[Tensor, Tensor, Tensor, int, Geometry, float, bool, int], Tensor]
    attend: Callable[[Tensor, Tensor, Tensor, Tensor, int, int, float], Tensor]


BLOCK_SPARSE: Op[Passes] = Op(
    "block_sparse",
    {
        "compiled": Form(
            Passes(kernels.select, kernels.attend),
            "kernels for scores, choice and attention",
            on_cpu(torch.bfloat16, torch.float32, multiple=32, largest=256),
        ),
        "torch": Form(
            Passes(tiles.select, partial(differentiable.attend, differentiable.TILES)), "tiles of queries in torch"
        ),
        "reference": Form(Passes(reference.select, reference.attend), "the formulas, in double precision"),
    },
)


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
        assert table.shape[1] >= compressed_count(first + query.shape[0], *size), "windows of the last keys are missing"
    most = tiles.budget_of(query.device) if budget is None else budget
    return BLOCK_SPARSE.forms[form].run.select(
        query, fine, coarse, first, geometry, scale, denominator == "exact", most
    )


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
    return BLOCK_SPARSE.forms[form].run.attend(query, keys, values, blocks, first, block_size, scale)


def block_sparse_attention(
    query: Float[Tensor, "T H K"],
    key: Float[Tensor, "G N K"],
    value: Float[Tensor, "G N K"],
    runs: Runs,
    places: Places | None,
    geometry: Geometry,
    *,
    scale: float,
    compressed: Compressed | None = None,
    dense_below: int | tuple[int, ...] = 0,
    denominator: Denominator = "coarse",
    form: str = "torch",
    dense_form: str = "torch",
) -> Float[Tensor, "T H K"]:
    """Every query attends to the best blocks of its run up to itself.

    key, value: head-major. places: where the keys of each run lie, the queries of run `r` being the last of them;
    without it they are the stream's own (N = T). compressed: the fine and the coarse windows of the keys, made here by
    default. dense_below: a query sees everything while its context, itself included, is shorter than this (or this of
    its run), and in any case while that is at most `topk` blocks; `dense_form` of attention does it.
    """
    below = (dense_below,) * runs.count if isinstance(dense_below, int) else dense_below
    bounds = [geometry.dense(one) for one in below]
    spans = (places or Places(runs.bounds[:-1], runs.bounds[1:])).spans
    firsts = [end - begin - length for (begin, end), length in zip(spans, runs.lengths, strict=True)]
    early = tuple(min(max(end - first, 0), n) for end, first, n in zip(bounds, firsts, runs.lengths, strict=True))
    options = {"scale": scale, "form": dense_form}
    if early == runs.lengths:
        return attention(query, key, value, runs, places, **options).output
    queries = query.split([n for head, length in zip(early, runs.lengths, strict=True) for n in (head, length - head)])
    whole = queries[::2]
    if any(early):
        seen = [(begin, begin + first + head) for (begin, _), first, head in zip(spans, firsts, early, strict=True)]
        whole = attention(torch.cat(whole), key, value, *_early_runs(early, seen, query.device), **options).output
        whole = whole.split(early)
    of_runs = (
        list(zip(key.split(runs.lengths, 1), value.split(runs.lengths, 1), strict=True))
        if places is None
        else [(key[:, begin:end], value[:, begin:end]) for begin, end in spans]
    )
    found = []
    for run, piece in enumerate(queries[1::2]):
        tables = None if compressed is None else compressed.of(run)
        found.append(_late(piece, *of_runs[run], tables, geometry, scale, denominator, form))
    return torch.cat([part for pair in zip(whole, found, strict=True) for part in pair])


def _early_runs(lengths: tuple[int, ...], spans: Spans, device: torch.device) -> tuple[Runs, Places]:
    """The first queries of every run as runs of their own, and the keys that these see."""
    begins, ends = torch.tensor(spans, device=device).T
    return Runs.of(lengths, device), Places(begins, ends, spans)


def _late(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    compressed: tuple[Tensor, Tensor] | None,
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
