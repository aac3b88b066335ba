"""Folders in the published SUBLLM format (github XiaoMi/subllm, arXiv 2406.06571), read and written.

`config.json` has no `model_type`; its `structure` tells it. The weights lie in `model.safetensors`, or in one file that
`torch.save` wrote, of which nothing but tensors is ever unpickled.

What the published code does whatever its config says is done here too: `scale_token_embedding` is ignored (the scale is
1), norms have an epsilon of 1e-5, and rotation has base 10000. `attn_type` and `use_fused` choose among equal forms and
the remaining keys (window of training, ids, dropout) do not change the model. Writing keeps the model, but not the
settings of its training (`subllm.*`, `init.*`), for which this format has no keys.
"""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from longwave.checkpoints.filling import ReadOptions
from longwave.checkpoints.foreign import ForeignConfig, Row, assemble, disassemble, refuse_unless
from longwave.checkpoints.generation import IDS
from longwave.checkpoints.located import INDEX, WEIGHTS
from longwave.checkpoints.weights import WeightFiles, Weights, write
from longwave.config import ModelConfig, ScalesConfig, build
from longwave.errors import UserError
from longwave.files import OpenFolder
from longwave.files.jsonfile import plain
from longwave.layout import Blocks, Layout, parse
from longwave.mixers import AttentionConfig
from longwave.model import Decoder
from longwave.resamplers.subllm import retention_of

MODEL_TYPE = "subllm"
_EPS, _ROTARY_BASE = 1e-5, 10000.0

TABLE = (
    Row("decoder.embed_tokens.weight", "embed.weight"),
    Row("decoder.layers.{i}.self_attn_layer_norm.weight", "blocks.{i}.mixer_norm.weight"),
    Row("decoder.layers.{i}.self_attn.q_proj.weight", "blocks.{i}.mixer.q_proj.weight"),
    Row("decoder.layers.{i}.self_attn.k_proj.weight", "blocks.{i}.mixer.k_proj.weight"),
    Row("decoder.layers.{i}.self_attn.v_proj.weight", "blocks.{i}.mixer.v_proj.weight"),
    Row("decoder.layers.{i}.self_attn.out_proj.weight", "blocks.{i}.mixer.o_proj.weight"),
    Row("decoder.layers.{i}.final_layer_norm.weight", "blocks.{i}.mlp_norm.weight"),
    Row("decoder.layers.{i}.feedforward.swiglu.w12.weight", "blocks.{i}.mlp.gate_proj.weight"),
    Row("decoder.layers.{i}.feedforward.swiglu.w12.weight", "blocks.{i}.mlp.up_proj.weight"),
    Row("decoder.layers.{i}.feedforward.swiglu.w3.weight", "blocks.{i}.mlp.down_proj.weight"),
    Row("decoder.downsamplers.{i}.to_scores.weight", "resamplers.{i}.score.weight", as_row=True),
    Row("decoder.bypasses.{closing}.bypass_scale", "resamplers.{i}.bypass"),
    Row("decoder.layer_norm.weight", "norm.weight"),
    Row("decoder.output_projection.weight", "head.weight"),
)
_BUFFERS = "position.inv_freq"
_PICKLES = (".pt", ".pth", ".bin")


def read_model(folder: OpenFolder, values: dict[str, Any], dtype: torch.dtype | None) -> Decoder:
    """Builds the model of a folder; weights take `dtype`, or stay as they were saved."""
    source = str(folder / "config.json")
    config = config_from(values, source)
    options = ReadOptions(dtype, tied=(TABLE[-1].theirs, TABLE[0].theirs) if config.tie_embeddings else None)
    numbering = {"closing": closing_order(values["structure"])}
    return assemble(config, _weights(folder), TABLE, source, options, numbering=numbering)


def write_model(model: Decoder, folder: Path, ids: dict[str, Any]) -> None:
    """Writes `config.json` and `model.safetensors`; UserError for a model that the published code cannot be."""
    values = config_json(model, ids)
    write(disassemble(model, TABLE, {"closing": closing_order(values["structure"])}), folder / WEIGHTS)
    (folder / "config.json").write_text(json.dumps(values, indent=2) + "\n")


def config_from(values: dict[str, Any], source: str) -> ModelConfig:
    """The model config in a parsed `config.json`; UserError for a key whose value is not supported."""
    theirs = ForeignConfig(values, source)
    theirs.only("qk_bias", False)
    theirs.only("norm_name", "rmsnorm")
    theirs.only("mlp_name", "swiglu")
    structure = theirs.get("structure", str)
    _check_structure(theirs, structure)
    described = {
        "vocab_size": theirs.get("num_embeddings", int),
        "hidden_size": _width(theirs),
        "layout": _layout(structure, _retentions(theirs, structure.count("("))),
        "attention": {"heads": theirs.get("decoder_attention_heads", int)},
        "mlp": {"size": theirs.get("decoder_ffn_embed_dim", int)},
        "context_window": theirs.get("tokens_per_sample", int, theirs.get("n_positions", int, 2048)),
        "norm_eps": _EPS,
        "tie_embeddings": theirs.get("tie_weights", bool, True),  # true is the default of the published class
    }
    return build(ModelConfig, described, source)


