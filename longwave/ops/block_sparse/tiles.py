"""The torch form of block-sparse attention, for every device and dtype: a tile of neighbouring queries at a time.

Legend: `T` queries and `N` keys of one run, `H` query heads, `G` KV heads, `R` = H / G, `K` head size, `C` queries of a
tile, `n` compressed keys, `S` keys of the topk blocks of a query.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from longwave.ops.block_sparse.geometry import Geometry, compressed_count


def budget_of(device: torch.device) -> int:
    """The memory of a tile in bytes: on a CPU what fits into its caches, on a GPU enough to keep it busy."""
    return 1 << 23 if device.type == "cpu" else 1 << 28


@torch.no_grad()
def select(
    query: Tensor, fine: Tensor, coarse: Tensor, first: int, geometry: Geometry, scale: float, exact: bool, budget: int
) -> Tensor:
    """The blocks (G, T, topk) that queries (T, H, K) see, ascending, filled up with -1.

    `reference.select` has the maths. budget: about how many bytes of scores are held at once; at least one query's are.
    """
    dtype = torch.promote_types(query.dtype, torch.float32)
    tokens, heads, _ = query.shape
    fine, coarse = fine.to(dtype), coarse.to(dtype)
    # Three arrays of scores are alive at once: the logits, a masked copy, and the copy that logsumexp makes.
    step = max(1, budget // (3 * dtype.itemsize * heads * max(1, fine.shape[1])))
    found = []
    for start in range(0, tokens, step):
        tile = query[start : start + step].to(dtype)
        end = first + start + len(tile)
        places = torch.arange(first + start, end, device=query.device)
        scores = _window_scores(tile, fine, coarse, places, end, geometry, scale, exact)
        found.append(_best(_block_scores(scores, end, geometry), places, geometry))
    return torch.cat(found, dim=1) if found else query.new_zeros(fine.shape[0], 0, geometry.topk, dtype=torch.int32)


def _window_scores(
    query: Tensor, fine: Tensor, coarse: Tensor, places: Tensor, end: int, geometry: Geometry, scale: float, exact: bool
) -> Tensor:
    """(G, C, n): the scores of the compressed keys that the last query sees; -1 where a query does not see them.

    end: number of tokens up to the last query, which the host knows.
    """
    fine, seen = _visible(fine, places, geometry.fine, end)
    logits = _logits(query, fine, scale)
    if exact:
        others, among = logits, seen
    else:
        coarse, among = _visible(coarse, places, geometry.coarse, end)
        others = _logits(query, coarse, scale)
    # A column of -inf is appended, so that logsumexp has something to reduce where there is no compressed key at all.
    hidden = ~among.unsqueeze(1)
    total = F.pad(others.masked_fill(hidden, -torch.inf), (0, 1), value=-torch.inf).logsumexp(-1, keepdim=True)
    total.masked_fill_(total == -torch.inf, torch.inf)  # no denominator: every score is 0
    scores = logits.sub_(total).exp_().sum(2)  # over the heads of a group, which choose together
    return scores.nan_to_num_(nan=0.0, posinf=torch.finfo(scores.dtype).max).masked_fill_(~seen, -1.0)


def _visible(compressed: Tensor, places: Tensor, size: tuple[int, int], end: int) -> tuple[Tensor, Tensor]:
    """The compressed keys that the last query sees, and the (C, n) mask of those that each query sees.

    end: number of tokens up to the last query. A query sees a compressed key once its window is complete.
    """
    width, stride = size
    compressed = compressed[:, : compressed_count(end, width, stride)]
    ends = torch.arange(compressed.shape[1], device=places.device) * stride + width
    return compressed, ends <= places.unsqueeze(1) + 1


def _logits(query: Tensor, compressed: Tensor, scale: float) -> Tensor:
    """The scores of query (C, H, K) and compressed keys (G, n, K): (G, C, R, n)."""
    grouped = _grouped(query, compressed.shape[0])
    return (scale * grouped.flatten(1, 2) @ compressed.transpose(1, 2)).unflatten(1, grouped.shape[1:3])


def _grouped(query: Tensor, groups: int) -> Tensor:
    """Splits query heads into the groups of the KV heads: (C, H, K) -> (G, C, R, K)."""
    return query.unflatten(1, (groups, -1)).transpose(0, 1)


def _block_scores(scores: Tensor, end: int, geometry: Geometry) -> Tensor:
    """The score of each block b up to the last query's own: the largest of windows r b - 1 ... r b + r - 1; -1 if none.

    The result is (G, C, blocks). One column in front makes the r + 1 windows of every block begin at column r b.
    """
    r, blocks = geometry.strides, (end - 1) // geometry.block_size + 1
    padded = F.pad(scores, (1, r * blocks - scores.shape[-1]), value=-1.0)
    return padded.unfold(-1, r + 1, r).amax(-1)


def _best(scores: Tensor, places: Tensor, geometry: Geometry) -> Tensor:
    """The topk best blocks (G, C, topk): first the forced ones, then by score, of equal scores the earlier block."""
    block = torch.arange(scores.shape[-1], device=scores.device)
    own = (places // geometry.block_size).unsqueeze(1)
    forced = (block < geometry.init_blocks) | (block >= own - geometry.local_blocks)
    scores = scores.masked_fill(forced, torch.inf).masked_fill(block > own, -torch.inf)
    # topk does not say which of equal scores it takes. So only its least score is used: all blocks above it are chosen,
    # and of the blocks level with it the first ones, as far as there is room.
    count = min(geometry.topk, len(block))
    least = scores.topk(count).values[..., -1:]
    above, level = scores > least, scores == least
    room = count - above.sum(-1, keepdim=True)
    chosen = (above | (level & (level.cumsum(-1) <= room))) & (block <= own)
    return _numbers(chosen, geometry.topk)


def _numbers(chosen: Tensor, topk: int) -> Tensor:
    """The numbers of the chosen blocks: from a mask (..., blocks) to (..., topk), ascending, filled up with -1."""
    found = torch.full((*chosen.shape[:-1], topk + 1), -1, dtype=torch.int32, device=chosen.device)
    # The k-th true entry of a row goes to place k - 1: the running count of true entries says k. The others go to a
    # column behind the last, so that no size depends on data, for which the host would have to wait.
    at = (chosen.cumsum(-1) - 1).masked_fill_(~chosen, topk)
    numbers = torch.arange(chosen.shape[-1], dtype=torch.int32, device=chosen.device)
    return found.scatter_(-1, at, numbers.expand_as(at))[..., :topk]


def forward(
    query: Tensor, keys: Tensor, values: Tensor, blocks: Tensor, first: int, block_size: int, scale: float
) -> tuple[Tensor, Tensor]:
    """The output (T, H, K), and the log-sum-exp (T, H) of each query's scores, in fp32 or wider."""
    output = query.new_empty(*query.shape[:2], values.shape[2])
    sums = query.new_empty(query.shape[:2], dtype=torch.promote_types(query.dtype, torch.float32))
    for rows, at, seen in _tiles(query, keys, blocks, first, block_size):
        logits = _tile_logits(query[rows], keys, at, seen, scale)
        weights = logits.softmax(-1)
        output[rows] = _stream(weights @ _gather(values, at)).to(output.dtype)
        # The largest weight is exp(largest score - log-sum-exp), which gives the log-sum-exp without another pass.
        sums[rows] = _stream(logits.amax(-1, keepdim=True) - weights.amax(-1, keepdim=True).log()).squeeze(-1)
    return output, sums


