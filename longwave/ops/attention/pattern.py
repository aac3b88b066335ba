"""Arguments and results of softmax attention: which keys a query sees, and further results beside the output.

Legend: `T` tokens of the stream, `H` query heads, `K` head size, `N` entries of the arrays of keys.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeAlias

from jaxtyping import Float
from torch import Tensor

Extra: TypeAlias = Literal["lse", "column_sums"]
Wanted: TypeAlias = Collection[Extra]


@dataclass(frozen=True)
class Pattern:
    """The keys of its run that a query sees: all up to its own, or the last `window` of them (a sliding window)."""

    window: int | None = None


CAUSAL = Pattern()


class Attended(NamedTuple):
    """The result of attention; `lse` and `column_sums` only where they were asked for, in fp32 or wider.

    lse: log-sum-exp of each query's scores, with which results over different keys can be merged (ring attention, Liu
        et al. 2023).
    column_sums: for each key the sum of its weights over all queries of the call (H2O, Zhang et al. 2023); 0 for
        entries that belong to no run.
    """

    output: Float[Tensor, "T H K"]
    lse: Float[Tensor, "T H"] | None = None
    column_sums: Float[Tensor, "H N"] | None = None
