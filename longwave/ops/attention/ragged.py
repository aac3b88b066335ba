"""Attention over runs of different lengths in one kernel on a GPU: PyTorch's variable-length flash attention.

Legend: `T` tokens of the stream, `H` query heads, `G` KV heads, `K` head size, `R` runs.
"""

from __future__ import annotations

from inspect import signature
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from longwave.streams import Runs

# PyTorch 2.11 accepts grouped heads without an option; later versions need enable_gqa.
_GROUPED: dict[str, Any] = {"enable_gqa": True} if "enable_gqa" in signature(varlen_attn).parameters else {}


def takes(query: Tensor) -> bool:
    """Whether the kernel takes these heads: half precision on a GPU of 2020 (Ampere) or later, size 8 to 256."""
    known = query.is_cuda and query.dtype in (torch.bfloat16, torch.float16)
    size = query.shape[-1]
    return known and size % 8 == 0 and size <= 256 and torch.cuda.get_device_capability(query.device) >= (8, 0)


def attention(query: Tensor, key: Tensor, value: Tensor, runs: Runs, window: int | None, scale: float) -> Tensor:
    """Attention of each run to itself: query (T, H, K), key and value (G, T, K) -> (T, H, K)."""
    seen = (-1 if window is None else window - 1, 0)
    places = (runs.bounds32, runs.bounds32, runs.most, runs.most)
    rows = (query, key.transpose(0, 1), value.transpose(0, 1))
    output = varlen_attn(*rows, *places, scale=scale, window_size=seen, **_GROUPED)
    assert isinstance(output, Tensor)
    return output