def closing_order(structure: str) -> list[int]:
    """For every `(` in order, the place of its `)` among all `)`: bypasses are numbered so, and downsamplers by `(`."""
    order, opened = [0] * structure.count("("), list[int]()
    opening = closing = 0
    for character in structure:
        if character == "(":
            opened.append(opening)
            opening += 1
        elif character == ")":
            order[opened.pop()] = closing
            closing += 1
    return order


def config_json(model: Decoder, ids: dict[str, Any]) -> dict[str, Any]:
    """The content of `config.json`; UserError for a model that the published code cannot be.

    ids: of special tokens, as `transformers` names them.
    """
    config = model.config
    _refuse_what_the_published_code_lacks(model)
    retentions = [item.arguments[0] for item in model.layout.walk() if not isinstance(item, Blocks)]
    return {name: ids[name] for name in IDS if name in ids} | {
        "num_embeddings": config.vocab_size,
        "decoder_embed_dim": config.hidden_size,
        "hidden_size": config.hidden_size,
        "decoder_ffn_embed_dim": config.mlp.size,
        "decoder_layers": model.layout.depth,
        "decoder_attention_heads": config.attention.heads,
        "structure": _structure(model.layout),
        "downsampling_factor_denominator": ",".join(retentions if len(set(retentions)) > 1 else retentions[:1]),
        "tokens_per_sample": config.context_window,
        "n_positions": config.context_window,
        "tie_weights": config.tie_embeddings,
        "qk_bias": False,
        "norm_name": "rmsnorm",
        "mlp_name": "swiglu",
    }


def _check_structure(theirs: ForeignConfig, structure: str) -> None:
    """Balanced, of the characters T ( ) only, nothing empty, one T per layer."""
    opened = list[int]()
    for at, character in enumerate(structure):
        if character not in "T()":
            raise _pointed(theirs, at, "only T, ( and ) are known")
        if character == "(":
            opened.append(at)
        if character == ")" and not opened:
            raise _pointed(theirs, at, "closes nothing")
        if character == ")" and opened.pop() == at - 1:
            raise _pointed(theirs, at, "no T inside")
    if opened:
        raise _pointed(theirs, opened[-1], "is never closed")
    layers = theirs.get("decoder_layers", int)
    if structure.count("T") != layers or not layers:
        raise theirs.error("structure", f"has {structure.count('T')} T, yet decoder_layers = {layers}")


def _pointed(theirs: ForeignConfig, at: int, what: str) -> UserError:
    structure = str(theirs.values["structure"])
    shown = f"{structure[:at]}>>{structure[at]}<<{structure[at + 1 :]}"
    return UserError(f"{theirs.source}: structure, character {at + 1}: {what}: {shown!r}")


