"""Linear layers that are fast for few rows as well, as decoding has them.

Legend: `T` rows, `D` inputs, `E` outputs.
"""

from __future__ import annotations

from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from longwave.ops.forms import Op
from longwave.ops.linear import LINEAR, LINEAR_INT8, linear, linear_int8, pack


class Linear(nn.Linear):
    """`nn.Linear` whose product runs through the op `longwave.ops.linear`.

    form: the form that was asked for, or None. scale: of weights that `pack` has rounded to int8, for each output.
    """

    form: str | None = None
    scale: Float[Tensor, " E"] | None

    def __init__(self, in_features: int, out_features: int, bias: bool = True) -> None:
        super().__init__(in_features, out_features, bias)
        self.register_buffer("scale", None, persistent=False)

    def forward(self, input: Float[Tensor, "T D"]) -> Float[Tensor, "T E"]:
        if self.scale is not None:
            return linear_int8(input, self.weight, self.scale, self.bias, self.form)
        return linear(input, self.weight, self.bias, self.form)

    @property
    def op(self) -> Op[Any]:
        """The op that runs the product."""
        return LINEAR if self.scale is None else LINEAR_INT8

    def pack(self) -> None:
        """Rounds the weights to int8, for inference only."""
        if self.scale is None:
            packed = pack(self.weight.detach())
            self.weight = nn.Parameter(packed.weight, requires_grad=False)
            self.scale = packed.scale


class Gate(Linear):
    """A linear layer of a gate, whose weights are never rounded."""

    def pack(self) -> None:
        return
