"""Benchmark cases of an op: inputs, forms to time, the reference to check them against, and the least work.

Every op's `benchmark.py` has a function `cases(shape)`, registered in `longwave.benchmarks.ops.OPS`. `longwave bench
ops` checks and times every form of every case.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from longwave.costs import Work
from longwave.ops.forms import INVARIANT, REFERENCE, Op

WHOLE = 128  # tokens of the short case of which every row is checked, where only some rows of a long case are


@dataclass(frozen=True)
class Shape:
    """The sizes that ops are timed at: `batch` sequences of `context` tokens in a model with these heads and widths.

    window: tokens that a query sees through a sliding window; None where no layer has a sliding window.
    blocks: number of blocks of 64 keys that a query of block-sparse attention sees.
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
        """A tensor of normal draws, which the seed, the name and the size alone decide."""
        generator = torch.Generator().manual_seed(zlib.crc32(f"{self.seed} {name} {size}".encode()))
        return (scale * torch.randn(*size, generator=generator)).to(self.device, self.dtype)


@dataclass(frozen=True)
class Beside:
    """Another function of the same inputs, timed beside the forms for comparison; its output is not checked.

    An example is dense attention beside block-sparse attention. forward, backward: the least work of its two passes.
    """

    run: Callable[..., Tensor]
    forward: Work
    backward: Work


@dataclass(frozen=True)
class Case:
    """One use of an op at one shape.

    quantity: the op and its use, such as `attention prefill`. tokens: number of new tokens that one call processes.
    context: tokens of each sequence that the call looks at; 1 for an op whose work does not depend on it.
    inputs: the arguments of every form; where there is a `backward`, those of floating dtype get gradients.
    forms: by name, functions of the inputs that return one tensor.
    reference: the formula for inputs in double precision, differentiable. Where the whole output would take too long,
        it gives only the rows that `rows` names.
    forward, backward: the least work of the two passes.
    beside: by name, other functions timed in the same rounds.
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
        """The name of the form that models run by default, with which the others are compared."""
        return "compiled" if "compiled" in self.forms else "torch"

    @property
    def checked(self) -> str:
        """The part of the output that is compared with the reference, in words."""
        return "all" if self.rows is None else f"{len(self.rows)} rows, all of {WHOLE} tokens"


def forms_here(op: Op[Any], shape: Shape) -> list[str]:
    """The names of the forms of an op that run where nobody asks for one, and that take these inputs."""
    asked = (REFERENCE, INVARIANT)
    return [name for name in op.forms_on(shape.device, shape.dtype, shape.head_size) if name not in asked]
