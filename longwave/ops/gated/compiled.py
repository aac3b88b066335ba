"""The compiled form of gated products (`gated.c`), as a torch op."""

from __future__ import annotations

from ctypes import c_int, c_int64, c_void_p
from functools import cache
from typing import Any

import torch
from torch import Tensor

from longwave.ops import compiled


def gated(gate: Tensor, value: Tensor | None, kind: str) -> Tensor:
    """act(gate) * value; without gradient."""
    return torch.ops.longwave.gated.default(gate, value, kind == "silu")


torch.library.define("longwave::gated", "(Tensor gate, Tensor? value, bool silu) -> Tensor")


@torch.library.impl("longwave::gated", "CPU")
def _run(gate: Tensor, value: Tensor | None, silu: bool) -> Tensor:
    gate, output = gate.contiguous(), torch.empty_like(gate, memory_format=torch.contiguous_format)
    value = None if value is None else value.contiguous()
    pointers = (gate.data_ptr(), None if value is None else value.data_ptr(), output.data_ptr())
    _kernel()(*pointers, gate.dtype == torch.bfloat16, silu, gate.numel(), torch.get_num_threads())
    return output


@torch.library.register_fake("longwave::gated")
def _shape(gate: Tensor, value: Tensor | None, silu: bool) -> Tensor:
    return torch.empty_like(gate, memory_format=torch.contiguous_format)


@cache
def _kernel() -> Any:
    function = compiled.library().longwave_gated
    function.argtypes = [c_void_p] * 3 + [c_int, c_int, c_int64, c_int]
    function.restype = None
    return function
