"""How a form is chosen: preference, reasons, forms that are asked for, and when anything is compiled."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import Result

from longwave.config import ModelConfig
from longwave.errors import UserError
from longwave.layers.mlp import MLPConfig
from longwave.mixers import AttentionConfig, InfllmConfig, WindowConfig
from longwave.model import Decoder
from longwave.ops import compiled, forms_here
from longwave.ops import linear as linear_op
from longwave.ops.attention import ATTENTION
from longwave.ops.block_sparse import BLOCK_SPARSE
from longwave.ops.decay_linear import DECAY_LINEAR
from longwave.ops.forms import REFERENCE, Call, Form, Op
from longwave.recipes import recipe_path
from longwave.streams import Stream

CPU, META = torch.device("cpu"), torch.device("meta")
OPS = [ATTENTION, BLOCK_SPARSE, DECAY_LINEAR]
SPARSE = InfllmConfig(kernel_size=2, kernel_stride=1, block_size=2, window_size=2, topk=2, dense_len=9)


def only_on(device: torch.device) -> Callable[[Call], str | None]:
    return lambda call: None if call.device.type == device.type else f"not on {call.device.type}"


def example() -> Op[Any]:
    """An op of three forms, of which the preferred one knows heads of 64 alone."""
    narrow = Form(min, "narrow heads", lambda call: None if call.head_size == 64 else f"not for {call.head_size}")
    return Op("example", {"narrow": narrow, "torch": Form(max, "any"), REFERENCE: Form(sum, "plain")})


def decoder(layout: str = "F W S L", seed: int = 0) -> Decoder:
    """A model with heads of 32, which compiled kernels know."""
    tables = {"infllm": SPARSE, "window": WindowConfig(5)}
    needs = {name: tables[name] for letter, name in (("S", "infllm"), ("W", "window")) if letter in layout}
    shape = AttentionConfig(heads=2, head_size=32)
    return Decoder(ModelConfig(61, 32, layout, attention=shape, mlp=MLPConfig(40), **needs), seed)


# --- one op -----------------------------------------------------------------------------------------------------------


def test_the_first_form_that_takes_a_call_is_chosen_with_what_speaks_against_those_before():
    assert example().resolve(Call(CPU, torch.float32, 64)) == ("narrow", "narrow heads")
    assert example().resolve(Call(CPU, torch.float32, 32)) == ("torch", "any; narrow: not for 32")


def test_the_reference_runs_only_where_it_is_asked_for():
    op = Op("example", {REFERENCE: Form(sum, "plain"), "torch": Form(max, "any")})
    assert op.resolve(Call(CPU, torch.float32)) == ("torch", "any")
    assert op.resolve(Call(CPU, torch.float32), REFERENCE) == (REFERENCE, "asked for")


def test_a_form_that_is_asked_for_runs_though_another_is_preferred():
    assert example().resolve(Call(CPU, torch.float32, 64), "torch") == ("torch", "asked for")


def test_forms_on_a_device_are_those_that_take_the_call():
    assert example().forms_on(CPU, torch.float32, 64) == ["narrow", "torch", REFERENCE]
    assert example().forms_on(CPU, torch.float32, 32) == ["torch", REFERENCE]


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_a_form_that_does_not_exist_is_refused_with_the_known_ones(op: Op[Any]):
    says = f"{op.name} form = 'flash9': use one of {', '.join(op.forms)}"
    with pytest.raises(UserError, match=f"^{re.escape(says)}$"):
        op.resolve(Call(CPU, torch.float32, 64), "flash9")


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (Call(META, torch.float32, 64), "not on meta"),
        (Call(CPU, torch.float64, 64), "not in float64"),
        (Call(CPU, torch.float32, 40), "not for heads of 40"),
    ],
)
@pytest.mark.parametrize("op", [ATTENTION, BLOCK_SPARSE], ids=lambda op: op.name)
def test_a_form_that_does_not_take_a_call_is_refused_with_the_reason(op: Op[Any], call: Call, reason: str):
    assert op.resolve(call)[0] == "torch"
    assert f"compiled: {reason}" in op.resolve(call)[1]
    with pytest.raises(UserError, match=f"^{op.name} form = 'compiled': {reason}; leave it out, or use torch$"):
        op.resolve(call, "compiled")


# --- a model's ops ----------------------------------------------------------------------------------------------------


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a form of attention for another kind of device, registered while a test runs."""
    monkeypatch.setattr(ATTENTION, "forms", ATTENTION.forms)
    run = lambda *_: pytest.fail("it ran on a device that it does not take")  # noqa: E731
    ATTENTION.register("elsewhere", Form(run, "for meta tensors", only_on(META)))
    return "elsewhere"


