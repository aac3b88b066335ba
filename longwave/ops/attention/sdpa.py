"""Softmax attention through PyTorch's scaled_dot_product_attention: the fast form without kernels of our own.

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
from longwave.stream import Places, Runs


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
    """Queries (T, H, K) of each run against its keys and values (G, N, K), of which they are the last."""
    output = _output(query, key, value, runs, places, pattern.window, scale)
    return with_extras(output, query, key, runs, places, pattern, scale, want)


def _output(
    query: Tensor, key: Tensor, value: Tensor, runs: Runs, places: Places | None, window: int | None, scale: float
) -> Tensor:
    if places is not None:
        pieces = [(key[:, begin:end], value[:, begin:end]) for begin, end in places.spans]
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
    """The runs one after the other: queries (T, H, K), and each run's keys and values (G, n, K)."""
    of_runs = zip(query.split(lengths), pieces, strict=True)
    outputs = [_run(piece, *keys, window, scale) for piece, keys in of_runs if piece.shape[0]]
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def _packed(query: Tensor, key: Tensor, value: Tensor, runs: int, window: int | None, scale: float) -> Tensor:
    """Runs of one length, each attending to itself: query (T, H, K), key and value (G, T, K), T = runs * L."""
    rows = (query, key.transpose(0, 1), value.transpose(0, 1))
    query, key, value = (part.unflatten(0, (runs, -1)).transpose(1, 2) for part in rows)
    return _causal(query, key, value, window, scale).transpose(1, 2).flatten(0, 1)


def _run(query: Tensor, key: Tensor, value: Tensor, window: int | None, scale: float) -> Tensor:
    """One run: query (L, H, K) and head-major key, value (G, N, K) -> (L, H, K)."""
    if query.shape[0] == 1:
        return _one_query(query, key, value, window, scale)
    heads_first = query.transpose(0, 1).unsqueeze(0)
    return _causal(heads_first, key.unsqueeze(0), value.unsqueeze(0), window, scale)[0].transpose(0, 1)


def _one_query(query: Tensor, key: Tensor, value: Tensor, window: int | None, scale: float) -> Tensor:
    """A single query sees every key: the heads of a group become rows that read their keys once."""
    if window is not None:
        key, value = key[:, -window:], value[:, -window:]
    grouped = query.reshape(1, key.shape[0], -1, query.shape[-1])
    if query.is_cuda and query.dtype == torch.float32:  # whose kernel gives all keys of a head to one block of threads
        return ((grouped * scale @ key.mT).softmax(-1) @ value).reshape(query.shape)
    output = F.scaled_dot_product_attention(grouped, key.unsqueeze(0), value.unsqueeze(0), scale=scale)
    return output.reshape(query.shape)


def _causal(query: Tensor, key: Tensor, value: Tensor, window: int | None, scale: float) -> Tensor:
    """query (B, H, L, K), key and value (B, G, N, K), the queries being the last L of the N -> (B, H, L, K)."""
    length, total = query.shape[2], key.shape[2]
    if window is not None and window < total:
        return _banded(query, key, value, window, scale)
    if length == total:
        return _grouped(query, key, value, is_causal=True, scale=scale)
    if query.device.type == "cpu" and not torch.is_grad_enabled():
        return _past_and_own(query, key, value, scale)
    return _grouped(query, key, value, attn_mask=causal_lower_right(length, total), scale=scale)


def _grouped(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
    """Attention whose KV heads serve groups of query heads.

    On a GPU only PyTorch's flash kernel knows groups. What stands in for the others would hold every score (7.2 GiB in
    fp32 at 8k tokens and 12 heads), so there each query head gets keys and values of its own.
    """
    grouped = query.shape[1] != key.shape[1]
    if grouped and query.is_cuda and not _is_for_flash(query, options.get("attn_mask")):
        key, value = (part.repeat_interleave(query.shape[1] // part.shape[1], dim=1) for part in (key, value))
        grouped = False
    return F.scaled_dot_product_attention(query, key, value, enable_gqa=grouped, **options)


def _is_for_flash(query: Tensor, mask: Tensor | None) -> bool:
    return query.dtype in (torch.bfloat16, torch.float16) and (mask is None or isinstance(mask, CausalBias))


def _past_and_own(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """A chunk against its past (no mask) and itself (causal), merged by log-sum-exp: no (L x N) mask is ever held."""
    past = key.shape[2] - query.shape[2]
    before, before_lse = _with_lse(query, key[:, :, :past], value[:, :, :past], False, scale)
    own, own_lse = _with_lse(query, key[:, :, past:], value[:, :, past:], True, scale)
    share = torch.sigmoid(before_lse - own_lse).unsqueeze(-1).to(torch.promote_types(query.dtype, torch.float32))
    return torch.lerp(own.to(share.dtype), before.to(share.dtype), share).to(query.dtype)


def _with_lse(query: Tensor, key: Tensor, value: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp (B, H, L) of torch's CPU flash kernel, which takes grouped heads by their strides."""
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, 0.0, causal, scale=scale)


def _banded(query: Tensor, key: Tensor, value: Tensor, window: int, scale: float) -> Tensor:
    """Sliding window: tiles of `window` queries against the at most 2 * window - 1 keys they see."""
    length, total = query.shape[2], key.shape[2]
    tiles = []
    for start in range(0, length, window):
        stop = min(start + window, length)
        high = total - length + stop
        low = max(0, total - length + start - window + 1)
        mask = _band(stop - start, high - low, window, query.device)
        tile = (query[:, :, start:stop], key[:, :, low:high], value[:, :, low:high])
        tiles.append(_grouped(*tile, attn_mask=mask, scale=scale))
    return torch.cat(tiles, dim=2)


def _band(length: int, total: int, window: int, device: torch.device) -> Tensor:
    """(L, N) mask of the `window` keys that end at each query, the queries being the last of the keys."""
    query = torch.arange(total - length, total, device=device).unsqueeze(1)
    key = torch.arange(total, device=device)
    return (key <= query) & (key > query - window)
