"""How far heads look, and other orders of heads, which change nothing in softmax attention."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from test_transfer import FULL, TOKENS, config, logits, teacher

from longwave.conversion.heads import attention_distances, order_for, reorder_heads
from longwave.conversion.transfer import transferred
from longwave.errors import UserError
from longwave.mixers import FullAttention, LightningAttention
from longwave.model import Decoder
from longwave.streams import Stream

ORDER = [2, 0, 3, 1]
SOFTMAX: dict[str, dict[str, Any]] = {
    "plain": {"attention": {"heads": 4}},
    "normed": {"attention": {"heads": 4, "qk_norm": True}},
    "biased": {"attention": {"heads": 4, "qkv_bias": True, "output_bias": True}},
    "gated": {"layout": "4S", "attention": {"heads": 4}, "infllm": {**FULL, "output_gate": True}},
}


@pytest.mark.parametrize("shape", SOFTMAX)
def test_another_order_of_heads_changes_nothing(shape: str) -> None:
    model = teacher(torch.float64, **SOFTMAX[shape])
    for block in model.blocks:
        for weight in block.parameters():
            torch.nn.init.normal_(weight, std=0.2)
    before, first = logits(model), model.blocks[0].mixer.q_proj.weight.clone()
    for block in model.blocks:
        reorder_heads(block.mixer, ORDER)
    assert not torch.equal(model.blocks[0].mixer.q_proj.weight, first)
    torch.testing.assert_close(logits(model), before, rtol=0, atol=1e-12)


def test_heads_of_linear_attention_take_their_decays_with_them() -> None:
    """With the decays in the new order too, the layer gives what it gave; alone, a new order is another layer."""
    model = teacher(torch.float64, layout="4L", attention={"heads": 4})
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    before = logits(model)
    for block in model.blocks:
        reorder_heads(block.mixer, ORDER)
    assert (logits(model) - before).abs().max() > 1e-3
    for block in model.blocks:
        block.mixer.log_decay.value.copy_(block.mixer.log_decay.value[ORDER])
    torch.testing.assert_close(logits(model), before, rtol=0, atol=1e-10)


def naive_distances(model: Decoder, text: torch.Tensor, depth: int) -> torch.Tensor:
    """From the whole matrix of weights of one layer."""
    seen: list[Any] = []
    mixer = model.blocks[depth].mixer
    hook = mixer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[:2]))
    with torch.no_grad():
        model(text, Stream.of((len(text),)))
        hook.remove()
        query, key = mixer.queries_and_keys(*seen[0])
    key = key.repeat_interleave(mixer.heads // mixer.kv_heads, 1)
    places = torch.arange(len(text))
    away = places[:, None] - places
    scores = torch.einsum("thk,uhk->htu", query, key) * mixer.scale
    weights = scores.masked_fill(away < 0, -torch.inf).softmax(-1)
    weights[..., 0] = 0
    return (weights * away).sum((1, 2)) / weights.sum((1, 2))


def test_distances_are_those_of_the_whole_matrix() -> None:
    model = teacher(torch.float64)
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.5)
    found = attention_distances(model, [TOKENS])
    assert list(found) == [0, 1, 2, 3]
    for depth, distances in found.items():
        torch.testing.assert_close(distances, naive_distances(model, TOKENS, depth), rtol=1e-9, atol=1e-9)
    assert not model.blocks[0].mixer._forward_pre_hooks
    twice = attention_distances(model, [TOKENS, TOKENS])
    torch.testing.assert_close(twice[2], found[2])


def test_only_layers_that_see_all_are_measured() -> None:
    model = Decoder(config(layout="F L W F", attention={"heads": 4}, window={"size": 4}))
    found = attention_distances(model, [TOKENS])
    assert set(found) == {0, 2, 3}
    assert float(found[2].max()) < 4


def test_the_nearest_head_gets_the_place_that_forgets_soonest() -> None:
    assert order_for([30.0, 2.0, 9.0], [-1.0, -0.1, -0.5]) == [1, 0, 2]
    assert order_for([5.0, 5.0], [-1.0, -1.0]) == [0, 1]
    draws = random.Random(0)
    for _ in range(50):
        heads = draws.randint(1, 12)
        distances, decays = ([draws.random() for _ in range(heads)] for _ in range(2))
        order = order_for(distances, decays)
        assert sorted(order) == list(range(heads))
        by_decay = sorted(range(heads), key=lambda place: decays[place])
        found = [distances[order[place]] for place in by_decay]
        assert found == sorted(found)


def test_a_sorted_student_has_the_heads_of_its_teacher() -> None:
    source = teacher(torch.float64)
    far = attention_distances(source, [TOKENS])
    student = transferred(source, config(layout="F 2L F"))
    for depth in (1, 2):
        mixer = student.blocks[depth].mixer
        assert isinstance(mixer, LightningAttention)
        order = order_for(far[depth].tolist(), mixer.log_decay.value.tolist())
        theirs = source.blocks[depth].mixer
        assert isinstance(theirs, FullAttention)
        before = theirs.q_proj.weight.unflatten(0, (4, 8))
        reorder_heads(mixer, order)
        assert torch.equal(mixer.q_proj.weight.unflatten(0, (4, 8)), before[order])
        keys = theirs.k_proj.weight.unflatten(0, (2, 8)).repeat_interleave(2, 0)
        assert torch.equal(mixer.k_proj.weight.unflatten(0, (4, 8)), keys[order])


def test_heads_that_share_keys_stay_where_they_are() -> None:
    with pytest.raises(UserError, match="kv_heads = 2: 4 heads share them; repeat them first"):
        reorder_heads(teacher().blocks[0].mixer, ORDER)
    with pytest.raises(UserError, match=r"order = \[0, 1\]: each of 4 heads once"):
        reorder_heads(teacher().blocks[0].mixer, [0, 1])
    with pytest.raises(UserError, match="2 heads for 3 places"):
        order_for([1.0, 2.0], [1.0, 2.0, 3.0])
