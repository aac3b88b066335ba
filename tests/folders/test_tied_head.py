"""A tied head is the embedding, whatever is done to the model: copied, moved, loaded, resized, replaced or adapted."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from contract import Case, alone, decoder, distance
from hf_models import ROWS, wrapped
from hf_models import decoder as hf_decoder
from peft import LoraConfig, get_peft_model
from torch import nn

import longwave as lw
from longwave.layers.head import Head, TiedHead
from longwave.model import Decoder
from longwave.streams import Stream

TOKENS = list(range(20))


def tied() -> Decoder:
    return decoder(Case("2F", {"tie_embeddings": True}))


def is_one_matrix(model: Decoder) -> bool:
    """Whether head and embedding share their weights, in what is computed too."""
    assert isinstance(model.head, TiedHead)
    shared = model.head_weight is model.head.weight is model.embed.weight
    before = model.head(torch.ones(1, model.config.hidden_size).to(model.embed.weight))
    with torch.no_grad():
        model.embed.weight.mul_(2)
    after = model.head(torch.ones(1, model.config.hidden_size).to(model.embed.weight))
    with torch.no_grad():
        model.embed.weight.div_(2)
    return shared and torch.equal(after, 2 * before)


def loaded(model: Decoder) -> Decoder:
    model.load_state_dict({name: tensor + 1 for name, tensor in model.state_dict().items()}, assign=True)
    return model


def from_meta(model: Decoder) -> Decoder:
    with torch.device("meta"):
        empty = Decoder(model.config)
    empty.to_empty(device="cpu").load_state_dict({name: one.float() for name, one in model.state_dict().items()})
    return empty


def larger(model: Decoder) -> Decoder:
    model.embed = nn.Embedding(70, 32, dtype=torch.float64)
    return model


WAYS: dict[str, Callable[[Decoder], Decoder]] = {
    "as built": lambda model: model,
    "copied": copy.deepcopy,
    "pickled": lambda model: pickle.loads(pickle.dumps(model)),
    "in another type": lambda model: model.to(torch.bfloat16),
    "from the meta device": from_meta,
    "given tensors": loaded,
    "given an embedding": larger,
}


@pytest.mark.parametrize("way", WAYS)
def test_head_and_embedding_stay_one_matrix(way: str):
    assert is_one_matrix(WAYS[way](tied()))


def test_a_copy_is_tied_to_itself():
    model = tied()
    twin, before = copy.deepcopy(model), alone(model, TOKENS)
    assert twin.head_weight is not model.head_weight
    with torch.no_grad():
        twin.embed.weight.zero_()
    assert torch.equal(alone(model, TOKENS), before)
    assert alone(twin, TOKENS).eq(0).all()


def test_it_holds_no_weights_of_its_own_and_no_model_alive(tmp_path: Path):
    model = tied()
    assert [name for name in model.state_dict() if "head" in name] == []
    assert list(model.head.parameters()) == []
    assert sum(p.numel() for p in model.parameters()) == sum(cost.parameters for cost in model.costs(1))
    lw.save(model, tmp_path / "model")
    assert is_one_matrix(lw.load(tmp_path / "model"))
    gone = weakref.ref(model)
    gc.disable()
    try:
        del model
        assert gone() is None, "freed at once, without a search for cycles"
    finally:
        gc.enable()


def test_a_gradient_gathers_both_uses():
    model, separate = tied(), decoder(Case("2F"))
    separate.load_state_dict({**model.state_dict(), "head.weight": model.embed.weight.detach().clone()})
    tokens = torch.tensor(TOKENS)
    for one in (model, separate):
        one.loss(tokens, tokens.roll(-1), Stream.of([20])).backward()
    both = separate.embed.weight.grad + separate.head.weight.grad
    assert distance(model.embed.weight.grad, both) <= 1e-12


def test_a_head_of_its_own_follows_nothing():
    model = decoder(Case("2F"))
    head = model.head
    model.embed = nn.Embedding(61, 32, dtype=torch.float64)
    assert isinstance(model.head, Head)
    assert model.head is head


# --- in transformers --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [40, 20])
def test_another_vocabulary_is_one_of_both(size: int):
    ours = wrapped(hf_decoder("llama"))
    ours.resize_token_embeddings(size)
    assert is_one_matrix(ours.decoder)
    assert ours.decoder.head_weight.shape == (size, 16)


def test_set_input_embeddings_sets_both():
    ours = wrapped(hf_decoder("llama"))
    ours.set_input_embeddings(nn.Embedding(31, 16, dtype=torch.float64))
    assert is_one_matrix(ours.decoder)
    with torch.no_grad():
        assert distance(ours(ROWS[:1]).logits[0], ours.decoder(ROWS[0], Stream.of([12]))) <= 1e-12


def test_an_embedding_that_peft_trains_is_the_head_that_it_trains():
    ours = wrapped(hf_decoder("llama"))
    adapted = get_peft_model(ours, LoraConfig(target_modules=["q_proj"], modules_to_save=["embed"]))
    assert ours.decoder.head_weight is ours.decoder.embed.weight
    assert ours.decoder.head_weight.requires_grad
    with torch.no_grad():
        ours.decoder.embed.weight.mul_(2)
        doubled = adapted(ROWS).logits
        with adapted.disable_adapter():
            assert distance(adapted(ROWS).logits, wrapped(hf_decoder("llama"))(ROWS).logits) <= 1e-11
        merged = adapted.merge_and_unload()
        assert distance(merged(ROWS).logits, doubled) <= 1e-11
    assert is_one_matrix(merged.decoder)
