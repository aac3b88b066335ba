"""The start of levels in a model with the residual stream of a pretrained one: its loss is nearly its teacher's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from longwave.config import ModelConfig, build
from longwave.conversion.insertion import Insertion, insert_levels
from longwave.conversion.transfer import transferred
from longwave.data.packed import Batch
from longwave.errors import UserError
from longwave.model import Decoder
from longwave.resamplers import Kept, Selection

NESTED = "F subllm(0.64: F subllm(0.64: F) F) F"
LAYOUTS = {"one": "F subllm(0.64: 3F) F", "nested": NESTED, "in a row": "F subllm(0.5: F) F subllm(0.8: F) F"}
STARTS: dict[str, dict[str, Any]] = {
    "at once": {},
    "from 0.9": {"retention_start": 0.9, "retention_steps": 50},
    "from all": {"retention_start": 1.0, "retention_steps": 50},
}
SELECTIONS = ("published", "causal")


def teacher(dtype: torch.dtype = torch.float32) -> Decoder:
    """A Llama whose stream has two channels that are larger than the others by far, and always of one sign."""
    shape = {"vocab_size": 61, "hidden_size": 32, "layout": "5F", "context_window": 256}
    values = {**shape, "attention": {"heads": 4, "kv_heads": 2}, "mlp": {"size": 48}}
    model = Decoder(build(ModelConfig, values, "model"), seed=3)
    with torch.no_grad():
        for part in model.parts:
            for weight in part.parameters():
                weight.mul_(5 if weight.dim() == 2 else 1)
        model.embed.weight[:, 3] = 40 + 4 * torch.rand(61, generator=torch.Generator().manual_seed(0))
        model.embed.weight[:, 17] = -25
        model.head.weight.mul_(40)
        model.head.weight[:, [3, 17]] = 0
    return model.to(dtype).eval()


def batches(count: int = 2, size: int = 120) -> list[Batch]:
    """Windows of two documents each."""
    draw, made = torch.Generator().manual_seed(1), list[Batch]()
    for number in range(count):
        tokens = torch.randint(61, (4 * size,), generator=draw)
        runs, samples = (50, size - 50) * 4, tuple(range(4 * number, 4 * number + 4))
        made.append(Batch(tokens, tokens.roll(-1), runs, (size,) * 4, samples, tuple(range(8))))
    return made


def student(source: Decoder, layout: str, **subllm: Any) -> Decoder:
    config = build(ModelConfig, {**source.config.to_dict(), "layout": layout, "subllm": subllm}, "model")
    model = transferred(source, config)
    model.set_step(0)
    return model.eval()


def settings(selection: str, ramp: float = 0.15) -> dict[str, Any]:
    return {"selection": selection, **({"threshold_ramp": ramp} if selection == "causal" else {})}


@torch.no_grad()
def outcome(model: Decoder, source: Decoder) -> tuple[float, tuple[float, ...]]:
    """How far a model's distributions are from its teacher's, in nats a token, and what its levels kept."""
    kept, total, count = Kept.of(model.resamplers), 0.0, 0
    for batch in batches():
        tokens, _, stream = batch.inputs("cpu")
        with model.watching(kept):
            ours = model(tokens, stream).double().log_softmax(1)
        theirs = source(tokens, stream).double().log_softmax(1)
        total, count = total + float((theirs.exp() * (theirs - ours)).sum()), count + len(ours)
    return total / count, kept.shares


@pytest.mark.parametrize("selection", SELECTIONS)
@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_inference_keeps_the_first_share_and_is_near_its_teacher(layout: str, start: str, selection: str):
    """In both modes. A new model's levels are the control: they keep all tokens or none, and take half of the body."""
    source = teacher()
    model = student(source, LAYOUTS[layout], **settings(selection), **STARTS[start])
    control, _ = outcome(model, source)
    found = insert_levels(model, batches())
    away, kept = outcome(model, source)
    first = [float(level.retention_at(0)) for level in model.resamplers]
    assert kept == pytest.approx(first, abs=0.005)
    assert [one.target for one in found] == first
    assert kept == pytest.approx([one.kept for one in found], abs=1e-6)
    assert [one.live for one in found] == pytest.approx([0.15 * share for share in first], abs=0.005)
    assert away < control * {"at once": 1.6, "from 0.9": 0.8, "from all": 0.3}[start]
    trained, kept = outcome(model.train(), source)
    assert kept == pytest.approx(first, abs=0.01)  # of each window, rounded up
    assert trained < 1.2 * away + 0.01


