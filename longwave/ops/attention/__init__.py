"""Softmax attention over the runs of a stream: causal, with a sliding window or without, and grouped heads.

A run is a piece of one sequence; its queries may also see keys of the sequence's past, which a state holds.

Legend: `T` tokens of the stream, `H` query heads, `G` KV heads, `N` entries of the arrays of keys, `K` head size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from longwave.ops.attention import one_query, reference, sdpa, tree
from longwave.ops.attention.pattern import CAUSAL, Attended, Extra, Pattern, Wanted
from longwave.ops.attention.weights import with_extras
from longwave.ops.forms import INVARIANT, Form, Op, on_cpu
from longwave.streams import Places, Runs

__all__ = ["ATTENTION", "CAUSAL", "Attended", "Extra", "Pattern", "attention"]

Run: TypeAlias = Callable[[Tensor, Tensor, Tensor, Runs, "Places | None", Pattern, float, Wanted], Attended]

_TORCH = "scaled_dot_product_attention; on a GPU its variable-length kernel for ragged runs"
ATTENTION: Op[Run] = Op(
    "attention",
    {
        "compiled": Form(
            one_query.attention,
            f"a kernel for runs of up to 16 queries; for others {_TORCH}",
            on_cpu(torch.bfloat16, torch.float32, multiple=32),
        ),
        "torch": Form(sdpa.attention, _TORCH),
        INVARIANT: Form(
            one_query.each_query,
            "a kernel for single queries, for every query",
            on_cpu(torch.bfloat16, torch.float32, multiple=32),
        ),
        "reference": Form(reference.attention, "the formula, in double precision"),
    },
)


def attention(
    query: Float[Tensor, "T H K"],
    key: Float[Tensor, "G N K"],
    value: Float[Tensor, "G N K"],
    runs: Runs,
    places: Places | None = None,
    *,
    pattern: Pattern = CAUSAL,
    scale: float,
    want: Wanted = (),
    form: str = "torch",
) -> Attended:
    """Every query attends to the keys of its run up to its own, or to the last `pattern.window` of these.

    query: token-major. key, value: head-major, as a state holds them. places: the entries of `key` and `value` that
    belong to each run, the run's queries standing at the last of them; by default the stream's own tokens (N = T).
    scale: factor of the scores. want: further results beside the output (`Attended`). form: a name in ATTENTION.forms.
    Of runs with a tree of drafts, a query sees the keys of its own path (`ops.attention.tree`), whatever the form.
    """
    if not query.shape[0]:
        # Nothing attends, but query, key and value take part in the result, so that their weights get gradients of 0.
        nothing = query + (key.sum() + value.sum()) if places is None else query
        return with_extras(nothing, query, key, runs, places, pattern, scale, want)
    if runs.tree is not None:
        assert places is not None
        assert not want
        return Attended(tree.attention(query, key, value, runs, places, pattern, scale))
    return ATTENTION.forms[form].run(query, key, value, runs, places, pattern, scale, want)
