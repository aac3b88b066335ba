"""Benchmark cases of a product of few rows: one token of each sequence, as in decoding, through two linear layers."""

from __future__ import annotations

from functools import partial

from torch import Tensor

from longwave.costs import Work
from longwave.ops.benchmark import Case, Shape, forms_here
from longwave.ops.linear import LINEAR, Run, reference


def cases(shape: Shape) -> list[Case]:
    """A projection of the hidden state, and the head. The work does not depend on the context."""
    return [_product(shape, outputs) for outputs in (shape.hidden_size, shape.vocab_size)]


def _product(shape: Shape, outputs: int) -> Case:
    width = shape.hidden_size
    hidden = shape.normal("hidden", shape.batch, width)
    weight = shape.normal("weight", outputs, width, scale=width**-0.5)
    return Case(
        f"linear {width} to {outputs}",
        1,
        shape.batch,
        (hidden, weight),
        {name: partial(_run, form=LINEAR.forms[name].run) for name in forms_here(LINEAR, shape)},
        partial(_run, form=reference),
        Work(2 * shape.batch * width * outputs, hidden.nbytes + weight.nbytes),
    )


def _run(hidden: Tensor, weight: Tensor, form: Run) -> Tensor:
    return form(hidden, weight, None)