@pytest.mark.parametrize("selection", SELECTIONS)
def test_a_token_above_the_ramp_takes_exactly_what_the_body_gives(selection: str):
    model = student(teacher(), "F subllm(0.64: 3F) F", **settings(selection, 0.3))
    insert_levels(model, batches(), ramp=0.3)
    (level,) = model.resamplers
    seen = list[Selection]()
    bodies, hidden = list[tuple[Tensor, Tensor]](), list[tuple[Tensor, Tensor]]()
    level.body.register_forward_hook(lambda _module, inputs, output: bodies.append((inputs[0], output)))
    level.register_forward_hook(lambda _module, inputs, output: hidden.append((inputs[0], output)))
    tokens, _, stream = batches()[0].inputs("cpu")
    with torch.no_grad(), model.watching(lambda _level, _stream, selection: seen.append(selection)):
        model(tokens, stream)
    rows, whole = seen[0].rows, seen[0].weights == 1
    assert float(whole.double().mean()) == pytest.approx(0.7, abs=0.05)
    left = hidden[0][1][rows][whole]
    torch.testing.assert_close(left, bodies[0][1][whole], rtol=0, atol=1e-5)  # x + (G - x), in fp32
    dropped = torch.ones(len(tokens), dtype=torch.bool).index_fill(0, rows, False)
    assert torch.equal(hidden[0][0][dropped], hidden[0][1][dropped])


@pytest.mark.parametrize("selection", SELECTIONS)
def test_every_level_has_a_gradient_at_the_first_step(selection: str):
    """Trap 4 of the specification: no score has one where none lies between 0 and 1."""
    model = student(teacher(), NESTED, **settings(selection))
    insert_levels(model, batches())
    tokens, targets, stream = batches()[0].inputs("cpu")
    model.train().loss(tokens, targets, stream).backward()
    assert all(level.score.weight.grad.abs().max() > 0 for level in model.resamplers)
    assert all(level.bypass.grad.abs().max() > 0 for level in model.resamplers)


def test_nothing_but_the_levels_is_changed():
    source = teacher()
    model = student(source, NESTED).train()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    insert_levels(model, batches())
    changed = {name for name, weight in model.state_dict().items() if not torch.equal(weight, before[name])}
    assert len(changed) == 4
    assert all(name.endswith(("score.weight", "bypass")) for name in changed)
    assert model.training
    assert not any(level._forward_hooks for level in model.resamplers)


def test_the_same_text_gives_the_same_start():
    models = [student(teacher(), NESTED, **settings("causal")) for _ in range(2)]
    assert insert_levels(models[0], batches()) == insert_levels(models[1], batches())
    weights = zip(models[0].state_dict().values(), models[1].state_dict().values(), strict=True)
    assert all(torch.equal(one, other) for one, other in weights)


@pytest.mark.parametrize("selection", SELECTIONS)
def test_a_model_in_bf16_keeps_the_share_too(selection: str):
    source = teacher(torch.bfloat16)
    model = student(source, NESTED, **settings(selection))
    found = insert_levels(model, batches())
    assert [one.kept for one in found] == pytest.approx([0.64, 0.64], abs=0.02)
    assert outcome(model, source)[1] == pytest.approx([0.64, 0.64], abs=0.02)


def test_a_stream_without_a_constant_is_told_of():
    """Published scores cannot be shifted then, and what is kept is no more than told; causal thresholds can."""
    source = teacher()
    with torch.no_grad():
        draw = torch.Generator().manual_seed(4)
        half = torch.randn(30, 32, generator=draw)
        source.embed.weight.copy_(torch.cat([half, -half, torch.zeros(1, 32)]))
        for block in source.blocks:
            for weight in block.parameters():
                weight.mul_(1e-3)
    published, causal = (student(source, "F subllm(0.9: 3F) F", **settings(one)) for one in SELECTIONS)
    (told,) = insert_levels(published, batches())
    assert told.constant < 0.1
    assert told.kept < 0.8
    assert outcome(published, source)[1] == pytest.approx([told.kept], abs=1e-6)
    (one,) = insert_levels(causal, batches())
    assert one.kept == pytest.approx(0.9, abs=0.005)


def test_levels_that_no_token_reaches_stay_as_they_are():
    model = student(teacher(), NESTED)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    nothing = torch.zeros(0, dtype=torch.int64)
    assert insert_levels(model, [Batch(nothing, nothing, (0,), (0,), (0,), (0,))]) == []
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


def test_no_text_is_refused_and_a_failure_leaves_no_hook():
    model = student(teacher(), NESTED)
    with pytest.raises(UserError, match=r"^batches: none; give some windows of text$"):
        insert_levels(model, [])
    bad = torch.full((5,), 99)
    with pytest.raises(UserError):
        insert_levels(model, [Batch(bad, bad, (5,), (5,), (0,), (0,))])
    assert not any(level._forward_hooks for level in model.resamplers)


def test_a_model_without_levels_has_none_to_place():
    assert insert_levels(teacher(), batches(1)) == list[Insertion]()
