"""Softmax attention over runs: causal or sliding-window, grouped heads, with or without a remembered past.

Legend: `T` tokens of the stream, `H` query heads, `G` KV heads, `N` keys of one run, `K` head size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

from jaxtyping import Float
from torch import Tensor

from longwave.ops.attention import one_query, ragged, reference, sdpa
from longwave.ops.forms import pick

ByRun: TypeAlias = "list[Float[Tensor, 'G N K']]"
Form: TypeAlias = Callable[[Tensor, ByRun, ByRun, tuple[int, ...], "int | None", float], Tensor]

FORMS: dict[str, Form] = {
    "reference": reference.attention,
    "torch": sdpa.attention,
    "compiled": one_query.attention,
}


def choose(form: str | None = None) -> tuple[str, str]:
    """The form that attention will run and why."""
    torch = "scaled_dot_product_attention; on a GPU its variable-length kernel for ragged runs"
    return pick("attention", FORMS, form, kernels=f"single queries on a CPU; elsewhere {torch}", torch=torch)


def attention(
    query: Float[Tensor, "T H K"],
    key: Float[Tensor, "T G K"] | ByRun,
    value: Float[Tensor, "T G K"] | ByRun,
    lengths: tuple[int, ...],
    *,
    window: int | None = None,
    scale: float,
    form: str = "torch",
) -> Float[Tensor, "T H K"]:
    """Every query attends to the keys of its run up to itself, or to the last `window` of those.

    key, value: in the layout of the stream, or head-major (G, N, K) per run where a state holds the past as well; the
    queries of run `r` are then the last `lengths[r]` of its keys. A run without queries is passed over.
    """
    if isinstance(key, Tensor) and isinstance(value, Tensor):
        if not query.shape[0]:
            return query + (key.sum() + value.sum())  # of nothing, but every projection gets its gradient
        if form != "reference":
            if ragged.takes(query) and (window is not None or len(set(lengths)) > 1):
                return ragged.attention(query, key, value, lengths, window, scale)
            if len(set(lengths)) == 1:
                return sdpa.packed(query, key, value, len(lengths), window, scale)
        key, value = by_run(key, lengths), by_run(value, lengths)
    assert isinstance(key, list)
    assert isinstance(value, list)
    return FORMS[form](query, key, value, lengths, window, scale)


def by_run(stream: Float[Tensor, "T G K"], lengths: tuple[int, ...]) -> ByRun:
    """The keys or values of a stream, head-major (G, N, K) per run."""
    return [piece.transpose(0, 1) for piece in stream.split(lengths)]