def test_a_form_for_one_device_is_chosen_there_and_nowhere_else(elsewhere: str):
    assert ATTENTION.resolve(Call(META, torch.float32, 32)) == (elsewhere, "for meta tensors")
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        name, reason = ATTENTION.resolve(Call(CPU, dtype, 32))
        assert name != elsewhere
        assert f"{elsewhere}: not on cpu" in reason
    assert not any(elsewhere in form.split(" ")[0] for form in forms_here().values())


def test_a_model_resolves_its_forms_where_it_is_placed(elsewhere: str):
    model = decoder("2F")
    model(torch.arange(5), Stream.of([5]))
    assert {part.forms.get("attention") for part in model.parts} <= {"compiled", "torch", None}
    model = model.to("meta")
    assert f"F: attention {elsewhere}" in model.describe()[0]
    assert model.blocks[0].mixer.reasons["attention"] == "for meta tensors"


def test_a_form_for_another_device_is_refused_and_changes_nothing(elsewhere: str):
    model, tokens = decoder("2F"), torch.arange(5)
    before = model(tokens, Stream.of([5]))
    with pytest.raises(UserError, match=f"attention form = '{elsewhere}': not on cpu; leave it out, or use torch"):
        model.use_form(elsewhere)
    assert torch.equal(model(tokens, Stream.of([5])), before)


def test_a_form_is_asked_for_of_one_op_of_all_or_of_none_any_more():
    model = decoder()
    chosen = [dict(part.forms) for part in model.parts if model.describe()]
    model.use_form(REFERENCE, op="attention")
    for part, forms in zip(model.parts, chosen, strict=True):
        assert part.forms == forms | ({"attention": REFERENCE} if "attention" in forms else {})
    model.use_form(REFERENCE)
    assert {form for part in model.parts for form in part.forms.values()} == {REFERENCE}
    model.use_form(None)
    assert [part.forms for part in model.parts] == chosen


def test_a_form_for_the_time_of_a_block_leaves_what_was_asked_for_before():
    model = decoder()
    model.use_form("torch", op="attention")
    before = [dict(part.forms) for part in model.parts]
    with model.using_form(REFERENCE):
        assert {form for part in model.parts for form in part.forms.values()} == {REFERENCE}
    with pytest.raises(UserError), model.using_form(REFERENCE):
        model(torch.tensor([61]), Stream.of([1]))
    assert [part.forms for part in model.parts] == before
    assert "attention torch" in model.describe()[0]


def test_a_form_that_no_op_of_the_model_has_is_refused():
    with pytest.raises(UserError, match=r"^form = 'flash9': use one of compiled, invariant, reference, torch$"):
        decoder().use_form("flash9")


# --- when anything is compiled ----------------------------------------------------------------------------------------


@pytest.fixture
def no_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """Every start of a process and every wish for the kernels fails the test; gives an empty compiler cache."""

    def fails(*given: Any, **named: Any) -> None:
        pytest.fail(f"started {given or named}")

    cached = (compiled.why_not, linear_op._form_of)
    for function in cached:
        function.cache_clear()
    for module, name in ((subprocess, "run"), (subprocess, "Popen"), (compiled, "library")):
        monkeypatch.setattr(module, name, fails)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    yield tmp_path
    assert list(tmp_path.iterdir()) == []
    for function in cached:
        function.cache_clear()


def test_a_model_without_memory_starts_no_compiler(no_process: Path):
    with torch.device("meta"):
        model = decoder()
    assert "attention torch" in model.describe()[0]
    assert model.costs(1000)
    assert model.state(1).used_bytes() == 0


def test_a_model_that_is_only_built_starts_no_compiler(no_process: Path):
    assert decoder().prefill_flops(100) > 0


def test_a_model_in_fp64_starts_no_compiler(no_process: Path):
    model = decoder().double()
    assert model(torch.arange(5), Stream.of([5])).shape == (5, 61)


@pytest.mark.parametrize("name", ["quickstart-subllm", "sala-9b"])
def test_a_plan_starts_no_compiler(no_process: Path, longwave: Callable[..., Result], name: str):
    result = longwave("plan", recipe_path(name), "--context", "4096,1M")
    assert result.code == 0, result.err
    assert "total" in result.out


def test_the_fixture_would_notice(no_process: Path):
    with pytest.raises(pytest.fail.Exception, match="started"):
        decoder()(torch.arange(5), Stream.of([5]))