def _retentions(theirs: ForeignConfig, levels: int) -> list[str]:
    """The retention of every level as written; the key's name notwithstanding, it holds the ratio itself."""
    key = "downsampling_factor_denominator"
    if not levels:
        return []
    ratios = [text.strip() for text in str(theirs.values.get(key, "")).split(",")]
    try:
        for ratio in ratios:
            retention_of(ratio)
    except UserError:
        raise theirs.error(key, "one number in (0, 1], or one per ( separated by commas") from None
    if len(ratios) not in (1, levels):
        raise theirs.error(key, f"holds {len(ratios)} ratios, yet structure has {levels} pairs")
    return ratios * (levels // len(ratios))


def _layout(structure: str, retentions: list[str]) -> str:
    """`TT(T)` -> `2F subllm(0.64: F)`."""
    left = iter(retentions)
    pieces = []
    for run in re.findall(r"T+|[()]", structure):
        pieces.append(f"subllm({next(left)}:" if run == "(" else run if run == ")" else f"{len(run)}F")
    return str(parse(" ".join(pieces)))


def _structure(layout: Layout) -> str:
    """`2F subllm(0.64: F)` -> `TT(T)`."""
    return "".join(
        "T" * item.count if isinstance(item, Blocks) else f"({_structure(item.body)})" for item in layout.items
    )


def _width(theirs: ForeignConfig) -> int:
    key = "hidden_size" if theirs.values.get("decoder_embed_dim") is None else "decoder_embed_dim"
    width = theirs.get(key, int)
    theirs.only("hidden_size", width)
    heads = theirs.get("decoder_attention_heads", int)
    if heads < 1 or width % (2 * heads):
        raise theirs.error("decoder_attention_heads", f"{key} = {width} must be an even multiple of it")
    return width


def _weights(folder: OpenFolder) -> Weights:
    """The tensors of a folder, in safetensors or in the one file that `torch.save` wrote."""
    if folder.names & {WEIGHTS, INDEX}:
        return WeightFiles(folder, ignoring=_BUFFERS)
    found = sorted(name for name in folder.names if name.endswith(_PICKLES))
    if len(found) != 1:
        listed, wanted = ", ".join(found) or "none", ", *".join(_PICKLES)
        raise UserError(f"{folder.path}: no {WEIGHTS}, so exactly one *{wanted} is needed; found: {listed}")
    tensors = {name: tensor for name, tensor in _state_dict(folder, found[0]) if not name.endswith(_BUFFERS)}
    return _Pickled(str(folder / found[0]), tensors)


@dataclass(frozen=True)
class _Pickled:
    """Tensors, memory-mapped where the file allows it; reading gives them memory of their own."""

    source: str
    found: Mapping[str, Tensor]

    def read(self, dtypes: Mapping[str, torch.dtype]) -> dict[str, Tensor]:
        return {name: self.found[name].to(dtype, copy=True) for name, dtype in dtypes.items()}


def _state_dict(folder: OpenFolder, file: str) -> Iterator[tuple[str, Tensor]]:
    """The tensors that `torch.save` wrote, by name; UserError for a file that holds anything else."""
    path, opened = folder / file, folder.reopened(file)
    try:
        _refuse_compressed(opened)
        content = torch.load(opened, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(opened))
    except Exception as error:  # torch raises whatever the bytes lead it to
        first = str(error).partition("\n")[0]
        raise UserError(f"{path}: cannot be read as a state dict of tensors and nothing else: {first}") from None
    content = content.get("model", content) if isinstance(content, dict) else content
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds a {type(content).__name__}, not a state dict, nor one under the key 'model'")
    for name, tensor in content.items():
        if not isinstance(tensor, Tensor):
            raise UserError(f"{path}: {plain(str(name))} is a {type(tensor).__name__}, not a tensor")
        if not _is_whole(tensor):
            raise UserError(f"{path}: {plain(str(name))} does not hold its own numbers (sparse, meta or expanded)")
        yield str(name), tensor


def _refuse_compressed(path: str) -> None:
    """ValueError for an archive that grows when it is read; `torch.save` never compresses."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                raise ValueError("compressed, which torch.save never does")


def _is_whole(tensor: Tensor) -> bool:
    """Whether a tensor's numbers all lie in the file: no form that grows when it is copied."""
    plain_form = tensor.layout == torch.strided and not tensor.is_meta and not tensor.is_quantized
    return plain_form and tensor.nbytes <= tensor.untyped_storage().nbytes()


def _refuse_what_the_published_code_lacks(model: Decoder) -> None:
    config = model.config
    levels = [part for part in model.layout.walk() if not isinstance(part, Blocks)]
    letters = {part.letter for part in model.layout.walk() if isinstance(part, Blocks)}
    plain = letters == {"F"} and all(level.name == "subllm" for level in levels)
    refuse_unless(plain, MODEL_TYPE, "layout", config.layout, "only F blocks and subllm(...)")
    attention: AttentionConfig = config.table("attention")
    size = attention.size_in(config.hidden_size)
    whole = size * attention.heads == config.hidden_size
    rules = (
        (attention.groups == attention.heads, "attention.kv_heads", attention.groups, "as many as heads"),
        (whole, "attention.head_size", size, "hidden_size / heads"),
        (not attention.qkv_bias, "attention.qkv_bias", True, "no biases"),
        (not attention.output_bias, "attention.output_bias", True, "no biases"),
        (not config.mlp.bias, "mlp.bias", True, "no biases"),
        (not attention.qk_norm, "attention.qk_norm", True, "no norm of queries and keys"),
        (config.scales == ScalesConfig(), "scales", config.scales, "all must be 1"),
        (config.norm_eps == _EPS, "norm_eps", config.norm_eps, f"must be {_EPS}"),
        (config.rotary.base == _ROTARY_BASE, "rotary.base", config.rotary.base, f"must be {_ROTARY_BASE}"),
        (config.rotary.scaling is None, "rotary.scaling", config.rotary.scaling, "must be none"),
        (not config.subllm or config.subllm.selection == "published", "subllm.selection", "causal", "published"),
    )
    for kept, name, value, legal in rules:
        refuse_unless(kept, MODEL_TYPE, name, value, legal)
