"""Weights in int8: the nearest ones, in the layers that they are for, and refused where they are not."""

from pathlib import Path

import pytest
import torch

import longwave as lw
from longwave.config import ModelConfig, build
from longwave.errors import UserError
from longwave.layers.linear import Linear
from longwave.model import Decoder
from longwave.ops.linear import LINEAR_INT8, linear_int8, pack
from longwave.streams import Stream

SHAPE = {"vocab_size": 96, "hidden_size": 64, "context_window": 128, "attention": {"heads": 2}, "mlp": {"size": 96}}
LAYOUTS = {
    "F": {"layout": "2F"},
    "S and L": {"layout": "S L", "infllm": {"output_gate": True}, "lightning": {"output_gate": True}},
    "subllm": {"layout": "F subllm(0.5: F) F", "subllm": {"selection": "causal"}},
}


def model_of(kind: str, dtype: torch.dtype = torch.bfloat16) -> Decoder:
    return Decoder(build(ModelConfig, SHAPE | LAYOUTS[kind], "tests"), seed=1).to(dtype).eval()


def logits(model: Decoder) -> torch.Tensor:
    tokens = torch.arange(40) * 7 % 96
    with torch.no_grad():
        return model(tokens, Stream.of([40])).double()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_a_rounded_weight_is_the_nearest(dtype: torch.dtype):
    weight = torch.randn(9, 40, generator=torch.Generator().manual_seed(0)).to(dtype)
    weight[3] = 0
    weight[4] *= 1e-6
    packed = pack(weight)
    found = packed.weight.double() * packed.scale.double().unsqueeze(-1)
    largest = weight.abs().amax(-1, keepdim=True).double()
    step = packed.scale.double().unsqueeze(-1)
    assert ((found - weight.double()).abs() <= step / 2 + largest * 2.0**-8).all()
    assert packed.weight.abs().amax(-1).tolist() == [127, 127, 127, 0, *[127] * 5]
    assert torch.equal(packed.scale.to(dtype).float(), packed.scale)


@pytest.mark.parametrize("rows", [0, 1, 5, 8, 9, 40])
def test_every_number_of_rows_has_the_product(rows: int):
    generator = torch.Generator().manual_seed(rows)
    hidden = torch.randn(rows, 64, generator=generator).bfloat16()
    packed, shift = pack(torch.randn(10, 64, generator=generator).bfloat16()), torch.randn(10).bfloat16()
    right = LINEAR_INT8.forms["reference"].run(hidden.double(), *packed, shift.double())
    torch.testing.assert_close(linear_int8(hidden, *packed, shift).double(), right, rtol=0.02, atol=0.1)


@pytest.mark.parametrize("kind", LAYOUTS)
def test_a_packed_model_is_nearly_the_model(kind: str):
    """Its weights are the rounded ones: to the product's rounding it is a model that holds them, and near the first."""
    model, packed, rounded = model_of(kind, torch.float32), model_of(kind, torch.float32).pack(), model_of(kind)
    rounded = rounded.float()
    rounded.load_state_dict(model.state_dict())
    for theirs, ours in zip(rounded.modules(), packed.modules(), strict=True):
        if isinstance(ours, Linear) and ours.scale is not None:
            theirs.weight.data = ours.weight.float() * ours.scale.unsqueeze(-1)
    torch.testing.assert_close(logits(packed), logits(rounded), rtol=1e-4, atol=1e-4)
    far = (logits(packed) - logits(model)).abs().max()
    assert 0 < far < 0.05 * logits(model).abs().max()


@pytest.mark.parametrize("kind", LAYOUTS)
def test_gates_norms_routers_and_the_head_stay_as_they_are(kind: str):
    before, packed = model_of(kind).state_dict(), model_of(kind).pack()
    rounded = {name for name, weight in packed.state_dict().items() if weight.dtype == torch.int8}
    kinds = {name.split(".")[-2] for name in rounded}
    assert kinds == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert all(torch.equal(weight, before[name]) for name, weight in packed.state_dict().items() if name not in rounded)


def test_a_packed_model_is_loaded_and_described_and_not_saved(tmp_path: Path):
    lw.save(model_of("S and L"), tmp_path / "model")
    packed = lw.load(tmp_path / "model", dtype="int8")
    assert packed.is_packed
    assert packed.pack() is packed  # a second time changes nothing
    assert "bfloat16 with products of int8" in packed.describe()[0]
    assert torch.equal(logits(packed), logits(model_of("S and L").pack()))
    with pytest.raises(UserError, match="int8"):
        lw.save(packed, tmp_path / "again")
    assert not (tmp_path / "again").exists()


@pytest.mark.parametrize("form", ["invariant", "torch", "reference"])
def test_a_form_that_is_asked_for_runs_the_packed_products(form: str):
    model = model_of("F", torch.float32).pack()
    right = logits(model)
    model.use_form(form)
    assert {module.form for module in model.modules() if isinstance(module, Linear)} == {form}
    torch.testing.assert_close(logits(model), right, rtol=1e-3, atol=1e-3)