def backward(
    slope: Tensor,
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    blocks: Tensor,
    output: Tensor,
    sums: Tensor,
    first: int,
    block_size: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of query, keys and values, as in FlashAttention (Dao et al. 2022): the weights are computed again.

    slope: the gradient of the output (T, H, K). output, sums: the results of `forward`.
    """
    of_query, dtype = torch.empty_like(query), sums.dtype
    of_keys, of_values = (torch.zeros(one.shape, dtype=dtype, device=one.device) for one in (keys, values))
    for rows, at, seen in _tiles(query, keys, blocks, first, block_size):
        total, tile_slope, mixed = (
            _grouped(one[rows].to(dtype), len(keys)) for one in (sums[..., None], slope, output)
        )
        weights = _tile_logits(query[rows], keys, at, seen, scale).sub_(total).exp_()
        _scatter(of_values, at, weights.transpose(-1, -2) @ tile_slope)
        # The gradient of softmax subtracts the mean of the weights' gradients, which equals slope . output.
        of_logits = tile_slope @ _gather(values, at).transpose(-1, -2) - (tile_slope * mixed).sum(-1, keepdim=True)
        of_logits = of_logits.mul_(weights).mul_(scale)
        of_query[rows] = _stream(of_logits @ _gather(keys, at)).to(query.dtype)
        _scatter(of_keys, at, of_logits.transpose(-1, -2) @ _grouped(query[rows].to(dtype), len(keys)))
    return of_query, of_keys.to(keys.dtype), of_values.to(values.dtype)


def _tiles(
    query: Tensor, keys: Tensor, blocks: Tensor, first: int, block_size: int
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Tiles of queries: their rows, the places (G, C, S) of the keys of their blocks, and which of these they see."""
    groups, tokens, topk = blocks.shape
    # `one`: bytes of the gathered keys of one query, the largest array of a tile.
    one = groups * topk * block_size * keys.shape[2] * torch.promote_types(keys.dtype, torch.float32).itemsize
    step, inside = max(1, budget_of(keys.device) // one), torch.arange(block_size, device=blocks.device)
    for start in range(0, tokens, step):
        rows = slice(start, min(start + step, tokens))
        at = (blocks[:, rows, :, None].long() * block_size + inside).flatten(2)
        places = torch.arange(first + start, first + rows.stop, device=blocks.device).unsqueeze(1)
        # Places of missing blocks (-1) and beyond the last key are clamped so that they can be gathered, and masked.
        yield rows, at.clamp(0, keys.shape[1] - 1), (at >= 0) & (at <= places)


def _tile_logits(query: Tensor, keys: Tensor, at: Tensor, seen: Tensor, scale: float) -> Tensor:
    """The scores (G, C, R, S) of a tile, -inf for keys that a query does not see."""
    gathered = _gather(keys, at)
    grouped = _grouped(query.to(gathered.dtype), keys.shape[0])
    return (scale * grouped @ gathered.transpose(-1, -2)).masked_fill_(~seen.unsqueeze(2), -torch.inf)


def _gather(entries: Tensor, at: Tensor) -> Tensor:
    """The entries (G, N, K) at places (G, C, S): (G, C, S, K), in fp32 or wider."""
    chosen = torch.stack([entry.index_select(0, place.flatten()) for entry, place in zip(entries, at, strict=True)])
    return chosen.unflatten(1, at.shape[1:]).to(torch.promote_types(entries.dtype, torch.float32))


def _scatter(entries: Tensor, at: Tensor, parts: Tensor) -> None:
    """Adds parts (G, C, S, K) to the entries (G, N, K) at places (G, C, S)."""
    for entry, place, part in zip(entries, at, parts, strict=True):
        entry.index_add_(0, place.flatten(), part.flatten(0, 1))


def _stream(tile: Tensor) -> Tensor:
    """A tile by groups back to query heads: (G, C, R, K) -> (C, H, K)."""
    return tile.transpose(0, 1).flatten(1, 2)
