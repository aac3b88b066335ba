"""longwave's own folder: `config.json`, `model.safetensors` under flat names, the tokenizer, and a manifest."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from longwave.checkpoints.filling import ReadOptions, StoredTensor, empty, fill
from longwave.checkpoints.located import WEIGHTS
from longwave.checkpoints.names import flat_names
from longwave.checkpoints.weights import WeightFiles, write
from longwave.config import ModelConfig, build
from longwave.errors import UserError, shown
from longwave.model import Decoder
from longwave.version import __version__

MODEL_TYPE = "longwave"
FORMAT = 2
STUB = "modeling_longwave.py"
_STUB_TEXT = '''"""By this file `trust_remote_code=True` finds longwave, which must be installed."""

from longwave.hf import LongwaveConfig, LongwaveForCausalLM

__all__ = ["LongwaveConfig", "LongwaveForCausalLM"]
'''
_AUTO_CLASSES = {"AutoConfig": "LongwaveConfig", "AutoModelForCausalLM": "LongwaveForCausalLM"}


def write_model(model: Decoder, folder: Path) -> None:
    """Writes a model into an existing folder."""
    names = flat_names(model)
    tensors: dict[str, Tensor] = {names[name]: tensor for name, tensor in model.state_dict().items()}
    write(tensors, folder / WEIGHTS)
    write_description(model, folder)


def write_description(model: Decoder, folder: Path) -> None:
    """Writes all but the weights: `config.json`, and the module that it names to `transformers`."""
    (folder / "config.json").write_text(json.dumps(config_json(model), indent=2) + "\n")
    (folder / STUB).write_text(_STUB_TEXT)


def config_json(model: Decoder) -> dict[str, Any]:
    """The content of `config.json`."""
    return {
        "model_type": MODEL_TYPE,
        "architectures": [_AUTO_CLASSES["AutoModelForCausalLM"]],
        "auto_map": {auto: f"{Path(STUB).stem}.{name}" for auto, name in _AUTO_CLASSES.items()},
        "longwave_format": FORMAT,
        "longwave_version": __version__,
        "dtype": str(model.embed.weight.dtype).removeprefix("torch."),
        "model": model.config.to_dict(),
    }


def config_from(values: dict[str, Any], source: str) -> ModelConfig:
    """The model config in a parsed `config.json`."""
    found = values.get("longwave_format")
    if type(found) is not int or not 1 <= found <= FORMAT:
        raise UserError(f"{source}: longwave_format = {shown(found)}; this longwave reads formats 1 to {FORMAT}")
    model = values.get("model")
    if not isinstance(model, dict):
        raise UserError(f"{source}: model = {shown(model)}: expected the table that describes the model")
    return build(ModelConfig, from_format_1(model) if found == 1 else model, source)


def from_format_1(model: dict[str, Any]) -> dict[str, Any]:
    """The table of a model of format 1, in which the size of a sliding window was a key of `attention`."""
    attention = model.get("attention")
    if not isinstance(attention, dict) or "window" not in attention:
        return model
    size = attention["window"]
    attention = {name: value for name, value in attention.items() if name != "window"}
    return {**model, "attention": attention, **({} if size is None else {"window": {"size": size}})}


def read_model(folder: Path, values: dict[str, Any], dtype: torch.dtype | None) -> Decoder:
    """Builds the model of a folder; weights take `dtype`, or stay as they were saved."""
    source = str(folder / "config.json")
    config, files = config_from(values, source), WeightFiles(folder)
    model = empty(config, files, source)
    stored = {name: StoredTensor([name]) for name in flat_names(model).values()}
    return fill(model, files, stored, ReadOptions(dtype, values.get("dtype")))
