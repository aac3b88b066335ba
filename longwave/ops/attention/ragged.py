"""Runs of different lengths in one kernel on a GPU: PyTorch's variable-length flash attention, with grouped heads.

Legend: `T` tokens of the stream, `H` query heads, `G` KV heads, `K` head size, `R` runs.
"""

from __future__ import annotations

from functools import lru_cache
from inspect import signature
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

# PyTorch 2.11 takes grouped heads as they come; later it wants to be told.
_GROUPED: dict[str, Any] = {"enable_gqa": True} if "enable_gqa" in signature(varlen_attn).parameters else {}


def takes(query: Tensor) -> bool:
    """Whether the kernel takes these heads: half precision on a GPU of 2020 (Ampere) or later, size 8 to 256."""
    known = query.is_cuda and query.dtype in (torch.bfloat16, torch.float16)
    size = query.shape[-1]
    return known and size % 8 == 0 and size <= 256 and torch.cuda.get_device_capability(query.device) >= (8, 0)


def attention(
    query: Tensor, key: Tensor, value: Tensor, lengths: tuple[int, ...], window: int | None, scale: float
) -> Tensor:
    """Each run attends to itself: query (T, H, K), key and value (T, G, K), in the layout of the stream."""
    bounds, longest = _bounds(lengths, query.device), max(lengths)
    seen = (-1 if window is None else window - 1, 0)
    places = (bounds, bounds, longest, longest)
    output = varlen_attn(query, key, value, *places, scale=scale, window_size=seen, **_GROUPED)
    assert isinstance(output, Tensor)
    return output


@lru_cache(maxsize=16)  # for all layers of a level, forward and recomputed
def _bounds(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    """Row where each run begins, and T at the end (R + 1)."""
    with torch.inference_mode(False):  # so that training can keep it for its backward pass
        return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)
