"""The reference form of decay linear attention: the recurrence in double precision, token by token."""

from __future__ import annotations

import torch
from torch import Tensor

from longwave.streams import Runs


def decay_linear_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_decay: Tensor,
    runs: Runs,
    scale: float,
    states: Tensor,
) -> tuple[Tensor, Tensor]:
    """For each token of a run: S = exp(g) S + k v^T, then o = scale q S."""
    pieces = (tensor.double().split(runs.lengths) for tensor in (query, key, value))
    decays = log_decay.double().exp().expand(query.shape[0], -1).split(runs.lengths)
    outputs, finals = [value.double()[:0]], []
    for q, k, v, decay, state in zip(*pieces, decays, states.double(), strict=True):
        for t in range(q.shape[0]):
            state = decay[t, :, None, None] * state + torch.matmul(k[t].unsqueeze(2), v[t].unsqueeze(1))
            outputs.append(scale * torch.einsum("hk,hkv->hv", q[t], state).unsqueeze(0))
        finals.append(state)
    return torch.cat(outputs).to(value.dtype), torch.stack(finals).to(states.dtype) if finals else states
