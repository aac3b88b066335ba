"""The contract of ops: every form of every op, taken from the ops' own tables, against the op's reference.

Outputs, what is remembered and gradients are compared in every type, over runs of odd lengths, single tokens and empty
runs, alone and after a past. A form that is registered later is tested by itself; a new op needs a line in `EXAMPLES`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from importlib import import_module
from pkgutil import iter_modules
from typing import Any

import pytest
import torch
from op_inputs import in_pages, of_runs, of_stream
from sparse import TINY, all_compressed
from torch import Tensor

import longwave.ops
from longwave.ops.attention import Attended, Pattern, attention
from longwave.ops.attention.sdpa import attention as sdpa
from longwave.ops.block_sparse import Compressed, block_sparse_attention
from longwave.ops.decay_linear import decay_linear_attention
from longwave.ops.forms import REFERENCE, Form, Op
from longwave.ops.linear import pack
from longwave.streams import Places, Runs

HEADS, GROUPS, SIZE, SCALE = 4, 2, 32, 0.2
STREAMS = [(1,), (67,), (5, 0, 33, 1), (1, 1, 1), (0,), (0, 0)]
PASTS = (61, 3, 40, 70)
ERROR = {torch.float64: 1e-11, torch.float32: 2e-5, torch.bfloat16: 3e-2}  # of the largest entry, or of one
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def _ops() -> Iterator[Op[Any]]:
    """The ops of the package: every `Op` that a folder of `longwave.ops` names."""
    for found in iter_modules(longwave.ops.__path__, "longwave.ops."):
        if found.ispkg:
            yield from (value for value in vars(import_module(found.name)).values() if isinstance(value, Op))


OPS: dict[str, Op[Any]] = {op.name: op for op in _ops()}


@dataclass(frozen=True)
class Setting:
    """What an example is made for. pasts: tokens that were there before those of each run, or None without a past.

    paged: whether keys lie in pages.
    """

    lengths: tuple[int, ...]
    pasts: tuple[int, ...] | None
    dtype: torch.dtype
    device: str
    paged: bool = False

    @property
    def tokens(self) -> int:
        return sum(self.lengths)

    def normal(self, seed: int, *shape: int, wide: bool = False) -> Tensor:
        """Normal draws in the setting's type, or in fp32 where that is wider and `wide` is set."""
        drawn = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        return drawn.to(self.device, torch.promote_types(self.dtype, torch.float32) if wide else self.dtype)


@dataclass(frozen=True)
class Example:
    """A call of an op. run: from the name of a form and the inputs to everything that the op gives.

    fixed: places of the inputs that get no gradient.
    """

    inputs: tuple[Tensor, ...]
    run: Callable[..., tuple[Tensor, ...]]
    fixed: tuple[int, ...] = ()


def _keys(setting: Setting) -> tuple[list[Tensor], list[Tensor]]:
    """Keys and values (G, n, K) of every run, its past included."""
    totals = [sum(run) for run in zip(setting.lengths, setting.pasts or [0] * len(setting.lengths), strict=True)]
    keys, values = ([setting.normal(seed + n, GROUPS, n, SIZE) for n in totals] for seed in (100, 200))
    return keys, values


def _laid(setting: Setting, keys: list[Tensor], values: list[Tensor]) -> tuple[Tensor, Tensor, Runs, Places | None]:
    if setting.pasts is not None:
        return (in_pages if setting.paged else of_runs)(keys, values, setting.lengths)
    return of_stream(*(torch.cat(side, dim=1).transpose(0, 1) for side in (keys, values)), setting.lengths)


