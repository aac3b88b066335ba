"""Hugging Face folders of the Llama family (`model_type: "llama"`), read and written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from longwave.checkpoints.foreign import ForeignConfig, Row, assemble, disassemble, refuse_unless, without_tied_head
from longwave.checkpoints.weights import WEIGHTS, WeightFiles, write
from longwave.config import ModelConfig, ScalesConfig, build
from longwave.data.tokenizer import Tokenizer
from longwave.layout import Blocks
from longwave.model import Decoder

MODEL_TYPE = "llama"

TABLE = (
    Row("model.embed_tokens.weight", "embed.weight"),
    Row("model.layers.{i}.input_layernorm.weight", "blocks.{i}.mixer_norm.weight"),
    Row("model.layers.{i}.self_attn.q_proj.{leaf}", "blocks.{i}.mixer.q_proj.{leaf}"),
    Row("model.layers.{i}.self_attn.k_proj.{leaf}", "blocks.{i}.mixer.k_proj.{leaf}"),
    Row("model.layers.{i}.self_attn.v_proj.{leaf}", "blocks.{i}.mixer.v_proj.{leaf}"),
    Row("model.layers.{i}.self_attn.o_proj.{leaf}", "blocks.{i}.mixer.o_proj.{leaf}"),
    Row("model.layers.{i}.post_attention_layernorm.weight", "blocks.{i}.mlp_norm.weight"),
    Row("model.layers.{i}.mlp.gate_proj.{leaf}", "blocks.{i}.mlp.gate_proj.{leaf}"),
    Row("model.layers.{i}.mlp.up_proj.{leaf}", "blocks.{i}.mlp.up_proj.{leaf}"),
    Row("model.layers.{i}.mlp.down_proj.{leaf}", "blocks.{i}.mlp.down_proj.{leaf}"),
    Row("model.norm.weight", "norm.weight"),
    Row("lm_head.weight", "head.weight"),
)
_BUFFERS = "rotary_emb.inv_freq"  # what older folders keep beside the weights


def read_model(folder: Path, values: dict[str, Any], dtype: torch.dtype | None) -> Decoder:
    """Builds the model of a folder; weights take `dtype`, or stay as they were saved."""
    config = config_from(values, str(folder / "config.json"))
    files, source = WeightFiles(folder), str(folder / WEIGHTS)
    tensors = files.load(name for name in files.names() if not name.endswith(_BUFFERS))
    if config.tie_embeddings:
        tensors = without_tied_head(tensors, "lm_head.weight", "model.embed_tokens.weight", source)
    return assemble(config, tensors, TABLE, source, dtype=dtype)


def write_model(model: Decoder, folder: Path, tokenizer: Tokenizer | None) -> None:
    """Writes `config.json` and the weights as `transformers` does; UserError for a model that is no plain Llama."""
    values = config_json(model, tokenizer)
    write(disassemble(model, TABLE), folder / WEIGHTS)
    (folder / "config.json").write_text(json.dumps(values, indent=2) + "\n")


def config_from(values: dict[str, Any], source: str) -> ModelConfig:
    """The model config in a parsed `config.json`; UserError for a key whose value is not supported."""
    theirs = ForeignConfig(values, source)
    theirs.only("hidden_act", "silu")
    theirs.only("quantization_config")
    described = {
        "vocab_size": theirs.get("vocab_size", int),
        "hidden_size": theirs.get("hidden_size", int),
        "layout": f"{theirs.get('num_hidden_layers', int)}F",
        "attention": _attention(theirs),
        "mlp": {"size": theirs.get("intermediate_size", int), "bias": theirs.get("mlp_bias", bool, False)},
        "context_window": theirs.get("max_position_embeddings", int, 2048),
        "rotary": {"base": _rope_base(theirs)},
        "norm_eps": theirs.get("rms_norm_eps", float, 1e-6),
        "tie_embeddings": theirs.get("tie_word_embeddings", bool, False),
    }
    return build(ModelConfig, described, source)


def _attention(theirs: ForeignConfig) -> dict[str, Any]:
    width, heads = theirs.get("hidden_size", int), theirs.get("num_attention_heads", int)
    if heads < 1 or (theirs.values.get("head_dim") is None and width % (2 * heads)):
        raise theirs.error("num_attention_heads", f"hidden_size = {width} must be an even multiple of it")
    kv_heads, size = theirs.get("num_key_value_heads", int, heads), theirs.get("head_dim", int, width // heads)
    return {
        "heads": heads,
        "kv_heads": None if kv_heads == heads else kv_heads,
        "head_size": None if size * heads == width else size,
        "qkv_bias": theirs.get("attention_bias", bool, False),
        "output_bias": theirs.get("attention_bias", bool, False),
    }


def _rope_base(theirs: ForeignConfig) -> float:
    """The base of the rotation, from `rope_parameters` (transformers 5) or from `rope_theta` and `rope_scaling`."""
    base = theirs.get("rope_theta", float, 10000.0)
    for key in ("rope_scaling", "rope_parameters"):
        rope = ForeignConfig(theirs.get(key, dict, {}), f"{theirs.source}: {key}")
        for name in ("rope_type", "type"):
            rope.only(name, "default")
        rope.only("partial_rotary_factor", 1.0)
        base = rope.get("rope_theta", float, base)
    return base


def config_json(model: Decoder, tokenizer: Tokenizer | None) -> dict[str, Any]:
    """The content of `config.json`; UserError for a model that is no plain Llama."""
    config = model.config
    _refuse_what_llama_lacks(model)
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": MODEL_TYPE,
        "dtype": str(model.embed.weight.dtype).removeprefix("torch."),
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.mlp.size,
        "num_hidden_layers": model.layout.depth,
        "num_attention_heads": config.attention.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_size,
        "hidden_act": "silu",
        "max_position_embeddings": config.context_window,
        "initializer_range": config.init.std,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rotary.base,  # read by transformers 4
        "rope_parameters": {"rope_theta": config.rotary.base, "rope_type": "default"},
        "attention_bias": config.attention.qkv_bias,
        "mlp_bias": config.mlp.bias,
        "tie_word_embeddings": config.tie_embeddings,
        "bos_token_id": tokenizer and tokenizer.bos_id,
        "eos_token_id": tokenizer and tokenizer.eos_id,
        "use_cache": True,
    }


def _refuse_what_llama_lacks(model: Decoder) -> None:
    config, attention = model.config, model.config.attention
    plain = all(isinstance(item, Blocks) and item.letter == "F" for item in model.layout.items)
    refuse_unless(plain, MODEL_TYPE, "layout", config.layout, "a Llama has F blocks only")
    refuse_unless(not attention.qk_norm, MODEL_TYPE, "attention.qk_norm", True, "a Llama has none")
    same = attention.qkv_bias == attention.output_bias
    refuse_unless(same, MODEL_TYPE, "attention.output_bias", attention.output_bias, "the same as attention.qkv_bias")
    whole = config.hidden_size % attention.heads == 0
    refuse_unless(whole, MODEL_TYPE, "hidden_size", config.hidden_size, "transformers wants a multiple of the heads")
    refuse_unless(config.scales == ScalesConfig(), MODEL_TYPE, "scales", config.scales, "a Llama has none but 1")
