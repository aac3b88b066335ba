"""The product y = x W^T + b of a linear layer, fast for few rows on a CPU, where reading the weights takes the time.

Legend: `T` rows, `D` inputs, `E` outputs.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import TypeAlias

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from longwave.ops.forms import INVARIANT, Call, Form, Op, on_cpu
from longwave.ops.linear import few_rows
from longwave.ops.linear.int8 import LINEAR_INT8, linear_int8, pack

__all__ = ["LINEAR", "LINEAR_INT8", "linear", "linear_int8", "pack"]

Run: TypeAlias = Callable[[Tensor, Tensor, "Tensor | None"], Tensor]

_MOST = 32  # rows; products of more rows go to torch at once
_TRANSPOSED = {torch.bfloat16: range(1, 33), torch.float32: range(8, 33)}  # numbers of rows for which W x^T is faster


def reference(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The product, computed in double precision."""
    product = hidden.double() @ weight.double().T
    return (product if bias is None else product + bias.double()).to(hidden.dtype)


def transposed_product(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """(W x^T)^T, which reads the weights 1.2 to 2.5 times as fast as x W^T (torch 2.13, Xeon with AMX)."""
    if hidden.shape[0] not in _TRANSPOSED.get(hidden.dtype, ()):
        return F.linear(hidden, weight, bias)
    if hidden.shape[0] == 1:
        product = torch.mv(weight, hidden[0]).unsqueeze(0)
    else:
        product = torch.mm(weight, hidden.T).T.contiguous()
    return product if bias is None else product.add_(bias)


def compiled_form(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The kernel of `few_rows.c` where it applies, and `transposed_product` elsewhere."""
    form = few_rows.linear if few_rows.applies(hidden, weight) else transposed_product
    return form(hidden, weight, bias)


LINEAR: Op[Run] = Op(
    "linear",
    {
        "compiled": Form(compiled_form, "few rows on a CPU; torch elsewhere", on_cpu(torch.bfloat16, torch.float32)),
        "torch": Form(transposed_product, "torch's products, transposed_product where that is faster"),
        INVARIANT: Form(
            few_rows.linear,
            "a kernel that sums every row in one order, however many there are",
            on_cpu(torch.bfloat16, torch.float32),
        ),
        "reference": Form(reference, "the product in double precision"),
    },
)


@cache
def _form_of(dtype: torch.dtype) -> Run:
    """The form that runs products of few rows on a CPU."""
    name, _ = LINEAR.resolve(Call(torch.device("cpu"), dtype))
    return LINEAR.forms[name].run


def linear(
    hidden: Float[Tensor, "T D"],
    weight: Float[Tensor, "E D"],
    bias: Float[Tensor, " E"] | None = None,
    form: str | None = None,
) -> Float[Tensor, "T E"]:
    """hidden W^T + bias. Few rows at inference on a CPU, as in decoding, run the op's form; all else runs torch.

    form: a name in LINEAR.forms, which then runs all calls at inference.
    """
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return F.linear(hidden, weight, bias)
    if form is not None:
        return LINEAR.forms[form].run(hidden, weight, bias)
    few = hidden.shape[0] <= _MOST and hidden.device.type == "cpu" and hidden.dtype == weight.dtype
    if not few or torch.is_autocast_enabled("cpu"):
        return F.linear(hidden, weight, bias)
    return _form_of(hidden.dtype)(hidden, weight, bias)
