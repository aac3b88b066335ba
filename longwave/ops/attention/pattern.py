"""Which keys a query of softmax attention sees, and what attention can tell beside its output.

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
    """What of its run's past a query sees: all of it, or the last `window` keys, its own included."""

    window: int | None = None


CAUSAL = Pattern()


class Attended(NamedTuple):
    """The outcome of attention.

    lse: the log of the sum of exponentials of a query's scores, by which two results over different keys are merged
        (ring attention, Liu et al. 2023). column_sums: the weight that each key gets of all queries of the call (H2O,
        Zhang et al. 2023); 0 for entries that belong to no run. Both in fp32 or wider, and only if they were wanted.
    """

    output: Float[Tensor, "T H K"]
    lse: Float[Tensor, "T H"] | None = None
    column_sums: Float[Tensor, "H N"] | None = None
