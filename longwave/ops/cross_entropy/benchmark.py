"""Benchmark case of the cross-entropy of a head: all rows of a batch of training windows."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from longwave.costs import Work
from longwave.ops.benchmark import Case, Shape
from longwave.ops.cross_entropy import cross_entropy, reference

_CHUNK_ELEMENTS = 1 << 22  # logits of the reference held at a time: 32 MiB


def cases(shape: Shape) -> list[Case]:
    """Every row of B training windows of N tokens against the whole vocabulary."""
    rows, vocabulary, width = shape.batch * shape.context, shape.vocab_size, shape.hidden_size
    hidden, weight = shape.normal("hidden", rows, width), shape.normal("weight", vocabulary, width, scale=width**-0.5)
    generator = torch.Generator().manual_seed(shape.seed)
    targets = torch.randint(0, vocabulary, (rows,), generator=generator).to(shape.device)
    flops, read = 2 * rows * vocabulary * width, hidden.nbytes + weight.nbytes
    return [
        Case(
            "cross_entropy",
            shape.context,
            rows,
            (hidden, weight, targets),
            {"torch": cross_entropy},
            _by_chunks,
            Work(flops, read),
            Work(2 * flops, 2 * read),
        )
    ]


def _by_chunks(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """The reference chunk by chunk, so that not all logits are held in double precision at once."""
    step = max(1, _CHUNK_ELEMENTS // len(weight))
    pieces = [slice(start, start + step) for start in range(0, len(hidden), step)]
    losses = [checkpoint(reference, hidden[one], weight, targets[one], 1.0, use_reentrant=False) for one in pieces]
    return torch.stack(losses).sum()  # pyright: ignore[reportArgumentType, reportCallIssue]
