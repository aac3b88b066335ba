"""GGUF: a model and its tokenizer in one file, as llama.cpp and what is built on it read them.

Models of plain softmax blocks are written, as the architectures `llama`, `qwen2` (biases on queries, keys and values)
and `qwen3` (normed queries and keys). Names and layout are those of the `gguf` package, which llama.cpp maintains.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from longwave import files
from longwave.checkpoints.gguf_vocabulary import write_vocabulary
from longwave.config import ModelConfig
from longwave.data.tokenizer import Tokenizer
from longwave.errors import UserError, require
from longwave.layout import Blocks
from longwave.mixers import AttentionConfig
from longwave.model import Decoder

SUFFIX = ".gguf"
KINDS = {"gguf": None, "gguf-q8_0": "Q8_0"}
"""Formats of `save`, with the type of their matrices; None for that of the model."""

_TYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
_GROUP = 32  # numbers of a row that share a scale in Q8_0
_NAMES = {
    "mixer_norm": "attn_norm",
    "mixer.q_proj": "attn_q",
    "mixer.k_proj": "attn_k",
    "mixer.v_proj": "attn_v",
    "mixer.o_proj": "attn_output",
    "mixer.q_norm": "attn_q_norm",
    "mixer.k_norm": "attn_k_norm",
    "mlp_norm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


class _Named(NamedTuple):
    name: str
    values: Tensor


def save(model: Decoder, path: str | Path, tokenizer: Tokenizer | None, format: str) -> None:
    """Writes a model as one GGUF file, which appears whole or not at all.

    format: of `KINDS`. UserError for a model or a tokenizer that the file cannot hold, and without the gguf package.
    """
    path = Path(path)
    architecture = architecture_of(model.config)
    require(path.suffix == SUFFIX, f"{path}: a GGUF is one file; give it a name that ends in {SUFFIX}")
    if tokenizer is None:
        raise UserError(f"{path}: a GGUF holds the tokenizer, and this model has none")
    kind = KINDS[format] or _TYPES.get(model.embed.weight.dtype)
    if kind is None:
        raise UserError(f"dtype = {model.embed.weight.dtype}: a GGUF holds fp32, bf16 or fp16")
    try:
        import gguf
    except ImportError:
        raise UserError("gguf is not installed; pip install 'longwave[gguf]'") from None
    with files.file(path) as staging:
        writer = gguf.GGUFWriter(staging, architecture)
        _describe(writer, model.config, len(model.blocks), path.stem)
        write_vocabulary(writer, gguf, tokenizer, model.config.vocab_size)
        for name, values in _tensors(model, architecture):
            _add(writer, gguf, name, values, kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def architecture_of(config: ModelConfig) -> str:
    """The architecture of llama.cpp that a model is; UserError for one that is none."""
    attention: AttentionConfig = config.table("attention")
    plain = all(isinstance(item, Blocks) and item.letter == "F" for item in config.parsed.walk())
    require(plain and not config.blocks, f"layout = {config.layout}: a GGUF of ours holds F blocks only, all alike")
    require(config.rotary.scaling is None, "rotary.scaling: a GGUF of ours has none")
    biases = attention.output_bias or config.table("mlp").bias
    require(not biases, "biases: llama.cpp's llama and qwen have none on the output or the feed-forward")
    scales = config.scales
    require(scales == type(scales)(), "scales: llama.cpp's llama and qwen have none")
    if attention.qk_norm:
        require(not attention.qkv_bias, "attention.qkv_bias: not beside normed queries and keys")
        return "qwen3"
    return "qwen2" if attention.qkv_bias else "llama"


def _describe(writer: Any, config: ModelConfig, blocks: int, name: str) -> None:
    attention: AttentionConfig = config.table("attention")
    size = attention.size_in(config.hidden_size)
    writer.add_name(name)
    writer.add_context_length(config.context_window)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(blocks)
    writer.add_feed_forward_length(config.table("mlp").size)
    writer.add_head_count(attention.heads)
    writer.add_head_count_kv(attention.groups)
    writer.add_key_length(size)
    writer.add_value_length(size)
    writer.add_rope_dimension_count(size)
    writer.add_rope_freq_base(config.rotary.base)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_vocab_size(config.vocab_size)


def _tensors(model: Decoder, architecture: str) -> Iterator[_Named]:
    """Every weight by its name in GGUF; heads of queries and keys in the order in which llama.cpp turns them."""
    yield _Named("token_embd.weight", model.embed.weight)
    attention: AttentionConfig = model.config.table("attention")
    heads = {"mixer.q_proj": attention.heads, "mixer.k_proj": attention.groups}
    for number, block in enumerate(model.blocks):
        for name, values in block.named_parameters():
            part, leaf = name.rsplit(".", 1)
            turned = architecture == "llama" and part in heads
            yield _Named(f"blk.{number}.{_NAMES[part]}.{leaf}", _interleaved(values, heads[part]) if turned else values)
    yield _Named("output_norm.weight", model.norm.weight)
    if not model.config.tie_embeddings:
        yield _Named("output.weight", model.head_weight)


def _interleaved(values: Tensor, heads: int) -> Tensor:
    """Channels i and i + half of a head side by side: llama.cpp's llama turns neighbours, and we turn halves."""
    halves = values.unflatten(0, (heads, 2, -1))
    return halves.transpose(1, 2).reshape(values.shape)


def _add(writer: Any, gguf: Any, name: str, values: Tensor, kind: str) -> None:
    """Adds a tensor: matrices in the type that is asked for, if their rows fit into it, and vectors in fp32."""
    if values.dim() < 2:
        kind = "F32"
    elif kind == "Q8_0" and values.shape[-1] % _GROUP:
        kind = "F16"
    type_ = gguf.GGMLQuantizationType[kind]
    writer.add_tensor(name, gguf.quantize(values.detach().float().cpu().numpy(), type_), raw_dtype=type_)
