"""Models in folders: `load` any layout that the registry knows, `save` in one of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from longwave import durable
from longwave.checkpoints import llama, native, subllm
from longwave.config import ModelConfig
from longwave.data.tokenizer import Tokenizer
from longwave.errors import UserError
from longwave.model import Decoder

Reader = Callable[[Path, "dict[str, Any]", "torch.dtype | None"], Decoder]
Writer = Callable[[Decoder, Path, "Tokenizer | None"], None]

READERS: dict[str, Reader] = {
    native.MODEL_TYPE: native.read_model,
    llama.MODEL_TYPE: llama.read_model,
    subllm.MODEL_TYPE: subllm.read_model,
}
CONFIGS: dict[str, Callable[[dict[str, Any], str], ModelConfig]] = {
    native.MODEL_TYPE: native.config_from,
    llama.MODEL_TYPE: llama.config_from,
    subllm.MODEL_TYPE: subllm.config_from,
}
WRITERS: dict[str, Writer] = {
    native.MODEL_TYPE: lambda model, folder, _: native.write_model(model, folder),
    llama.MODEL_TYPE: llama.write_model,
    subllm.MODEL_TYPE: subllm.write_model,
}


def load(path: str | Path, *, dtype: torch.dtype | None = None, device: torch.device | str = "cpu") -> Decoder:
    """Loads a model folder: longwave's own, a Hugging Face Llama, or a published SUBLLM.

    dtype: of the weights; as they were saved by default. UserError for a folder that does not fit: a missing,
    unexpected or misshapen tensor, an unknown family, a file that differs from its checksum.
    """
    folder = Path(path)
    values = read_config(folder)
    durable.verify(folder)
    return READERS[family(values, folder)](folder, values, dtype).to(device)


def save(
    model: Decoder, path: str | Path, *, tokenizer: Tokenizer | None = None, layout: str = native.MODEL_TYPE
) -> None:
    """Saves a model so that the folder appears whole or not at all.

    layout: "longwave"; "llama" for an ordinary `transformers` folder of a model that is a plain Llama; or "subllm" for
    the published layout of a SUBLLM. UserError for a model that the layout cannot hold.
    """
    if layout not in WRITERS:
        raise UserError(f"layout = {layout!r}; use one of {', '.join(WRITERS)}")
    with durable.folder(path) as staging:
        WRITERS[layout](model, staging, tokenizer)
        if tokenizer is not None:
            tokenizer.save(staging)
            _write_generation_config(tokenizer, staging)


def load_config(path: str | Path) -> ModelConfig:
    """The config of the model in a folder, of which only `config.json` need exist."""
    folder = Path(path)
    values = read_config(folder)
    return CONFIGS[family(values, folder)](values, str(folder / "config.json"))


def read_config(folder: Path) -> dict[str, Any]:
    """The parsed `config.json` of a folder."""
    path = folder / "config.json"
    if not path.exists():
        raise UserError(f"{folder}: no config.json; give a model folder")
    try:
        values = json.loads(path.read_text())
    except (ValueError, OSError) as error:
        raise UserError(f"{path}: not readable as JSON: {error}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: not a JSON object")
    return values


def family(values: dict[str, Any], folder: Path) -> str:
    """Which layout a `config.json` speaks of; a published SUBLLM is known by its `structure`."""
    name = subllm.MODEL_TYPE if "structure" in values else values.get("model_type")
    if name not in READERS:
        raise UserError(f"{folder / 'config.json'}: model_type = {name!r}; supported: {', '.join(READERS)}")
    return str(name)


def _write_generation_config(tokenizer: Tokenizer, folder: Path) -> None:
    """The ids at which `transformers` begins and ends a generation."""
    ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
    known = {name: id for name, id in ids.items() if id is not None}
    (folder / "generation_config.json").write_text(json.dumps(known, indent=2) + "\n")
