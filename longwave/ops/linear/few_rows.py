"""The kernel for products of few rows (`few_rows.c`), as a torch op.

Legend: `T` rows, `D` inputs, `E` outputs.
"""

from __future__ import annotations

from ctypes import c_int, c_int64, c_void_p
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from longwave.ops import compiled

_MOST = {torch.bfloat16: 64, torch.float32: 16}  # rows; for more, torch's products are as fast (measured on a Zen 5)
_INPUTS, _OUTPUTS = 32, 4  # whole multiples of which the kernel takes


def applies(hidden: Tensor, weight: Tensor) -> bool:
    """Whether the kernel takes this product, and is faster than torch's."""
    return 1 <= hidden.shape[0] <= _MOST.get(hidden.dtype, 0) and _takes(weight)


def linear(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """hidden (T, D) times the transpose of weight (E, D), plus bias (E), summed in fp32 -> (T, E), for any T.

    An entry is summed in one order, whatever T is. Shapes that the kernel does not know are filled up with zeros.
    """
    if _takes(weight):
        return torch.ops.longwave.linear_few_rows.default(hidden, weight, bias)
    more = [-weight.shape[1] % _INPUTS, -weight.shape[0] % _OUTPUTS]
    weight = F.pad(weight, (0, more[0], 0, more[1])).contiguous()
    bias = None if bias is None else F.pad(bias, (0, more[1]))
    wider = torch.ops.longwave.linear_few_rows.default(F.pad(hidden, (0, more[0])), weight, bias)
    return wider[:, : wider.shape[1] - more[1]]


def _takes(weight: Tensor) -> bool:
    return weight.shape[1] % _INPUTS == 0 and weight.shape[0] % _OUTPUTS == 0 and weight.is_contiguous()


torch.library.define("longwave::linear_few_rows", "(Tensor hidden, Tensor weight, Tensor? bias) -> Tensor")


@torch.library.impl("longwave::linear_few_rows", "CPU")
def _linear(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    hidden = hidden.contiguous()
    output = hidden.new_empty(hidden.shape[0], weight.shape[0])
    _kernel()(
        hidden.data_ptr(),
        weight.data_ptr(),
        None if bias is None else bias.data_ptr(),
        output.data_ptr(),
        hidden.dtype == torch.bfloat16,
        hidden.shape[0],
        weight.shape[1],
        weight.shape[0],
        torch.get_num_threads(),
    )
    return output


@torch.library.register_fake("longwave::linear_few_rows")
def _shape(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return hidden.new_empty(hidden.shape[0], weight.shape[0])


@cache
def _kernel() -> Any:
    function = compiled.library().longwave_linear
    function.restype = None
    function.argtypes = [c_void_p] * 4 + [c_int] + [c_int64] * 3 + [c_int]
    return function
