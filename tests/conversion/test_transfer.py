"""Weights that move into another model: exactly the teacher where nothing is converted, and named where they cannot."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from longwave.config import ModelConfig, build
from longwave.conversion.transfer import assembled, repeated, transferred, transfers
from longwave.errors import UserError
from longwave.model import Decoder
from longwave.streams import Stream

TEACHER: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 32,
    "layout": "4F",
    "context_window": 64,
    "attention": {"heads": 4, "kv_heads": 2, "qk_norm": True},
    "mlp": {"size": 48},
}
FULL = {"regime": "dense", "rotary": True, "output_gate": False}
TOKENS = torch.randint(61, (40,), generator=torch.Generator().manual_seed(1))


def config(**changes: Any) -> ModelConfig:
    return build(ModelConfig, {**TEACHER, **changes}, "model")


def teacher(dtype: torch.dtype = torch.float32, **changes: Any) -> Decoder:
    return Decoder(config(**changes), seed=3).to(dtype).eval()


def logits(model: Decoder) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(TOKENS, Stream.of((25, 15)))


SHAPES = {
    "llama": {"attention": {"heads": 4}},
    "grouped": {"attention": {"heads": 4, "kv_heads": 2}},
    "qwen2": {"attention": {"heads": 4, "kv_heads": 2, "qkv_bias": True}},
    "qwen3": {},
    "tied": {"tie_embeddings": True},
    "window": {"layout": "2F 2W", "window": {"size": 8}},
    "scaled": {"scales": {"embedding": 12.0, "residual": 0.25, "logits": 0.0625}},
    "subllm": {"layout": "F subllm(0.64: 2F) F"},
    "hybrid": {"layout": "S 2L S"},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_nothing_converted_is_the_teacher_bit_for_bit(shape: str, dtype: torch.dtype) -> None:
    """Acceptance check 35 of conversion."""
    source = teacher(dtype, **SHAPES[shape])
    student = transferred(source, source.config)
    assert torch.equal(logits(student), logits(source))
    assert {one.how for one in transfers(source.config, source.config)} == {"copied"}
    held = {tensor.untyped_storage().data_ptr() for tensor in source.state_dict().values()}
    assert held.isdisjoint(tensor.untyped_storage().data_ptr() for tensor in student.state_dict().values())


def test_softmax_that_can_be_sparse_begins_as_the_teacher() -> None:
    """An S block that attends to all, rotated and without a gate, is the F block it came from."""
    source = teacher(attention={"heads": 4, "kv_heads": 2})
    student = transferred(source, config(layout="4S", attention={"heads": 4, "kv_heads": 2}, infllm=FULL))
    torch.testing.assert_close(logits(student), logits(source), rtol=0, atol=1e-6)


@pytest.mark.parametrize("bias", [False, True])
def test_grouped_heads_are_repeated_without_a_change(bias: bool) -> None:
    """Acceptance check 36, in fp64: a softmax layer with a KV head for every query head gives what it gave."""
    shape = {"heads": 4, "kv_heads": 1, "qk_norm": True, "qkv_bias": bias}
    source = teacher(torch.float64, attention=shape)
    student = transferred(source, config(attention={**shape, "kv_heads": 4}))
    torch.testing.assert_close(logits(student), logits(source), rtol=0, atol=1e-12)
    plan = transfers(source.config, student.config)
    assert {one.name.split(".", 3)[3] for one in plan if one.how == "repeated"} == (
        {"k_proj.weight", "v_proj.weight"} | ({"k_proj.bias", "v_proj.bias"} if bias else set())
    )
    assert {one.copies for one in plan if one.how == "repeated"} == {4}


def test_a_head_takes_the_group_it_had() -> None:
    rows = torch.arange(6.0).repeat_interleave(2)[:, None]  # three heads of four channels: 0 0 1 1 / 2 2 3 3 / 4 4 5 5
    assert repeated(rows, 2, 4)[:, 0].tolist() == [0, 0, 1, 1] * 2 + [2, 2, 3, 3] * 2 + [4, 4, 5, 5] * 2
    assert repeated(rows, 1, 4) is rows


def test_a_hybrid_gets_the_teacher_and_says_what_is_new() -> None:
    source = teacher()
    student = transferred(source, config(layout="S 2L S", infllm=FULL))
    plan = {one.name: one for one in transfers(source.config, student.config)}
    linear, full = ({n.split(".", 3)[3] for n in plan if n.startswith(f"blocks.{i}.mixer.")} for i in (1, 0))
    assert {name for name in linear if plan[f"blocks.1.mixer.{name}"].how == "new"} == {
        "z_proj.weight",
        "o_norm.weight",
    }
    assert plan["blocks.1.mixer.k_proj.weight"].how == "repeated"
    assert plan["blocks.1.mixer.q_norm.weight"].how == "copied"
    assert full >= {"q_proj.weight", "o_proj.weight"}
    theirs, ours = source.blocks[1].mixer, student.blocks[1].mixer
    assert torch.equal(ours.q_proj.weight, theirs.q_proj.weight)
    assert torch.equal(ours.k_proj.weight[8:16], theirs.k_proj.weight[:8])
    assert torch.equal(ours.o_norm.weight, torch.ones(32))
    assert torch.isfinite(logits(student)).all()


def test_biases_that_linear_attention_has_not_are_named() -> None:
    source = teacher(attention={"heads": 4, "qkv_bias": True})
    plan = transfers(source.config, config(layout="F 2L F", attention={"heads": 4, "qkv_bias": True}))
    left = [one.name for one in plan if one.how == "left out"]
    assert left == [f"blocks.{i}.mixer.{name}_proj.bias" for i in (1, 2) for name in "qkv"]


def test_levels_around_blocks_change_no_block() -> None:
    """Blocks are matched by their numbers, whatever stands around them; at retention 1 nothing is dropped."""
    source = teacher()
    student = transferred(source, config(layout="F subllm(0.5: 2F) F"))
    assert [one.name for one in transfers(source.config, student.config) if one.how == "new"] == [
        name for name in student_names(student) if name.startswith("resamplers.")
    ]
    for ours, theirs in zip(student.blocks, source.blocks, strict=True):
        assert all(map(torch.equal, ours.state_dict().values(), theirs.state_dict().values()))


def student_names(model: Decoder) -> list[str]:
    return [one.name for one in transfers(model.config, model.config)]


def test_a_student_is_assembled_from_its_teacher_and_what_was_aligned() -> None:
    source = teacher()
    aligned = transferred(source, config(layout="4L"), seed=5)
    with torch.no_grad():
        for weight in aligned.parameters():
            weight.add_(1)
    student = assembled(source, aligned, config(layout="S 2L F", infllm=FULL))
    for depth, block in enumerate(student.blocks):
        origin = aligned if depth in (1, 2) else source
        theirs = origin.blocks[depth].mixer.state_dict()
        assert all(torch.equal(one, theirs[name]) for name, one in block.mixer.state_dict().items())
        assert torch.equal(block.mlp.up_proj.weight, source.blocks[depth].mlp.up_proj.weight)
    assert torch.equal(student.embed.weight, source.embed.weight)
    with pytest.raises(UserError, match=r"blocks\.3: was not aligned, or with other sizes; align the layers that 4L"):
        assembled(source, transferred(source, config(layout="3L F")), config(layout="4L"))
    ungated = transferred(source, config(layout="4L", lightning={"output_gate": False}))
    with pytest.raises(UserError, match=r"blocks\.0: was not aligned"):
        assembled(source, ungated, config(layout="4L"))


def test_new_weights_follow_the_seed() -> None:
    source, target = teacher(), config(layout="S 2L S", infllm=FULL)
    one, same, other = (transferred(source, target, seed).blocks[1].mixer.z_proj.weight for seed in (0, 0, 1))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layout": "5F"}, "model.layout = 5F: 5 blocks; the source has 4"),
        ({"hidden_size": 64}, r"shape \[61, 64\]; the source's is \[61, 32\]"),
        ({"vocab_size": 62}, r"embed.weight: shape \[62, 32\]; the source's is \[61, 32\]"),
        ({"mlp": {"size": 96}}, "mlp"),
        ({"attention": {"heads": 4, "kv_heads": 1, "qk_norm": True}}, "k_proj.weight"),
        ({"attention": {"heads": 2, "kv_heads": 2, "qk_norm": True}}, "norm.weight|k_proj.weight"),
    ],
)
def test_models_that_do_not_belong_together_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        transferred(teacher(), config(**changes))


def test_the_plan_is_made_without_weights() -> None:
    """A 9B model's plan takes no memory, so that `--dry-run` can print it."""
    wide = dataclasses.replace(config(), hidden_size=4096)
    assert len(transfers(wide, wide)) == len(student_names(teacher()))
