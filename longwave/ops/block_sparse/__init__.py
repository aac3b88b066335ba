"""Block-sparse attention (InfLLM-V2, arXiv 2509.24663): every query attends to the blocks of keys that score best.

Scores come from compressed keys, each the mean of a window of keys: a block's score is the largest attention weight,
summed over the heads of a group, of the compressed keys whose windows overlap it. The first blocks and the blocks just
before a query are always seen. The choice has no weights of its own, and no gradient flows through it. Only the scores
take work that grows with the context, and there are `stride` times fewer compressed keys than keys.

Legend: `T` tokens of the stream, `H` query heads, `G` KV heads, `N` keys of one run, `K` and `V` sizes of
a head's keys and values, `n` compressed keys.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import Literal, NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int32
from torch import Tensor

from longwave.ops.attention import attention
from longwave.ops.block_sparse import differentiable, kernels, reference, tiles
from longwave.ops.block_sparse.geometry import Geometry, attended_pairs, compress, compressed_count, scored_pairs
from longwave.ops.forms import INVARIANT, Form, Op, on_cpu
from longwave.streams import Located, Places, Runs, Spans

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
    """Fine and coarse compressed keys (G, n, K) of all runs, and where those of each run lie."""

    fine: Float[Tensor, "G n1 K"]
    fine_places: Located
    coarse: Float[Tensor, "G n2 K"]
    coarse_places: Located

    def of(self, run: int) -> tuple[Tensor, Tensor]:
        """The fine and the coarse compressed keys of one run."""
        return self.fine_places.of(self.fine, run), self.coarse_places.of(self.coarse, run)


_SPAN = 1 << 14  # queries whose lists of blocks are held at once at inference; a backward pass needs all of them


class Passes(NamedTuple):
    """The two steps of a form, for one run: choosing blocks, and attending to them.

    The functions `select` and `attend` below document the arguments.
    """

    select: Callable[[Tensor, Tensor, Tensor, int, Geometry, float, bool, int], Tensor]
    attend: Callable[[Tensor, Tensor, Tensor, Tensor, int, int, float], Tensor]


_KERNELS = "kernels for scores, choice and attention"
_on_cpu = on_cpu(torch.bfloat16, torch.float32, multiple=32, largest=256)
BLOCK_SPARSE: Op[Passes] = Op(
    "block_sparse",
    {
        "compiled": Form(
            Passes(kernels.select, kernels.attend),
            _KERNELS,
            _on_cpu,
        ),
        "torch": Form(
            Passes(tiles.select, partial(differentiable.attend, differentiable.TILES)), "tiles of queries in torch"
        ),
        INVARIANT: Form(Passes(kernels.select, kernels.attend), _KERNELS, _on_cpu),
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
    """The numbers of the blocks that each query sees, ascending, filled up with -1; of equal scores the earlier block.

    first: the place of the first query in its run. fine, coarse: the run's compressed keys (`compress`).
    denominator: of the softmax whose weights are the scores: over the coarse compressed keys, or "exact" over the fine.
    budget: about how many bytes of scores are held at once.
    """
    for table, size in ((fine, geometry.fine), (coarse, geometry.coarse)):
        assert table.shape[1] >= compressed_count(first + query.shape[0], *size), "compressed keys are missing"
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
    """Every query attends to the keys of its blocks, up to its own place; query i stands at place first + i."""
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
    """Every query attends to the best blocks of its run, up to its own place.

    query: token-major. key, value: head-major. places: the entries of `key` and `value` that belong to each run, the
    run's queries standing at the last of them; by default the stream's own tokens (N = T).
    compressed: the compressed keys of all runs; made here by default.
    dense_below: a query attends to all of its context while that is shorter than this many tokens, its own included
    (one number, or one for each run), and in any case while it is at most `topk` blocks. form: of block-sparse
    attention;
    dense_form: of the dense attention of those queries.
    """
    below = (dense_below,) * runs.count if isinstance(dense_below, int) else dense_below
    bounds = [geometry.dense(one) for one in below]
    located = places or Places(runs.bounds[:-1], runs.bounds[1:])
    spans = located.spans
    firsts = [end - begin - length for (begin, end), length in zip(spans, runs.lengths, strict=True)]
    # The queries of a run are in order of their context, so the dense ones come first: `early` counts them.
    early = tuple(min(max(end - first, 0), n) for end, first, n in zip(bounds, firsts, runs.lengths, strict=True))
    options = {"scale": scale, "form": dense_form}
    if early == runs.lengths:
        return attention(query, key, value, runs, places, **options).output
    queries = query.split([n for head, length in zip(early, runs.lengths, strict=True) for n in (head, length - head)])
    whole = queries[::2]
    if any(early):
        seen = [(begin, begin + first + head) for (begin, _), first, head in zip(spans, firsts, early, strict=True)]
        whole = attention(torch.cat(whole), key, value, *_early_runs(bounds, early, seen, runs, located), **options)
        whole = whole.output
        whole = whole.split(early)
    split = None if places else list(zip(key.split(runs.lengths, 1), value.split(runs.lengths, 1), strict=True))
    how: tuple[Geometry, float, Denominator, str] = (geometry, scale, denominator, form)
    found: list[Tensor] = []
    for run, piece in enumerate(queries[1::2]):
        tables = None if compressed is None or not piece.shape[0] else compressed.of(run)
        if not piece.shape[0]:
            found.append(piece)
        elif piece.shape[0] == 1 and tables is not None and located.is_broken(run):
            found.append(_late_in_pages(piece, key, value, located, run, tables, *how))
        else:
            keys, values = split[run] if split else (located.of(key, run), located.of(value, run))
            found.append(_late(piece, keys, values, tables, *how))
    return torch.cat([part for pair in zip(whole, found, strict=True) for part in pair])


def _early_runs(
    bounds: Sequence[int], early: tuple[int, ...], seen: Spans, runs: Runs, places: Places
) -> tuple[Runs, Places]:
    """The dense queries of every run as runs of their own, and the places of the keys that they see.

    early, seen: how many they are, and the places on the host; the device derives both itself, without a copy.
    """
    begins = places.begins
    limits = torch.cat([begins.new_full((len([*alike]),), bound) for bound, alike in groupby(bounds)])
    firsts = places.ends - begins - runs.sizes
    sizes = torch.minimum((limits - firsts).clamp(min=0), runs.sizes)
    inner = Runs(F.pad(sizes.cumsum(0), (1, 0)), sum(early), early)
    return inner, places.until(begins + firsts + sizes, seen)


def _late_in_pages(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    places: Places,
    run: int,
    tables: tuple[Tensor, Tensor],
    geometry: Geometry,
    scale: float,
    denominator: Denominator,
    form: str,
) -> Tensor:
    """Block-sparse attention of the last query (1, H, K) of a run whose keys lie apart: only its blocks are copied.

    They become an array of their own, in their order, in which the query stands as far behind the last block's start.
    """
    begin, end = places.spans[run]
    last, size, options = end - begin - 1, geometry.block_size, {"scale": scale, "form": form}
    blocks = select(query, *tables, last, geometry, denominator=denominator, **options)
    seen = blocks[:, 0, :, None].long() * size + torch.arange(size, device=blocks.device)
    numbers = places.at(torch.full_like(seen, run), begin + seen.clamp(max=last)).flatten(1)  # (G, topk * size)
    keys, values = (side[torch.arange(len(side), device=side.device)[:, None], numbers] for side in (key, value))
    own = torch.arange(geometry.topk, dtype=torch.int32, device=blocks.device).expand_as(blocks)
    return attend(query, keys, values, own, (geometry.topk - 1) * size + last % size, size, **options)


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
    """Block-sparse attention of the last queries of one run, in spans that bound the lists of blocks held at once."""
    tables = compressed or (compress(keys, *geometry.fine), compress(keys, *geometry.coarse))
    span = query.shape[0] if torch.is_grad_enabled() else _SPAN
    first, found = keys.shape[1] - query.shape[0], []
    for piece in query.split(span):
        options = {"scale": scale, "form": form}
        blocks = select(piece, *tables, first, geometry, denominator=denominator, **options)
        found.append(attend(piece, keys, values, blocks, first, geometry.block_size, **options))
        first += piece.shape[0]
    return found[0] if len(found) == 1 else torch.cat(found)
