"""Linear attention with decay over runs that end in trees of drafts (`longwave.trees`).

Written out over all pairs of a run, o_t = scale q_t (exp(G_t) S + sum_u exp(G_t - G_u) k_u v_u^T) over the tokens u
that lead to t, itself included, where G_t is the sum of their log-decays and S the memory before the run. No memory is
copied for a path.

Legend: `T` tokens of the stream, `R` runs, `L` tokens of a run, `H` heads, `K` key size, `V` value size, `E` 1 or T.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from longwave.streams import Runs


def decay_linear_attention(
    query: Float[Tensor, "T H K"],
    key: Float[Tensor, "T H K"],
    value: Float[Tensor, "T H V"],
    log_decay: Float[Tensor, "E H"],
    runs: Runs,
    scale: float,
    states: Float[Tensor, "R H K V"],
) -> tuple[Float[Tensor, "T H V"], Float[Tensor, "R H K V"]]:
    """The outputs, and the memory after the last token of every run, which is that of its path alone.

    Arguments as in `longwave.ops.decay_linear.decay_linear_attention`.
    """
    decays = log_decay.double().expand(query.shape[0], -1)
    pieces = (tensor.split(runs.lengths) for tensor in (query, key, value, decays))
    outputs, finals = [value[:0]], list[Tensor]()
    for q, k, v, decay, seen, state in zip(*pieces, runs.visible(), states, strict=True):
        output, final = _run(q, k, v, decay, seen, state) if len(q) else (v, state)
        outputs.append((scale * output).to(value.dtype))
        finals.append(final)
    return torch.cat(outputs), torch.stack(finals) if finals else states


def _run(
    query: Float[Tensor, "L H K"],
    key: Float[Tensor, "L H K"],
    value: Float[Tensor, "L H V"],
    decay: Float[Tensor, "L H"],
    seen: Bool[Tensor, "L L"],
    state: Float[Tensor, "H K V"],
) -> tuple[Float[Tensor, "L H V"], Float[Tensor, "H K V"]]:
    """One run, in the precision of its memory."""
    query, key, value = (one.to(state.dtype).transpose(0, 1) for one in (query, key, value))
    total = (seen.double() @ decay).T  # (H, L)
    between = (total.unsqueeze(2) - total.unsqueeze(1)).clamp(max=0).masked_fill(~seen, -torch.inf)
    since, before = between.to(state.dtype).exp(), total.to(state.dtype).exp().unsqueeze(2)
    output = (query @ key.mT * since) @ value + before * (query @ state)
    final = before[:, -1:] * state + (key * since[:, -1].unsqueeze(2)).mT @ value
    return output.transpose(0, 1), final
