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

_MOST = 64  # rows; products of more rows go to torch at once


def reference(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The product, computed in double precision."""
    product = hidden.double() @ weight.double().T
    return (product if bias is None else product + bias.double()).to(hidden.dtype)


def compiled_form(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The kernel of `few_rows.c` where it applies, and torch's product elsewhere."""
    form = few_rows.linear if few_rows.applies(hidden, weight) else F.linear
    return form(hidden, weight, bias)


LINEAR: Op[Run] = Op(
    "linear",
    {
        "compiled": Form(compiled_form, "few rows on a CPU; torch elsewhere", on_cpu(torch.bfloat16, torch.float32)),
        "torch": Form(F.linear, "torch's products"),
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
