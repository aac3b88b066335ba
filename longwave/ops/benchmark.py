"""What an op says of its own benchmark: what it is given, its forms, the reference, and the work that it takes.

An op's `benchmark.py` has a function `cases(shape)`, which `longwave.benchmarks.ops.OPS` names; `longwave bench ops`
checks and times every form of every case.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from longwave.costs import Work
from longwave.ops.forms import REFERENCE, Op

WHOLE = 128  # tokens at which a case is checked whole, where of a longer one only some rows are


@dataclass(frozen=True)
class Shape:
    """The sizes that ops are timed at: `batch` sequences of `context` tokens in a model with these heads and widths.

    window: tokens that a sliding window sees, or None where no layer has one. blocks: of 64 keys, that a query of
    block-sparse attention sees.
    """

    context: int
    batch: int
    heads: int
    kv_heads: int
    head_size: int
    hidden_size: int
    vocab_size: int
    window: int | None
    dtype: torch.dtype
    device: torch.device
    seed: int = 0
    blocks: int = 96

    def normal(self, name: str, *size: int, scale: float = 1.0) -> Tensor:
        """Normal draws that the seed, the name and the size decide."""
        generator = torch.Generator().manual_seed(zlib.crc32(f"{self.seed} {name} {size}".encode()))
        return (scale * torch.randn(*size, generator=generator)).to(self.device, self.dtype)


@dataclass(frozen=True)
class Beside:
    """Another function of the same inputs, for which a form stands in; its output is not compared with anything.

    forward, backward: what its two passes take at least.
    """

    run: Callable[..., Tensor]
    forward: Work
    backward: Work


@dataclass(frozen=True)
class Case:
    """One use of an op at one shape.

    quantity: the op and its use, such as `attention prefill`. tokens: new ones that it is for. context: tokens of each
        sequence that it looks at; one where it makes no difference how many there are.
    inputs: what every form takes; where there is a `backward`, the floating ones get gradients.
    forms: from the inputs to an output of one tensor.
    reference: the same in double precision, for inputs in double precision; it can be differentiated. Where all of it
        would take too long, it gives those of the output's rows that `rows` names.
    forward, backward: what the two passes take at least.
    beside: by name, what else is timed in the same rounds.
    """

    quantity: str
    context: int
    tokens: int
    inputs: tuple[Tensor, ...]
    forms: Mapping[str, Callable[..., Tensor]]
    reference: Callable[..., Tensor]
    forward: Work
    backward: Work | None = None
    rows: Tensor | None = None
    beside: Mapping[str, Beside] = field(default_factory=dict)

    @property
    def default(self) -> str:
        """The form that models run, the others' yardstick."""
        return "compiled" if "compiled" in self.forms else "torch"

    @property
    def checked(self) -> str:
        """What of the output is compared with the reference, in words."""
        return "all" if self.rows is None else f"{len(self.rows)} rows, all of {WHOLE} tokens"


def forms_here(op: Op[Any], shape: Shape) -> list[str]:
    """Of an op's forms those that can be timed: all that take these inputs, but for the reference."""
    return [name for name in op.forms_on(shape.device, shape.dtype, shape.head_size) if name != REFERENCE]
