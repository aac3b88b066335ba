"""The head: from hidden states to logits over the vocabulary, or to the loss of given targets.

Legend: `T` rows, `D` hidden size, `V` vocabulary.
"""

from __future__ import annotations

from typing import cast

from jaxtyping import Float, Int64
from torch import Tensor, nn

from longwave.ops.cross_entropy import cross_entropy
from longwave.ops.linear import LINEAR, linear


class Head(nn.Linear):
    """An output matrix of its own: logits (T, V), or with targets the summed cross-entropy in nats.

    rows: the rows with a target, to which the loss is confined. Only the loss multiplies the logits by `scale`. form:
    of the product, if one was asked for.
    """

    op = LINEAR
    form: str | None = None

    def __init__(self, width: int, vocabulary: int) -> None:
        super().__init__(width, vocabulary, bias=False)

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        hidden: Float[Tensor, "T D"],
        targets: Int64[Tensor, " T"] | None = None,
        scale: float = 1.0,
        rows: Int64[Tensor, " L"] | None = None,
    ) -> Float[Tensor, "T V"] | Float[Tensor, ""]:
        return _scored(hidden, self.weight, self.form, targets, scale, rows)


class TiedHead(nn.Module):
    """A head that multiplies by the embedding's matrix and has no weights of its own; otherwise like `Head`."""

    bias = None  # libraries read it of any head
    op = LINEAR
    form: str | None = None

    def __init__(self, embed: nn.Module) -> None:
        super().__init__()
        self._embed = (embed,)  # in a tuple, so that the embedding is not registered, and saved, a second time

    @property
    def weight(self) -> Tensor:
        """The (V, D) matrix."""
        return cast(Tensor, self._embed[0].weight)

    def forward(
        self,
        hidden: Float[Tensor, "T D"],
        targets: Int64[Tensor, " T"] | None = None,
        scale: float = 1.0,
        rows: Int64[Tensor, " L"] | None = None,
    ) -> Float[Tensor, "T V"] | Float[Tensor, ""]:
        return _scored(hidden, self.weight, self.form, targets, scale, rows)


def _scored(
    hidden: Tensor, weight: Tensor, form: str | None, targets: Tensor | None, scale: float, rows: Tensor | None
) -> Tensor:
    if targets is None:
        return linear(hidden, weight, form=form)
    return cross_entropy(hidden, weight, targets, scale, rows)