def _attention(window: int | None) -> Callable[[Setting], Example]:
    def make(setting: Setting) -> Example:
        key, value, runs, places = _laid(setting, *_keys(setting))

        def run(form: str, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
            options = {"pattern": Pattern(window), "scale": SCALE, "want": ("lse", "column_sums"), "form": form}
            return tuple(attention(query, key, value, runs, places, **options))

        return Example((setting.normal(1, setting.tokens, HEADS, SIZE), key, value), run)

    return make


def _block_sparse(setting: Setting) -> Example:
    keys, values = _keys(setting)
    key, value, runs, places = _laid(setting, keys, values)
    own = all_compressed(keys, TINY)

    def run(form: str, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        rounded = Compressed(own.fine.to(query), own.fine_places, own.coarse.to(query), own.coarse_places)
        options = {"scale": SCALE, "compressed": rounded, "form": form}
        return (block_sparse_attention(query, key, value, runs, places, TINY, **options),)

    return Example((setting.normal(1, setting.tokens, HEADS, SIZE), key, value), run)


def _decay_linear(per_token: bool) -> Callable[[Setting], Example]:
    def make(setting: Setting) -> Example:
        shape, runs = (setting.tokens, HEADS, SIZE), Runs.of(setting.lengths, setting.device)
        inputs = [*(setting.normal(seed, *shape) for seed in (1, 2, 3))]
        inputs.append(-setting.normal(4, setting.tokens if per_token else 1, HEADS, wide=True).abs())
        if setting.pasts is not None:
            inputs.append(setting.normal(5, len(setting.lengths), HEADS, SIZE, SIZE, wide=True))

        def run(form: str, *inputs: Tensor) -> tuple[Tensor, ...]:
            states = inputs[4] if len(inputs) > 4 else None
            return decay_linear_attention(*inputs[:4], runs, scale=SCALE, states=states, form=form)

        return Example(tuple(inputs), run)

    return make


def _linear(bias: bool) -> Callable[[Setting], Example]:
    def make(setting: Setting) -> Example:
        hidden, weight, shift = setting.normal(1, setting.tokens, 64), setting.normal(2, 6, 64), setting.normal(3, 6)

        def run(form: str, hidden: Tensor, weight: Tensor, shift: Tensor) -> tuple[Tensor, ...]:
            return (OPS["linear"].forms[form].run(hidden, weight, shift if bias else None),)

        return Example((hidden, weight, shift), run, (0, 1, 2))  # where gradients are asked, products are torch's own

    return make


def _linear_int8(bias: bool) -> Callable[[Setting], Example]:
    def make(setting: Setting) -> Example:
        hidden, shift = setting.normal(1, setting.tokens, 64), setting.normal(3, 6)
        packed = pack(setting.normal(2, 6, 64))

        def run(form: str, hidden: Tensor, shift: Tensor) -> tuple[Tensor, ...]:
            return (OPS["linear_int8"].forms[form].run(hidden, *packed, shift if bias else None),)

        return Example((hidden, shift), run, (0, 1))  # at inference only

    return make


def _gated(act: str, has_value: bool) -> Callable[[Setting], Example]:
    def make(setting: Setting) -> Example:
        gate, value = (setting.normal(seed, setting.tokens, HEADS * 3) * 5 for seed in (1, 2))

        def run(form: str, gate: Tensor, value: Tensor) -> tuple[Tensor, ...]:
            return (OPS["gated"].forms[form].run(gate, value if has_value else None, act),)

        return Example((gate, value), run, () if has_value else (1,))

    return make


def _cross_entropy(setting: Setting) -> Example:
    targets = torch.arange(setting.tokens, device=setting.device) * 5 % 17
    targets[::3] = -100

    def run(form: str, hidden: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        return (OPS["cross_entropy"].forms[form].run(hidden, weight, targets, 0.7),)

    return Example((setting.normal(1, setting.tokens, 24), setting.normal(2, 17, 24)), run)


EXAMPLES: dict[str, dict[str, Callable[[Setting], Example]]] = {
    "attention": {"causal": _attention(None), "window": _attention(7)},
    "block_sparse": {"blocks": _block_sparse},
    "decay_linear": {"by head": _decay_linear(False), "by token": _decay_linear(True)},
    "gated": {"silu": _gated("silu", True), "sigmoid": _gated("sigmoid", True), "no value": _gated("silu", False)},
    "linear_int8": {"bias": _linear_int8(True), "no bias": _linear_int8(False)},
    "linear": {"bias": _linear(True), "no bias": _linear(False)},
    "cross_entropy": {"some count": _cross_entropy},
}


def results(example: Example, form: str, grad: bool, exact: bool = False) -> list[Tensor]:
    """What an op gives in a form and, with `grad`, the gradients of its inputs; exact: from inputs in fp64."""
    inputs = [one.detach().double() if exact else one.detach() for one in example.inputs]
    learned = [one for place, one in enumerate(inputs) if grad and place not in example.fixed]
    for one in learned:
        one.requires_grad_()
    with torch.set_grad_enabled(grad):
        outputs = list(example.run(form, *inputs))
    ends = [one for one in outputs if one.requires_grad]
    if not ends:
        return outputs
    slopes = [torch.randn(one.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64) for one in ends]
    slopes = [slope.to(one) for slope, one in zip(slopes, ends, strict=True)]
    found = torch.autograd.grad(ends, learned, slopes, allow_unused=True)
    return outputs + [torch.zeros_like(one) if got is None else got for one, got in zip(learned, found, strict=True)]


def hold_to_the_reference(example: Example, form: str, dtype: torch.dtype) -> None:
    """AssertionError where a form is not what the reference is, without gradients or with them."""
    for grad in (False, True):
        found, right = results(example, form, grad), results(example, REFERENCE, grad, exact=True)
        for one, other in zip(found, right, strict=True):
            assert one.shape == other.shape
            if one.numel():
                error = (one.double() - other).abs().max()
                assert error <= ERROR[dtype] * other.abs().max().clamp(min=1)


def _calls() -> Iterator[tuple[str, str, str, torch.dtype]]:
    """Every op, form, device and type that go together."""
    for op in OPS.values():
        for device in DEVICES:
            for dtype in ERROR:
                forms = op.forms_on(torch.device(device), dtype, SIZE)
                yield from ((op.name, form, device, dtype) for form in forms if form != REFERENCE)


def test_every_op_has_an_example():
    assert OPS.keys() == EXAMPLES.keys()


@pytest.mark.parametrize(("op", "form", "device", "dtype"), list(_calls()), ids=str)
@pytest.mark.parametrize("remembers", [False, True], ids=["alone", "after a past"])
def test_a_form_is_what_the_reference_is(op: str, form: str, device: str, dtype: torch.dtype, remembers: bool):
    for lengths in STREAMS:
        pasts = PASTS[: len(lengths)] if remembers else None
        for make in EXAMPLES[op].values():
            hold_to_the_reference(make(Setting(lengths, pasts, dtype, device)), form, dtype)


IN_PAGES = [call for call in _calls() if call[0] in ("attention", "block_sparse") and call[2] == "cpu"]


@pytest.mark.parametrize(("op", "form", "device", "dtype"), IN_PAGES, ids=str)
def test_keys_in_pages_give_what_keys_side_by_side_do(op: str, form: str, device: str, dtype: torch.dtype):
    """To the bit, at inference on a CPU."""
    if ("attention" not in op and "sparse" not in op) or device != "cpu":
        return
    for lengths in [*STREAMS, (2, 16, 17, 1), (9, 1, 40)]:
        for make in EXAMPLES[op].values():
            setting = Setting(lengths, (*PASTS, 20)[: len(lengths)], dtype, device)
            laid, paged = (make(replace(setting, paged=pages)) for pages in (False, True))
            for one, other in zip(results(laid, form, False)[:2], results(paged, form, False)[:2], strict=True):
                assert torch.equal(one, other)
            hold_to_the_reference(paged, form, dtype)


@pytest.mark.parametrize("op", OPS)
def test_a_form_keeps_the_type_and_the_device_of_its_inputs(op: str):
    for form in OPS[op].forms_on(torch.device("cpu"), torch.bfloat16, SIZE):
        for make in EXAMPLES[op].values():
            example = make(Setting((5, 0, 33, 1), PASTS, torch.bfloat16, "cpu"))
            output = results(example, form, grad=False)[0]
            assert output.device.type == "cpu"
            assert output.dtype == torch.bfloat16 or not output.ndim  # a sum of losses is wider


def test_a_form_that_is_wrong_is_noticed(monkeypatch: pytest.MonkeyPatch):
    def blind(query: Tensor, key: Tensor, *rest: Any) -> Attended:
        return sdpa(query, key.roll(1, 1), *rest)

    def frozen(query: Tensor, key: Tensor, *rest: Any) -> Attended:
        return sdpa(query, key.detach() + 0 * key, *rest)

    example = EXAMPLES["attention"]["causal"](Setting((5, 0, 33, 1), None, torch.float32, "cpu"))
    for run in (blind, frozen):
        monkeypatch.setitem(OPS["attention"].forms, "wrong", Form(run, "wrong"))
        assert "wrong" in [form for op, form, *_ in _calls() if op == "attention"]
        with pytest.raises(AssertionError):
            hold_to_the_reference(example, "wrong", torch.float32)
