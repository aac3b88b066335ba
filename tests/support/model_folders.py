"""Tiny model folders with random weights, made by `transformers` or by longwave, and what tests ask of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from longwave.config import ModelConfig, build
from longwave.files import MANIFEST
from longwave.model import Decoder
from longwave.streams import Stream

TOKENS = torch.randint(0, 29, (23,), generator=torch.Generator().manual_seed(0))


def filled(tensors: dict[str, Tensor], seed: int = 0) -> None:
    """Random values everywhere, in norms and biases too, so that no tensor can stand for another."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in sorted(tensors.items()):
        noise = torch.randn(tensor.shape, generator=generator)
        tensor.copy_(1 + 0.3 * noise if "norm" in name and name.endswith("weight") else 0.3 * noise)


def theirs(
    folder: Path, family: str = "llama", dtype: torch.dtype = torch.float32, shard: str = "1GB", **keys: Any
) -> PreTrainedModel:
    """A random model made and saved by transformers."""
    shape = {"vocab_size": 29, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 3}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4}
    config = AutoConfig.for_model(family, **{**shape, **heads, **keys})
    model = AutoModelForCausalLM.from_config(config).to(dtype).eval()
    with torch.no_grad():
        filled(dict(model.named_parameters()))
    model.save_pretrained(folder, max_shard_size=shard)
    return model


def their_llama(folder: Path, dtype: torch.dtype = torch.float32, shard: str = "1GB", **keys: Any) -> PreTrainedModel:
    """A random Llama made and saved by transformers."""
    return theirs(folder, "llama", dtype, shard, **keys)


def small(layout: str = "2F", **keys: Any) -> Decoder:
    shape = {"vocab_size": 29, "hidden_size": 16, "attention": {"heads": 2}, "mlp": {"size": 24}, **keys}
    model = Decoder(build(ModelConfig, {"layout": layout, **shape}, "test")).eval()
    with torch.no_grad():
        filled(dict(model.named_parameters()))
    return model


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    """Changes the tensors of a folder, and forgets its checksums."""
    tensors = {name: tensor.clone() for name, tensor in load_file(folder / "model.safetensors").items()}
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / MANIFEST).unlink(missing_ok=True)


def reconfigure(folder: Path, **keys: Any) -> None:
    """Changes keys of a folder's `config.json`; ... removes one."""
    path = folder / "config.json"
    values = {name: value for name, value in (json.loads(path.read_text()) | keys).items() if value is not ...}
    path.write_text(json.dumps(values))


def logits(model: Decoder, tokens: Tensor = TOKENS) -> Tensor:
    with torch.no_grad():
        return model(tokens, Stream.of([len(tokens)]))


def greedy(model: Decoder, tokens: Tensor, count: int) -> list[int]:
    """Longwave's own cached loop."""
    state, made, new = model.state(), list[int](), tokens
    for _ in range(count):
        with torch.no_grad():
            made.append(int(model(new, state.stream([len(new)]).last_rows(), state).argmax()))
        new = torch.tensor(made[-1:])
    return made


def same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    """The same names, types and bits."""
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert ours[name].dtype == theirs[name].dtype
        assert torch.equal(ours[name], theirs[name]), name
