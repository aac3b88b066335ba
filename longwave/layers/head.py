"""The head: from hidden states to scores of every token of the vocabulary, or to the loss of the next ones.

Legend: `T` rows, `D` hidden size, `V` vocabulary.
"""

from __future__ import annotations

from jaxtyping import Float, Int64
from torch import Tensor, nn

from longwave.ops.cross_entropy import cross_entropy
from longwave.ops.linear import linear


class Head(nn.Linear):
    """A matrix of its own. Logits are unscaled; a loss is that of the logits times `scale`, summed over `rows`."""

    def __init__(self, width: int, vocabulary: int) -> None:
        super().__init__(width, vocabulary, bias=False)

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        hidden: Float[Tensor, "T D"],
        targets: Int64[Tensor, " T"] | None = None,
        scale: float = 1.0,
        rows: Int64[Tensor, " L"] | None = None,
    ) -> Float[Tensor, "T V"] | Float[Tensor, ""]:
        return _scored(hidden, self.weight, targets, scale, rows)


class TiedHead(nn.Module):
    """The embedding's matrix, read as a head; it holds no weights of its own."""

    def __init__(self, embed: nn.Embedding) -> None:
        super().__init__()
        self._embed = (embed,)  # in a tuple, so that the module is not registered twice

    @property
    def weight(self) -> Tensor:
        """The (V, D) matrix."""
        return self._embed[0].weight

    def forward(
        self,
        hidden: Float[Tensor, "T D"],
        targets: Int64[Tensor, " T"] | None = None,
        scale: float = 1.0,
        rows: Int64[Tensor, " L"] | None = None,
    ) -> Float[Tensor, "T V"] | Float[Tensor, ""]:
        return _scored(hidden, self.weight, targets, scale, rows)


def _scored(hidden: Tensor, weight: Tensor, targets: Tensor | None, scale: float, rows: Tensor | None) -> Tensor:
    return linear(hidden, weight) if targets is None else cross_entropy(hidden, weight, targets, scale, rows)
