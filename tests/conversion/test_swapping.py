"""Models between a teacher and the one aligned to it: bit for bit what is assembled, with no weight of their own."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from longwave.config import ModelConfig, build
from longwave.conversion.swapping import convertible, swapped
from longwave.conversion.transfer import assembled, transferred
from longwave.errors import UserError
from longwave.model import Decoder
from longwave.streams import Stream

TOKENS = torch.randint(61, (40,), generator=torch.Generator().manual_seed(1))
SHAPES: dict[str, dict[str, Any]] = {
    "llama": {"attention": {"heads": 4}},
    "grouped": {"attention": {"heads": 4, "kv_heads": 2, "qk_norm": True}},
    "tied and scaled": {"tie_embeddings": True, "scales": {"embedding": 12.0, "residual": 0.25, "logits": 0.0625}},
    "biased": {"attention": {"heads": 4, "qkv_bias": True}},
    "windows": {"layout": "F 2W", "window": {"size": 8}},
    "sparse": {"layout": "S F S", "infllm": {"regime": "dense"}},
}
LINEAR: dict[str, dict[str, Any]] = {
    "as it is": {},
    "unrotated": {"lightning": {"rotary": False, "slopes": "minimax"}},
    "ungated": {"lightning": {"output_gate": False, "qk_norm": False}},
}


def config(**changes: Any) -> ModelConfig:
    shape = {"vocab_size": 61, "hidden_size": 32, "layout": "3F", "context_window": 64}
    tables = {"attention": {"heads": 4, "kv_heads": 2}, "mlp": {"size": 48}}
    return build(ModelConfig, {**shape, **tables, **changes}, "model")


def student(layout: str, changes: dict[str, Any], **more: Any) -> ModelConfig:
    """The config of a student; it has the tables that its layout reads."""
    read = {"window": "W", "infllm": "S", "lightning": "L"}
    values = {**changes, **more, "layout": layout}
    return config(**{name: value for name, value in values.items() if read.get(name, layout[:1]) in layout})


def aligned_to(teacher: Decoder, config: ModelConfig) -> Decoder:
    """A model whose mixers are nothing like the teacher's."""
    generator = torch.Generator().manual_seed(2)
    model = transferred(teacher, config)
    with torch.no_grad():
        for block in model.blocks:
            for weight in block.mixer.parameters():
                weight.copy_(torch.randn(weight.shape, generator=generator) / 4)
    return model.train()


def computed(model: Decoder) -> list[torch.Tensor]:
    """What a model gives for two texts, and for a text in two pieces."""
    with torch.no_grad():
        whole = model(TOKENS, Stream.of((25, 15)))
        state = model.state()
        pieces = [model(piece, state.stream([len(piece)]), state) for piece in TOKENS.split(20)]
    return [whole, *pieces]


@pytest.mark.parametrize("linear", LINEAR)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_swapped_model_is_the_assembled_one_bit_for_bit(shape: str, linear: str) -> None:
    teacher = Decoder(config(**SHAPES[shape]), seed=3).to(torch.bfloat16 if shape == "grouped" else torch.float32)
    aligned = aligned_to(teacher, student("3L", SHAPES[shape], **LINEAR[linear]))
    letters = [block.letter for block in teacher.blocks]
    for chosen in ((), (1,), (0, 1, 2)):
        layout = " ".join("L" if depth in chosen else letter for depth, letter in enumerate(letters))
        whole = assembled(teacher, aligned, student(layout, SHAPES[shape], **LINEAR[linear])).eval()
        for found, expected in zip(computed(swapped(teacher, aligned, chosen)), computed(whole), strict=True):
            assert torch.equal(found, expected)


def test_no_weight_is_copied_and_nothing_changes_in_the_two_models() -> None:
    teacher = Decoder(config(), seed=3)
    aligned = aligned_to(teacher, config(layout="3L")).requires_grad_(False)
    before = {name: tensor.clone() for one in (teacher, aligned) for name, tensor in one.state_dict().items()}
    held = {tensor.data_ptr() for one in (teacher, aligned) for tensor in one.state_dict().values()}
    model = swapped(teacher, aligned, [1])
    computed(model)
    assert {tensor.data_ptr() for tensor in model.state_dict().values()} <= held
    assert not model.training
    assert teacher.training
    assert aligned.training
    assert all(weight.requires_grad for weight in teacher.parameters())
    assert not any(weight.requires_grad for weight in aligned.parameters())
    after = {name: tensor for one in (teacher, aligned) for name, tensor in one.state_dict().items()}
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


def test_layers_that_were_not_aligned_are_not_convertible() -> None:
    teacher = Decoder(config(layout="2F L"))
    aligned = Decoder(config(layout="F 2L"))
    assert convertible(teacher, aligned) == [1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layout": "4L"}, "4 blocks; the source has 3"),
        ({"layout": "3F"}, "every layer is the teacher's; align some first"),
        ({"layout": "L subllm(0.5: L) L"}, "has levels"),
        ({"layout": "3L", "rotary": {"base": 5000.0}}, "aligned.rotary = .*: the teacher's is"),
        ({"layout": "3L", "scales": {"residual": 0.5}}, "aligned.scales = "),
        ({"layout": "3L", "mlp": {"size": 64}}, "mlp"),
        ({"layout": "3L", "vocab_size": 62}, "embed.weight"),
        ({"layout": "3L", "tie_embeddings": True}, "head.weight.*: not as in the teacher"),
    ],
)
def test_models_that_do_not_belong_together_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        convertible(Decoder(config()), Decoder(config(**changes)))
