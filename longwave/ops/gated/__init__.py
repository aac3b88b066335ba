"""Gated products act(x) * y, entry by entry: SwiGLU's, and the output gates of mixers.

torch's functions are as fast, but compute the last entries of an array, or of a thread's share of it, in another way
than the others, so that a number may differ in its last bit with the size of the array: the form `invariant` does not.

Legend: `*lead` any shape.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, TypeAlias

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from longwave.ops.forms import INVARIANT, Form, Op, on_cpu
from longwave.ops.gated import compiled

Act: TypeAlias = Literal["silu", "sigmoid"]
Run: TypeAlias = Callable[[Tensor, "Tensor | None", str], Tensor]


def _torch(gate: Tensor, value: Tensor | None, kind: str) -> Tensor:
    act = F.silu(gate) if kind == "silu" else torch.sigmoid(gate)
    return act if value is None else act * value


def _reference(gate: Tensor, value: Tensor | None, kind: str) -> Tensor:
    wide = gate.double()
    act = (wide if kind == "silu" else 1) / (1 + (-wide).exp())
    return (act if value is None else act * value.double()).to(gate.dtype)


def _invariant(gate: Tensor, value: Tensor | None, kind: str) -> Tensor:
    return _torch(gate, value, kind) if torch.is_grad_enabled() else compiled.gated(gate, value, kind)


GATED: Op[Run] = Op(
    "gated",
    {
        "torch": Form(_torch, "torch's functions"),
        INVARIANT: Form(_invariant, "a kernel, the same for every entry", on_cpu(torch.bfloat16, torch.float32)),
        "reference": Form(_reference, "the formula, in double precision"),
    },
)


def gated(
    gate: Float[Tensor, "*lead"], value: Float[Tensor, "*lead"] | None = None, *, act: Act, form: str = "torch"
) -> Float[Tensor, "*lead"]:
    """act(gate) * value, or act(gate) without a value. form: a name in GATED.forms."""
    return GATED.forms[form].run(gate, value, act)
