"""The torch form of softmax attention: through PyTorch's scaled_dot_product_attention, without kernels of our own.

Legend: `L` queries and `N` keys of one run, `H` query heads, `G` KV heads, `K` head size, `B` runs of one length.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import CausalBias, causal_lower_right

from longwave.ops.attention import ragged
from longwave.ops.attention.pattern import Attended, Pattern, Wanted
from longwave.ops.attention.weights import with_extras
from longwave.streams import Places, Runs


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    runs: Runs,
    places: Places | None,
    pattern: Pattern,
    scale: float,
    want: Wanted,
) -> Attended:
    """Attention as `longwave.ops.attention.attention` defines it: queries (T, H, K), keys and values (G, N, K)."""
    output = _output(query, key, value, runs, places, pattern.window, scale)
    return with_extras(output, query, key, runs, places, pattern, scale, want)


def _output(
    query: Tensor, key: Tensor, value: Tensor, runs: Runs, places: Places | None, window: int | None, scale: float
) -> Tensor:
    if places is not None:
        if (
            query.is_cuda
            and places.tables is None
            and runs.count > 1
            and (output := single_queries(query, key, value, runs, places, window, scale)) is not None
        ):
            return output
        pieces = ((places.of(key, run), places.of(value, run)) for run in range(runs.count))
    elif ragged.takes(query) and (window is not None or not runs.is_read or not runs.are_equal):
        return ragged.attention(query, key, value, runs, window, scale)
    elif runs.are_equal:
        return _packed(query, key, value, runs.count, window, scale)
    else:
        pieces = zip(key.split(runs.lengths, 1), value.split(runs.lengths, 1), strict=True)
    return by_run(query, runs.lengths, pieces, window, scale)


def by_run(
    query: Tensor,
    lengths: tuple[int, ...],
    pieces: Iterable[tuple[Tensor, Tensor]],
    window: int | None,
    scale: float,
) -> Tensor:
    """Attention run by run.

    query: (T, H, K), the runs of `lengths` end to end. pieces: for each run its keys and values (G, n, K), at the last
    of which its queries stand.
    """
    of_runs = zip(query.split(lengths), pieces, strict=True)
    outputs = [_run(piece, *keys, window, scale) for piece, keys in of_runs if piece.shape[0]]
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def single_queries(
    query: Tensor, key: Tensor, value: Tensor, runs: Runs, places: Places, window: int | None, scale: float
) -> Tensor | None:
    """Attention of at most one query of each run, in one call for all runs; None where keys are not laid out for it.

    The keys of the runs have to begin at equal distances, as they do in the state of sequences that are decoded
    together. Entries behind a run's keys are read as well and weighted by 0, so they must be finite.
    """
    spans, count = places.spans, runs.count
    step = spans[1][0] - spans[0][0] if count > 1 else key.shape[1] - spans[0][0] if count else 0
    begins = [spans[0][0] + run * step for run in range(count)] if count else []
    longest = max([end - begin for begin, end in spans], default=0)
    laid_out = runs.longest == 1 and longest <= step and begins == [begin for begin, _ in spans]
    if not laid_out or begins[-1] + step > key.shape[1]:
        return None
    of_runs = slice(begins[0], begins[0] + count * step)
    keys, values = (
        side[:, of_runs].unflatten(1, (count, step))[:, :, :longest].transpose(0, 1) for side in (key, value)
    )
    rows = query.new_zeros(count, *query.shape[1:]).index_copy(0, runs.of_token, query)
    grouped = rows.unflatten(1, (key.shape[0], -1))  # (R, G, H / G, K)
    lengths = (places.ends - places.begins).view(-1, 1, 1, 1)
    at = torch.arange(longest, device=query.device)
    seen = (at < lengths) & (at >= lengths - (window or longest))
    if query.dtype == torch.float32:  # whose kernel gives all keys of a head to one block of threads
        scores = (grouped * scale @ keys.mT).masked_fill(~seen, -torch.inf)
        output = scores.softmax(-1) @ values
    else:
        output = F.scaled_dot_product_attention(grouped, keys, values, attn_mask=seen, scale=scale)
    return output.flatten(1, 2).index_select(0, runs.of_token)


def _packed(query: Tensor, key: Tensor, value: Tensor, runs: int, window: int | None, scale: float) -> Tensor:
    """Runs of one length in one call, each attending to itself: query (T, H, K), key, value (G, T, K), T = runs * L."""
    rows = (query, key.transpose(0, 1), value.transpose(0, 1))
    query, key, value = (part.unflatten(0, (runs, -1)).transpose(1, 2) for part in rows)
    return _causal(query, key, value, window, scale).transpose(1, 2).flatten(0, 1)


def _run(query: Tensor, key: Tensor, value: Tensor, window: int | None, scale: float) -> Tensor:
    """Attention of one run: query (L, H, K) and head-major key, value (G, N, K) -> (L, H, K)."""
    if query.shape[0] == 1:
        return _one_query(query, key, value, window, scale)
    heads_first = query.transpose(0, 1).unsqueeze(0)
    return _causal(heads_first, key.unsqueeze(0), value.unsqueeze(0), window, scale)[0].transpose(0, 1)


def _one_query(query: Tensor, key: Tensor, value: Tensor, window: int | None, scale: float) -> Tensor:
    """Attention of a single query (1, H, K), which sees every key (G, N, K), or the last `window` of them.

    The H / G query heads of a KV head become the rows of one product, so that its keys are read once and not H / G
    times.
    """
    if window is not None:
        key, value = key[:, -window:], value[:, -window:]
    grouped = query.reshape(1, key.shape[0], -1, query.shape[-1])
    if query.is_cuda and query.dtype == torch.float32:  # whose kernel gives all keys of a head to one block of threads
        return ((grouped * scale @ key.mT).softmax(-1) @ value).reshape(query.shape)
    output = F.scaled_dot_product_attention(grouped, key.unsqueeze(0), value.unsqueeze(0), scale=scale)
    return output.reshape(query.shape)


def _causal(query: Tensor, key: Tensor, value: Tensor, window: int | None, scale: float) -> Tensor:
    """Causal attention: query (B, H, L, K) at the last L places of key, value (B, G, N, K) -> (B, H, L, K)."""
    length, total = query.shape[2], key.shape[2]
    if window is not None and window < total:
        return _banded(query, key, value, window, scale)
    if length == total:
        return grouped(query, key, value, is_causal=True, scale=scale)
    if query.device.type == "cpu" and not torch.is_grad_enabled():
        return _past_and_own(query, key, value, scale)
    return grouped(query, key, value, attn_mask=causal_lower_right(length, total), scale=scale)


def grouped(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
    """scaled_dot_product_attention with fewer KV heads than query heads.

    On a GPU only PyTorch's flash kernel supports groups. Elsewhere its fallback would hold all scores at once (7.2 GiB
    in fp32 at 8k tokens and 12 heads), so keys and values are repeated for every query head, which other kernels
    support.
    """
    has_groups = query.shape[1] != key.shape[1]
    if has_groups and query.is_cuda and not _is_for_flash(query, options.get("attn_mask")):
        key, value = (part.repeat_interleave(query.shape[1] // part.shape[1], dim=1) for part in (key, value))
        has_groups = False
    return F.scaled_dot_product_attention(query, key, value, enable_gqa=has_groups, **options)


def _is_for_flash(query: Tensor, mask: Tensor | None) -> bool:
    """Whether PyTorch's flash kernel takes the call on a GPU: half precision, and no mask but the causal one."""
    return query.dtype in (torch.bfloat16, torch.float16) and (mask is None or isinstance(mask, CausalBias))


