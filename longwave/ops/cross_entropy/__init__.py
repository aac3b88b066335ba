"""Cross-entropy of a linear head, in chunks of rows, so that the full (T, V) logits are never held.

Legend: `T` rows, `D` hidden size, `V` vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor

from longwave.ops.forms import Form, Op

_CHUNK_ELEMENTS = 1 << 24  # logits held at a time: 64 MiB in fp32


def reference(hidden: Tensor, weight: Tensor, targets: Tensor, scale: float) -> Tensor:
    """The sum over rows of -log softmax(scale * W h)[target], in double precision; rows of target -100 do not count."""
    logits = scale * hidden.double() @ weight.double().T
    return F.cross_entropy(logits, targets, ignore_index=-100, reduction="sum")


def cross_entropy(
    hidden: Float[Tensor, "T D"],
    weight: Float[Tensor, "V D"],
    targets: Int64[Tensor, " T"],
    scale: float = 1.0,
    rows: Int64[Tensor, " L"] | None = None,
) -> Float[Tensor, ""]:
    """The summed cross-entropy of all rows in nats, in fp32; rows of target -100 do not count.

    rows: the rows that do count, where they are known; finding them makes the host wait for the device.
    Gradients are made in the forward pass, while the logits of a chunk are at hand (as Liger kernels do).
    """
    if rows is None:
        rows = (targets != -100).nonzero().flatten()
    if rows.numel() < targets.numel():
        hidden, targets = hidden.index_select(0, rows), targets.index_select(0, rows)
    if torch.is_autocast_enabled(hidden.device.type):
        hidden = hidden.to(torch.get_autocast_dtype(hidden.device.type))
    wanted = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    return _CrossEntropy.apply(hidden, weight, targets, scale, wanted)


CROSS_ENTROPY: Op[Callable[..., Tensor]] = Op(
    "cross_entropy",
    {
        "torch": Form(cross_entropy, "chunks of rows, gradients made in the forward pass"),
        "reference": Form(reference, "all logits at once, in double precision"),
    },
)


class _CrossEntropy(torch.autograd.Function):
    """The loss. Its forward pass makes the gradients too; backward only multiplies them by the gradient of the loss."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, scale: float, wanted: bool) -> Tensor:
        total = torch.zeros((), dtype=torch.promote_types(hidden.dtype, torch.float32), device=hidden.device)
        matrix = weight.to(hidden.dtype)
        grad_hidden = torch.empty_like(hidden) if wanted else None
        grad_weight = torch.zeros_like(weight) if wanted and weight.requires_grad else None
        step = max(1, _CHUNK_ELEMENTS // weight.shape[0])
        for start in range(0, hidden.shape[0], step):
            piece = slice(start, start + step)
            loss, slope = _chunk(hidden[piece], matrix, targets[piece], scale, wanted)
            total += loss
            if slope is not None and grad_hidden is not None:
                torch.mm(slope, matrix, out=grad_hidden[piece])
            if slope is not None and grad_weight is not None:
                grad_weight += slope.T @ hidden[piece]
        ctx.save_for_backward(grad_hidden, grad_weight)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        factor = gradients[0]
        by_hidden, by_weight = (None if one is None else one * factor.to(one) for one in ctx.saved_tensors)
        return by_hidden, by_weight, None, None, None


def _chunk(hidden: Tensor, matrix: Tensor, targets: Tensor, scale: float, wanted: bool) -> tuple[Tensor, Tensor | None]:
    """The loss of one chunk, and (if `wanted`) its gradient by the unscaled logits, in the dtype of `hidden`."""
    logits = (hidden @ matrix.T).to(torch.promote_types(hidden.dtype, torch.float32))
    if scale != 1:
        logits *= scale
    logs = torch.log_softmax(logits, dim=-1)
    index = targets.unsqueeze(1)
    loss = -logs.gather(1, index).sum()
    if not wanted:
        return loss, None
    slope = logs.exp_()  # the gradient of cross-entropy by the logits is softmax minus the one-hot target
    slope.scatter_add_(1, index, torch.full_like(index, -1, dtype=slope.dtype))
    return loss, (slope if scale == 1 else slope.mul_(scale)).to(hidden.dtype)
