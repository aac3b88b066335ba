"""Checks of outputs before anything is timed: a model, or a form of an op, that is wrong gets no figure.

Legend: `V` vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from longwave.errors import MachineError
from longwave.model import Decoder
from longwave.ops.benchmark import Case
from longwave.streams import Stream

_FP32_DIFFERENCE, _LOW_PRECISION_COSINE = 1e-3, 0.999
_LOSS_DIFFERENCE = {"fp32": 1e-3, "bf16": 1e-2}
_OP_ERROR = {torch.float32: 1e-4, torch.bfloat16: 5e-2}
_PROMPT, _ROWS = 256, 8  # tokens of a model that run in the plain form too, and rows of logits compared


@torch.no_grad()
def one_pass(model: Decoder, tokens: Int64[Tensor, " N"], last: int) -> Float[Tensor, "{last} V"]:
    """The logits of the last tokens, from one pass over all tokens without a state: the right ones."""
    rows = torch.arange(len(tokens) - last, len(tokens), device=tokens.device)
    return model.eval()(tokens, replace(Stream.of([len(tokens)], device=tokens.device), outputs=rows))


def check_logits(name: str, found: Float[Tensor, "*rows V"], expected: Float[Tensor, "*rows V"]) -> None:
    """MachineError unless logits agree with the expected ones as well as their precision allows.

    fp32: within 1e-3 of the largest logit. Otherwise by a cosine above 0.999 in at least half of the rows, since
    rounding can decide whether a token at a threshold is kept.
    """
    exact, found, expected = found.dtype == torch.float32, found.float(), expected.float()
    if not found.isfinite().all():
        raise MachineError(f"{name}: its logits are not finite, so it is not timed")
    difference = float((found - expected).abs().max() / expected.abs().max())
    cosine = float(torch.cosine_similarity(found, expected, dim=-1).median())
    if exact and difference > _FP32_DIFFERENCE:
        raise MachineError(f"{name}: its logits are off by {difference:.1e} of the largest, so it is not timed")
    if cosine <= _LOW_PRECISION_COSINE:
        raise MachineError(f"{name}: its logits have a cosine of {cosine:.5f} with the right ones, so it is not timed")


def check_loss(name: str, found: float, expected: float, precision: str) -> None:
    """MachineError unless a loss agrees with the expected one, of the same tokens and weights."""
    if not math.isfinite(found) or abs(found - expected) > _LOSS_DIFFERENCE[precision] * abs(expected):
        raise MachineError(f"{name}: its loss is {found:.6f} where {expected:.6f} is right, so it is not timed")


def check_forms(model: Decoder, tokens: Int64[Tensor, " N"]) -> None:
    """MachineError unless the model gives the same logits when attention runs in its plain reference form.

    Only the first 256 tokens are compared, because the reference form is slow.
    """
    prompt = tokens[:_PROMPT]
    found = one_pass(model, prompt, min(_ROWS, len(prompt)))
    forms = sorted({f"{op} {form}" for part in model.parts for op, form in part.forms.items()})
    with model.using_form("reference"):
        expected = one_pass(model, prompt, min(_ROWS, len(prompt)))
    check_logits(f"the forms {', '.join(forms)}", found, expected)


def check_form(case: Case, name: str) -> float:
    """The largest error of any row of the output and gradients of a form of an op, against the op's reference.

    A row's error is the norm of its difference, relative to the norm of the row, or of a typical row if that is larger.
    Where the reference gives only some rows of the output, the gradients are those of these rows. MachineError for an
    error above what rounding explains: 1e-4 in fp32, 5e-2 in bf16.
    """
    found, expected = _outcome(case, case.forms[name]), _outcome(case, None)
    errors = {part: _error(found[part], expected[part]) for part in expected}
    dtype = next(one.dtype for one in case.inputs if one.is_floating_point())
    worst = max(errors, key=lambda part: errors[part])
    if not errors[worst] <= _OP_ERROR[dtype]:
        where = f"{case.quantity}, form {name}"
        raise MachineError(f"{where}: its {worst} is off by {errors[worst]:.1e}, so it is not timed")
    return errors[worst]


def _outcome(case: Case, form: Callable[..., Tensor] | None) -> dict[str, Tensor]:
    """The output of a form (None: of the reference), and the inputs' gradients for the same gradient of the output."""
    dtype = next(one.dtype for one in case.inputs if one.is_floating_point())
    precision = torch.float64 if form is None else dtype
    inputs = [one.detach().to(precision) if one.is_floating_point() else one for one in case.inputs]
    learned = [one.requires_grad_() for one in inputs if one.is_floating_point() and case.backward]
    with torch.set_grad_enabled(case.backward is not None):
        output = (form or case.reference)(*inputs)
    if form is not None and case.rows is not None:
        output = output[case.rows]
    if not learned:
        return {"output": output}
    slopes = torch.randn(output.shape, generator=torch.Generator().manual_seed(0)).to(output.device, dtype).to(output)
    gradients = torch.autograd.grad(output, learned, slopes)
    names = [f"gradient of input {index + 1}" for index in range(len(learned))]
    return {"output": output.detach(), **dict(zip(names, gradients, strict=True))}


def _error(found: Tensor, expected: Tensor) -> float:
    rows = (found.double() - expected).reshape(-1, expected.shape[-1] if expected.ndim else 1)
    right = expected.reshape(rows.shape).norm(dim=1)
    typical = right[right > 0].square().mean().sqrt()
    return float((rows.norm(dim=1) / right.clamp(min=typical)).nan_to_num(nan=torch.inf).max())
