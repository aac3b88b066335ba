"""What a model will cost, before it exists: parameters, FLOPs and state bytes per part and in total."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch

from longwave import checkpoints
from longwave.config import ModelConfig, build
from longwave.costs import Cost, by_kind, total
from longwave.errors import UserError
from longwave.model import Decoder
from longwave.training.recipe import read_values


def model_config(path: str | Path) -> ModelConfig:
    """The model that a recipe describes, or a folder or hub id of any supported format (only `config.json` is read)."""
    if Path(path).is_dir() or checkpoints.is_hub_id(path):
        return checkpoints.load_config(path)
    values = read_values(path)
    if "model" not in values:
        raise UserError(f"{path}: no [model] table; give a recipe or a model folder")
    return build(ModelConfig, values["model"], f"{path}: model")


def meta_model(config: ModelConfig) -> Decoder:
    """The model without any memory for its weights."""
    with torch.device("meta"):
        return Decoder(config)


def costs_at(config: ModelConfig, context: int, dtype: torch.dtype) -> list[Cost]:
    """The costs of each kind of part at a context of so many tokens, their total last."""
    rows = by_kind(meta_model(config).costs(context, dtype))
    return [*rows, total(rows)]


def to_json(config: ModelConfig, contexts: list[int], dtype: torch.dtype) -> dict[str, Any]:
    """Everything as plain values."""
    return {
        "layout": config.layout,
        "dtype": str(dtype).removeprefix("torch."),
        "contexts": {str(n): [dataclasses.asdict(cost) for cost in costs_at(config, n, dtype)] for n in contexts},
    }
