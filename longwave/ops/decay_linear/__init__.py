"""Linear attention with decay over the runs of a stream: S_t = exp(g_t) S_{t-1} + k_t v_t^T, o_t = scale q_t S_t.

The op serves every layer of this kind, with a log-decay g per head (Lightning Attention, arXiv 2401.04658; RetNet) or
per token and head (gated retention, Mamba-2, distances between kept tokens).

Legend: `T` tokens of the stream, `R` runs, `H` heads, `K` key size, `V` value size, `E` 1 or T.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from longwave.ops.decay_linear import chunked, recurrent, reference, tree
from longwave.ops.forms import INVARIANT, Form, Op, on_cpu
from longwave.streams import Runs

Run: TypeAlias = Callable[[Tensor, Tensor, Tensor, Tensor, Runs, float, Tensor], "tuple[Tensor, Tensor]"]

_KERNEL = "a kernel of the recurrence; chunks where gradients are needed"
_on_cpu = on_cpu(torch.bfloat16, torch.float32, multiple=16, largest=256)
DECAY_LINEAR: Op[Run] = Op(
    "decay_linear",
    {
        "compiled": Form(recurrent.decay_linear_attention, _KERNEL, _on_cpu),
        "torch": Form(
            chunked.decay_linear_attention, f"chunks of {chunked.CHUNK} tokens, a recurrent state between them"
        ),
        INVARIANT: Form(recurrent.decay_linear_attention, _KERNEL, _on_cpu),
        "reference": Form(reference.decay_linear_attention, "the recurrence, in double precision"),
    },
)


def decay_linear_attention(
    query: Float[Tensor, "T H K"],
    key: Float[Tensor, "T H K"],
    value: Float[Tensor, "T H V"],
    log_decay: Float[Tensor, "E H"],
    runs: Runs,
    *,
    scale: float,
    states: Float[Tensor, "R H K V"] | None = None,
    form: str = "torch",
) -> tuple[Float[Tensor, "T H V"], Float[Tensor, "R H K V"]]:
    """The outputs, in the dtype of the values, and the memory S of every run after its last token, in fp32 or wider.

    log_decay: at most 0, by which the memory decays before each token is added; one row for all tokens, or one for
    each.
    states: the memory of every run before its first token; zeros by default.
    Of runs with a tree of drafts, a token sees its own path (`ops.decay_linear.tree`), whatever the form; its log-decay
    is then from the token that leads to it.
    Raises ValueError for states narrower than fp32: rounding would make the slowest decays alike.
    """
    wide = torch.promote_types(query.dtype, torch.float32)
    if states is None:
        states = query.new_zeros(runs.count, *query.shape[1:], value.shape[-1], dtype=wide)
    if states.dtype.itemsize < wide.itemsize:
        raise ValueError(f"states.dtype = {states.dtype}: {wide} or wider")
    if runs.tree is not None:
        return tree.decay_linear_attention(query, key, value, log_decay.to(wide), runs, scale, states)
    return DECAY_LINEAR.forms[form].run(query, key, value, log_decay.to(wide), runs, scale, states)
