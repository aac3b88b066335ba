"""Hugging Face folders of every family in `families.py`, read and written."""

from __future__ import annotations

import json
import math
from collections.abc import Container, Iterator, Mapping
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from longwave.checkpoints.families import BUFFERS, EMBEDDING, HEAD, IN_TRANSFORMERS, TABLE, Family
from longwave.checkpoints.filling import ReadOptions
from longwave.checkpoints.foreign import ForeignConfig, assemble, disassemble, refuse_unless
from longwave.checkpoints.located import WEIGHTS, weights_file
from longwave.checkpoints.rope import read_rotary, read_window, write_rotary, write_window
from longwave.checkpoints.weights import WeightFiles, write
from longwave.config import ModelConfig, build
from longwave.errors import UserError, shown
from longwave.files import OpenFolder
from longwave.layout import Blocks, Layout
from longwave.mixers import AttentionConfig
from longwave.model import Decoder

_TYPES = {"full_attention": "F", "sliding_attention": "W"}
_QUANTISED = (".qweight", ".qzeros", ".g_idx", ".weight_packed", ".weight_scale", ".absmax", ".SCB")


def read_model(family: Family, folder: OpenFolder, values: dict[str, Any], dtype: torch.dtype | None) -> Decoder:
    """Builds the model of a folder; weights take `dtype`, or stay as they were saved."""
    source = str(folder / "config.json")
    config_from(family, values, source)  # a config that is refused is refused before any file of weights is opened
    files = WeightFiles(folder, weights_file(folder, values), ignoring=BUFFERS)
    _refuse_quantised(files)
    config = config_from(family, values, source, files.found)
    stated = values.get("dtype") or values.get("torch_dtype")
    tied = (HEAD, EMBEDDING) if config.tie_embeddings else None
    return assemble(config, files, TABLE, source, ReadOptions(dtype, stated, tied))


def write_model(family: Family, model: Decoder, folder: Path, ids: dict[str, Any]) -> None:
    """Writes `config.json` and the weights as `transformers` does; UserError for a model that is none of the family."""
    values = config_json(family, model, ids)
    write(disassemble(model, TABLE), folder / WEIGHTS)
    (folder / "config.json").write_text(json.dumps(values, indent=2) + "\n")


def config_from(
    family: Family, values: dict[str, Any], source: str, stored: Container[str] | None = None
) -> ModelConfig:
    """The model config in a parsed `config.json`; UserError for a key whose value is not supported.

    stored: the names of the folder's tensors, which say what keys leave open, and must not say otherwise.
    """
    theirs = ForeignConfig({**family.defaults, **values}, source)
    _refuse_other_models(family, theirs)
    width, depth = theirs.positive("hidden_size"), theirs.positive("num_hidden_layers")
    letters = list(_letters(family, theirs, depth))
    stated = theirs.positive("max_position_embeddings")
    rotary = read_rotary(theirs, family, stated)
    described = {
        "vocab_size": theirs.positive("vocab_size"),
        "hidden_size": width,
        "layout": " ".join(str(Blocks(len(list(run)), letter)) for letter, run in groupby(letters)),
        "attention": _attention(family, theirs, letters, stored or ()),
        "mlp": {"size": theirs.positive("intermediate_size"), "bias": _flag(family.mlp_bias, theirs, "mlp_bias")},
        "context_window": read_window(theirs, rotary.get("scaling", {}), stated),
        "rotary": rotary,
        "scales": _scales(theirs, width, depth) if family.mup else {},
        "init": {"std": theirs.get("initializer_range", float, 0.02)},
        "norm_eps": theirs.get("rms_norm_eps", float, 1e-6),
        "tie_embeddings": theirs.get("tie_word_embeddings", bool, False),
        **(family.hybrid.read(theirs, letters) if family.hybrid else {}),
        **({"window": {"size": theirs.positive("sliding_window")}} if "W" in letters else {}),
    }
    if family.hybrid and stored is not None:
        family.hybrid.refuse_other_parts(theirs, letters, stored)
    return build(ModelConfig, described, source)


