"""Linear layers that are fast for few rows as well, as decoding has them.

Legend: `T` rows, `D` inputs, `E` outputs.
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, nn

from longwave.ops.linear import linear


class Linear(nn.Linear):
    """`nn.Linear` whose product runs through the op `longwave.ops.linear`.

    form: the form that was asked for, or None.
    """

    form: str | None = None

    def forward(self, input: Float[Tensor, "T D"]) -> Float[Tensor, "T E"]:
        return linear(input, self.weight, self.bias, self.form)
