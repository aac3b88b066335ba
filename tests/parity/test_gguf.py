"""GGUF files: the weights and the tokenizer that the reader of `transformers` finds in them, and refusals.

llama.cpp's own reader needs an environment of its own: docs/how-to/llama.md says how, and what it gave.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import runs
import torch
import transformers
from gguf import GGUFReader, GGUFWriter, dequantize

import longwave as lw
from longwave.config import ModelConfig, build
from longwave.data.tokenizer import Tokenizer
from longwave.errors import MachineError, UserError
from longwave.model import Decoder
from longwave.streams import Stream

TEXT = "def f(x):\n    return x + 1234  # it's a test\n"
SHAPE: dict[str, Any] = {
    "layout": "2F",
    "hidden_size": 64,
    "context_window": 128,
    "mlp": {"size": 96},
    "rotary": {"base": 5000.0},
}
KINDS: dict[str, dict[str, Any]] = {
    "llama": {"attention": {"heads": 4, "kv_heads": 2}},
    "tied": {"attention": {"heads": 4}, "tie_embeddings": True},
    "wide heads": {"attention": {"heads": 2, "head_size": 48}},
    "qwen2": {"attention": {"heads": 4, "kv_heads": 2, "qkv_bias": True}},
    "qwen3": {"attention": {"heads": 4, "kv_heads": 2, "qk_norm": True, "head_size": 128}},
}


def model_of(kind: str = "llama", **changes: Any) -> Decoder:
    tokenizer = Tokenizer.load(runs.prepared())
    values = SHAPE | {"vocab_size": tokenizer.vocab_size + 3} | KINDS[kind] | changes
    model = Decoder(build(ModelConfig, values, "tests"), seed=1).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():  # norms and biases, too, differ from channel to channel
            weight.add_(torch.randn(weight.shape, generator=generator), alpha=0.1)
    model.tokenizer = tokenizer
    return model


def logits_of(model: Decoder, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor(ids), Stream.of([len(ids)]))


@pytest.mark.parametrize("kind", KINDS)
def test_transformers_finds_the_model_and_the_tokenizer(kind: str, tmp_path: Path):
    model = model_of(kind)
    lw.save(model, tmp_path / "tiny.gguf", format="gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.gguf"]
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="tiny.gguf", dtype=torch.float32)
    reader = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file="tiny.gguf")
    assert model.tokenizer is not None
    ids = model.tokenizer.encode(TEXT)
    assert reader(TEXT, add_special_tokens=False)["input_ids"] == ids
    assert reader.bos_token_id == model.tokenizer.bos_id
    with torch.no_grad():
        found = theirs(torch.tensor([ids])).logits[0]
    torch.testing.assert_close(found, logits_of(model, ids), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("format", "dtype", "error"), [("gguf", torch.bfloat16, 0), ("gguf-q8_0", torch.float32, 1)])
def test_every_weight_is_there_in_its_type(format: str, dtype: torch.dtype, error: int, tmp_path: Path):
    model = model_of("qwen3").to(dtype)
    lw.save(model, tmp_path / "tiny.gguf", format=format)
    tensors = {one.name: one for one in GGUFReader(tmp_path / "tiny.gguf").tensors}
    assert len(tensors) == len(model.state_dict())
    for name, ours in (("blk.1.ffn_down.weight", model.blocks[1].mlp.down_proj.weight), ("output_norm.weight", None)):
        right = (model.norm.weight if ours is None else ours).float()
        found = torch.from_numpy(dequantize(tensors[name].data, tensors[name].tensor_type)).view_as(right)
        assert (found - right).abs().max() <= error * right.abs().max() / 127
        matrix = "Q8_0" if error else "BF16"
        assert tensors[name].tensor_type.name == ("F32" if ours is None else matrix)


REFUSED = {
    "layout = F L": {"layout": "F L"},
    "layout = W F": {"layout": "W F", "window": {"size": 16}},
    "layout = F subllm": {"layout": "F subllm(0.5: F)", "subllm": {"selection": "causal"}},
    "biases": {"mlp": {"size": 96, "bias": True}},
    "scales": {"scales": {"logits": 0.5}},
    "rotary.scaling": {"rotary": {"scaling": {"kind": "yarn", "factor": 2.0, "original_window": 64}}},
}


@pytest.mark.parametrize("problem", REFUSED)
def test_a_model_that_llama_cpp_has_not_is_refused(problem: str, tmp_path: Path):
    with pytest.raises(UserError, match=problem.replace("(", r"\(")):
        lw.save(model_of(**REFUSED[problem]), tmp_path / "tiny.gguf", format="gguf")
    assert not list(tmp_path.iterdir())


def test_other_names_types_and_tokenizers_are_refused(tmp_path: Path):
    model = model_of()
    with pytest.raises(UserError, match=r"ends in \.gguf"):
        lw.save(model, tmp_path / "folder", format="gguf")
    with pytest.raises(UserError, match="float64"):
        lw.save(model_of().double(), tmp_path / "tiny.gguf", format="gguf")
    model.tokenizer = None
    with pytest.raises(UserError, match="tokenizer"):
        lw.save(model, tmp_path / "tiny.gguf", format="gguf")
    assert not list(tmp_path.iterdir())


def test_a_full_disk_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(writer: GGUFWriter) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(GGUFWriter, "write_tensors_to_file", full)
    with pytest.raises(MachineError, match="No space"):
        lw.save(model_of(), tmp_path / "tiny.gguf", format="gguf")
    assert not list(tmp_path.iterdir())