def config_json(family: Family, model: Decoder, ids: dict[str, Any]) -> dict[str, Any]:
    """The content of `config.json`; UserError for a model that is none of the family.

    ids: of special tokens, as `transformers` names them.
    """
    config = model.config
    if problem := family.problem(config):
        refuse_unless(False, family.model_type, *problem)
    attention: AttentionConfig = config.table("attention")
    size = attention.size_in(config.hidden_size)
    return {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        "dtype": str(model.embed.weight.dtype).removeprefix("torch."),
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.mlp.size,
        "num_hidden_layers": model.layout.depth,
        "num_attention_heads": attention.heads,
        "num_key_value_heads": attention.groups,
        **({} if family.head_size == "shared" and not family.hybrid else {"head_dim": size}),
        "hidden_act": "silu",
        **write_window(config),
        "initializer_range": config.init.std,
        "rms_norm_eps": config.norm_eps,
        **write_rotary(config, family),
        **({"attention_bias": attention.qkv_bias} if family.bias == "key" else {}),
        **({"mlp_bias": config.mlp.bias} if family.mlp_bias else {}),
        **_written_windows(family, model),
        **(family.hybrid.write(config, [block.letter for block in model.blocks]) if family.hybrid else {}),
        **(_written_scales(config, model.layout) if family.mup else {}),
        "tie_word_embeddings": config.tie_embeddings,
        "use_cache": True,
        **{name: ids.get(name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")},
    }


def _refuse_other_models(family: Family, theirs: ForeignConfig) -> None:
    """Refuses what the family's code would run as another model than ours, or not at all."""
    if theirs.values.get("quantization_config") is not None:
        raise theirs.error("quantization_config", "quantised folders are not read; supported: fp32, bf16, fp16 weights")
    theirs.only("architectures", *([name] for name in (family.architecture, *family.also)))
    theirs.only("hidden_act", "silu")
    for key, supported in {**(IN_TRANSFORMERS if family.in_transformers else {}), **family.fixed}.items():
        theirs.only(key, *supported)


def _refuse_quantised(files: WeightFiles) -> None:
    for name in sorted(files.found):
        if name.endswith(_QUANTISED):
            raise UserError(
                f"{files.source}: tensor {name} belongs to quantised weights, which are not read; "
                "supported: fp32, bf16, fp16 weights"
            )


def _attention(family: Family, theirs: ForeignConfig, letters: list[str], stored: Container[str]) -> dict[str, Any]:
    width, heads = theirs.positive("hidden_size"), theirs.positive("num_attention_heads")
    shared = family.head_size == "shared" and set(letters) != {"L"}
    if (shared or theirs.values.get("head_dim") is None) and width % (2 * heads):
        raise theirs.error("num_attention_heads", f"hidden_size = {width} must be an even multiple of it")
    if shared:
        theirs.only("head_dim", width // heads)
    kv_heads, size = theirs.positive("num_key_value_heads", heads), theirs.positive("head_dim", width // heads)
    keyed = _flag(family.bias == "key", theirs, "attention_bias")
    return {
        "heads": heads,
        "kv_heads": None if kv_heads == heads else kv_heads,
        "head_size": None if size * heads == width else size,
        "qkv_bias": keyed or family.bias == "qkv",
        "output_bias": keyed,
        "qk_norm": _has_norms(letters, stored) if family.qk_norm is None else family.qk_norm,
    }


def _has_norms(letters: list[str], stored: Container[str]) -> bool:
    """Whether the folder has weights for norms of queries and keys in its softmax layers."""
    return "S" in letters and f"model.layers.{letters.index('S')}.self_attn.q_norm.weight" in stored


def _flag(known: bool, theirs: ForeignConfig, key: str) -> bool:
    """The value of a flag that some families have; in the others, as in their code, it says nothing."""
    return known and theirs.get(key, bool, False)


def _letters(family: Family, theirs: ForeignConfig, depth: int) -> Iterator[str]:
    """The letter of every block."""
    types = theirs.values.get("layer_types")
    if family.hybrid:
        yield from _typed(theirs, "mixer_types", family.hybrid.mixers, depth)
    elif family.windows == "none" and types is not None:
        yield from _typed(theirs, "layer_types", {"full_attention": "F"}, depth)
    elif family.windows == "none" or (family.windows == "all" and theirs.values.get("sliding_window") is None):
        yield from "F" * depth
    elif family.windows == "all":
        yield from "W" * depth
    elif types is not None:
        yield from _typed(theirs, "layer_types", _TYPES, depth)
        if "sliding_attention" in types and not _slides(theirs):
            why = "true, and a sliding_window, since layer_types has sliding_attention"
            raise theirs.error("use_sliding_window", why)
    else:
        first = theirs.get("max_window_layers", int, 28) if _slides(theirs) else depth
        yield from ("W" if at >= first else "F" for at in range(depth))


def _slides(theirs: ForeignConfig) -> bool:
    return theirs.get("use_sliding_window", bool, False) and theirs.values.get("sliding_window") is not None


def _typed(theirs: ForeignConfig, key: str, known: Mapping[str, str], depth: int) -> list[str]:
    """The letters of a list that names the kind of every layer."""
    types = theirs.get(key, list)
    if len(types) != depth:
        raise theirs.error(key, f"{len(types)} of them, yet num_hidden_layers = {depth}")
    for one in types:
        if not isinstance(one, str) or one not in known:
            raise theirs.error(key, f"one is {shown(one)}; supported: {', '.join(map(repr, known))}")
    return [known[one] for one in types]


def _written_windows(family: Family, model: Decoder) -> dict[str, Any]:
    letters = [block.letter for block in model.blocks]
    window = model.config.table("window").size if "W" in letters else None
    if family.windows == "none":
        return {}
    if family.windows == "all":
        return {"sliding_window": window}
    first = letters.index("W") if "W" in letters else len(letters)
    return {
        "use_sliding_window": window is not None,
        "sliding_window": window,
        "max_window_layers": first,
        "layer_types": ["sliding_attention" if letter == "W" else "full_attention" for letter in letters],
    }


def _scales(theirs: ForeignConfig, width: int, depth: int) -> dict[str, Any]:
    """The muP factors as the published code applies them."""
    return {
        "embedding": theirs.get("scale_emb", float, 1.0),
        "residual": theirs.get("scale_depth", float, 1.0) / math.sqrt(depth),
        "logits": theirs.get("dim_model_base", float, 1.0) / width,
    }


def _written_scales(config: ModelConfig, layout: Layout) -> dict[str, Any]:
    root, width, scales = math.sqrt(layout.depth), config.hidden_size, config.scales
    return {
        "scale_emb": scales.embedding,
        "scale_depth": _times(scales.residual, root),
        "dim_model_base": _times(scales.logits, width),
    }


def _times(quotient: float, divisor: float) -> float:
    """The number of fewest digits that gives exactly this quotient when it is divided again."""
    product = quotient * divisor
    near = (float(f"{product:.{digits}g}") for digits in range(1, 17))
    beside = (math.nextafter(product, sign * math.inf) for sign in (-1, 1))
    return next((one for one in (*near, product, *beside) if one / divisor == quotient), product)