def _past_and_own(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Causal attention as the merger of two calls: over the past (no mask) and over the chunk itself (causal).

    It gives the same result as one call with an (L, N) mask, which would be large and slow. Softmax over both sets of
    keys is the mean of the two outputs, weighted by the exponentials of their log-sum-exps.
    """
    past = key.shape[2] - query.shape[2]
    before, before_lse = _with_lse(query, key[:, :, :past], value[:, :, :past], False, scale)
    own, own_lse = _with_lse(query, key[:, :, past:], value[:, :, past:], True, scale)
    share = torch.sigmoid(before_lse - own_lse).unsqueeze(-1).to(torch.promote_types(query.dtype, torch.float32))
    return torch.lerp(own.to(share.dtype), before.to(share.dtype), share).to(query.dtype)


def _with_lse(query: Tensor, key: Tensor, value: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """Output (B, H, L, K) and log-sum-exp (B, H, L) of torch's flash kernel for CPUs, which supports grouped heads."""
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, 0.0, causal, scale=scale)


def _banded(query: Tensor, key: Tensor, value: Tensor, window: int, scale: float) -> Tensor:
    """Sliding-window attention in tiles of `window` queries, each against the at most 2 * window - 1 keys it sees.

    The work then grows with L * window and not with L * N.
    """
    length, total = query.shape[2], key.shape[2]
    tiles = []
    for start in range(0, length, window):
        stop = min(start + window, length)
        high = total - length + stop
        low = max(0, total - length + start - window + 1)
        mask = _band(stop - start, high - low, window, query.device)
        tile = (query[:, :, start:stop], key[:, :, low:high], value[:, :, low:high])
        tiles.append(grouped(*tile, attn_mask=mask, scale=scale))
    return torch.cat(tiles, dim=2)


def _band(length: int, total: int, window: int, device: torch.device) -> Tensor:
    """The (L, N) mask of a sliding window: query i, at place N - L + i, sees the last `window` keys up to its place."""
    query = torch.arange(total - length, total, device=device).unsqueeze(1)
    key = torch.arange(total, device=device)
    return (key <= query) & (key > query - window)
