"""Linear layers that read their weights as fast as the machine allows, however few rows there are.

Legend: `T` rows, `D` inputs, `E` outputs.
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, nn

from longwave.ops.linear import linear


class Linear(nn.Linear):
    """`nn.Linear` through the op `linear`."""

    def forward(self, input: Float[Tensor, "T D"]) -> Float[Tensor, "T E"]:
        return linear(input, self.weight, self.bias)
