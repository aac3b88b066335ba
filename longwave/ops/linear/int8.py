"""The product of a linear layer whose weights are held in int8: w = scale * q, with a scale for each output.

At inference only. Decoding reads every weight for a few rows, so half the bytes are up to half the time; many rows are
multiplied in the type of the activations, in which the whole numbers from -127 to 127 are exact.

Legend: `T` rows, `D` inputs, `E` outputs.
"""

from __future__ import annotations

from collections.abc import Callable
from ctypes import c_int, c_int64, c_void_p
from functools import cache
from typing import Any, NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int8
from torch import Tensor

from longwave.ops import compiled
from longwave.ops.forms import INVARIANT, Call, Form, Op, on_cpu

Run: TypeAlias = "Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]"

_MOST = 64  # rows; for more it is faster to widen the weights once, and to multiply with torch (measured on a Zen 5)
_TORCH = 8  # rows up to which torch's own kernel is faster than that
_INPUTS, _OUTPUTS = 32, 4  # whole multiples of which the kernel takes


class Packed(NamedTuple):
    """Weights in int8. scale: fp32, by which each row is multiplied."""

    weight: Int8[Tensor, "E D"]
    scale: Float[Tensor, " E"]


def pack(weight: Float[Tensor, "E D"]) -> Packed:
    """The nearest weights in int8, of which the largest of a row is 127 or -127; a row of zeros stays zeros.

    The scales have values of the type of the weights, so that a product in this type need not round them.
    """
    wide = weight.float()
    scale = (wide.abs().amax(-1) / 127).to(weight.dtype).float()
    packed = (wide / scale.clamp_min(1e-30).unsqueeze(-1)).round().clamp(-127, 127)
    return Packed(packed.to(torch.int8), scale)


def reference(hidden: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """The product, computed in double precision."""
    product = hidden.double() @ weight.double().T * scale.double()
    return (product if bias is None else product + bias.double()).to(hidden.dtype)


def torch_form(hidden: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """Few rows on a CPU in torch's own kernel; else weights that are widened first."""
    if hidden.device.type == "cpu" and hidden.shape[0] <= _TORCH and hidden.dtype == torch.bfloat16:
        product = torch.ops.aten._weight_int8pack_mm(hidden, weight, scale.to(hidden.dtype))
    else:
        product = F.linear(hidden, weight.to(hidden.dtype)) * scale.to(hidden.dtype)
    return product if bias is None else product + bias


def compiled_form(hidden: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """The kernel of `few_rows.c` where it is faster, and `torch_form` elsewhere."""
    form = few_rows if hidden.shape[0] <= _MOST else torch_form
    return form(hidden, weight, scale, bias)


def few_rows(hidden: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """The product, summed in fp32 in one order, however many rows there are.

    Shapes that the kernel does not know are filled up with zeros.
    """
    bias = None if bias is None else bias.float()
    inputs, outputs = -weight.shape[1] % _INPUTS, -weight.shape[0] % _OUTPUTS
    if not inputs and not outputs:
        return torch.ops.longwave.linear_int8.default(hidden, weight, scale, bias)
    weight = F.pad(weight, (0, inputs, 0, outputs)).contiguous()
    scale, bias = F.pad(scale, (0, outputs)), None if bias is None else F.pad(bias, (0, outputs))
    product = torch.ops.longwave.linear_int8.default(F.pad(hidden, (0, inputs)), weight, scale, bias)
    return product[:, : product.shape[1] - outputs]


LINEAR_INT8: Op[Run] = Op(
    "linear_int8",
    {
        "compiled": Form(compiled_form, "few rows on a CPU; torch elsewhere", on_cpu(torch.bfloat16, torch.float32)),
        "torch": Form(torch_form, "torch's kernel for few rows on a CPU, else weights that are widened first"),
        INVARIANT: Form(
            few_rows,
            "a kernel that sums every row in one order, however many there are",
            on_cpu(torch.bfloat16, torch.float32),
        ),
        "reference": Form(reference, "the product in double precision"),
    },
)


@cache
def _form_of(device: torch.device, dtype: torch.dtype) -> Run:
    name, _ = LINEAR_INT8.resolve(Call(device, dtype))
    return LINEAR_INT8.forms[name].run


def linear_int8(
    hidden: Float[Tensor, "T D"],
    weight: Int8[Tensor, "E D"],
    scale: Float[Tensor, " E"],
    bias: Float[Tensor, " E"] | None = None,
    form: str | None = None,
) -> Float[Tensor, "T E"]:
    """hidden (scale weight)^T + bias, in the type of `hidden`; form: a name in LINEAR_INT8.forms."""
    run = _form_of(hidden.device, hidden.dtype) if form is None else LINEAR_INT8.forms[form].run
    return run(hidden, weight, scale, bias)


torch.library.define("longwave::linear_int8", "(Tensor hidden, Tensor weight, Tensor scale, Tensor? bias) -> Tensor")


@torch.library.impl("longwave::linear_int8", "CPU")
def _linear(hidden: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    hidden, weight = hidden.contiguous(), weight.contiguous()
    output = hidden.new_empty(hidden.shape[0], weight.shape[0])
    _kernel()(
        hidden.data_ptr(),
        weight.data_ptr(),
        scale.data_ptr(),
        None if bias is None else bias.data_ptr(),
        output.data_ptr(),
        hidden.dtype == torch.bfloat16,
        *(hidden.shape[0], weight.shape[1], weight.shape[0]),
        torch.get_num_threads(),
    )
    return output


@torch.library.register_fake("longwave::linear_int8")
def _shape(hidden: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    return hidden.new_empty(hidden.shape[0], weight.shape[0])


@cache
def _kernel() -> Any:
    function = compiled.library().longwave_linear_int8
    function.restype = None
    function.argtypes = [c_void_p] * 5 + [c_int] + [c_int64] * 3 + [c_int]
    return function
