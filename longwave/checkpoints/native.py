"""longwave's own folder: `config.json`, `model.safetensors` under flat names, the tokenizer, and a manifest."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from longwave.checkpoints.filling import ReadOptions, StoredTensor, empty, fill
from longwave.checkpoints.generation import IDS
from longwave.checkpoints.located import WEIGHTS
from longwave.checkpoints.names import flat_names
from longwave.checkpoints.weights import WeightFiles, write
from longwave.config import ModelConfig, build
from longwave.errors import UserError, shown
from longwave.files import OpenFolder
from longwave.model import Decoder
from longwave.version import __version__

MODEL_TYPE = "longwave"
FORMAT = 2
STUB = "modeling_longwave.py"
_AUTO_CLASSES = {
    "AutoConfig": "LongwaveConfig",
    "AutoModel": "LongwaveModel",
    "AutoModelForCausalLM": "LongwaveForCausalLM",
    "AutoModelForSequenceClassification": "LongwaveForSequenceClassification",
}
_STUB_TEXT = f'''"""By this file `trust_remote_code=True` finds longwave, which must be installed."""

from longwave.hf import {", ".join(_AUTO_CLASSES.values())}

__all__ = {json.dumps([*_AUTO_CLASSES.values()])}
'''


def write_model(model: Decoder, folder: Path, ids: Mapping[str, Any] | None = None) -> None:
    """Writes a model into an existing folder. ids: of special tokens, for the tools that read them in `config.json`."""
    names = flat_names(model)
    tensors: dict[str, Tensor] = {names[name]: tensor for name, tensor in model.state_dict().items()}
    write(tensors, folder / WEIGHTS)
    write_description(model, folder, ids)


def write_description(model: Decoder, folder: Path, ids: Mapping[str, Any] | None = None) -> None:
    """Writes all but the weights: `config.json`, and the module that it names to `transformers`."""
    (folder / "config.json").write_text(json.dumps(config_json(model, ids), indent=2) + "\n")
    (folder / STUB).write_text(_STUB_TEXT)


def config_json(model: Decoder, ids: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The content of `config.json`; `ids` may hold more than ids of special tokens."""
    return {name: ids[name] for name in IDS if ids and ids.get(name) is not None} | {
        "model_type": MODEL_TYPE,
        "architectures": [_AUTO_CLASSES["AutoModelForCausalLM"]],
        "auto_map": {auto: f"{Path(STUB).stem}.{name}" for auto, name in _AUTO_CLASSES.items()},
        "longwave_format": FORMAT,
        "longwave_version": __version__,
        "dtype": str(model.embed.weight.dtype).removeprefix("torch."),
        "model": model.config.to_dict(),
        **({"source": model.origin.source} if model.origin.source else {}),
        **({"training": dict(model.origin.training)} if model.origin.training else {}),
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


def read_model(
    folder: OpenFolder, values: dict[str, Any], dtype: torch.dtype | None, ignoring: tuple[str, ...] = ()
) -> Decoder:
    """Builds the model of a folder; weights take `dtype`, or stay as they were saved.

    ignoring: the names of tensors that are none of the decoder's, and stay unread.
    """
    source = str(folder / "config.json")
    config, files = config_from(values, source), WeightFiles(folder, ignoring=ignoring)
    model = empty(config, files, source)
    stored = {name: StoredTensor([name]) for name in flat_names(model).values()}
    return fill(model, files, stored, ReadOptions(dtype, values.get("dtype")))
