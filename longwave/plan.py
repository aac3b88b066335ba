"""The costs of a model that need not exist yet: parameters, FLOPs and state bytes of each kind of part and in total."""

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
    """The config of the model in a recipe, a folder, or a hub id of any supported format; no weights are read.

    Raises UserError for a recipe without a `[model]` table, and for a faulty one.
    """
    if Path(path).is_dir() or checkpoints.is_hub_id(path):
        return checkpoints.load_config(path)
    values = read_values(path)
    if "model" not in values:
        raise UserError(f"{path}: no [model] table; give a recipe or a model folder")
    return build(ModelConfig, values["model"], f"{path}: model")


def meta_model(config: ModelConfig) -> Decoder:
    """The model on torch's `meta` device, where weights have shapes but no memory."""
    with torch.device("meta"):
        return Decoder(config)


def costs_at(config: ModelConfig, context: int, dtype: torch.dtype) -> list[Cost]:
    """The costs of each kind of part at a context of so many tokens; the total comes last."""
    rows = by_kind(meta_model(config).costs(context, dtype))
    return [*rows, total(rows)]


def to_json(config: ModelConfig, contexts: list[int], dtype: torch.dtype) -> dict[str, Any]:
    """The costs at every context as plain values for JSON."""
    return {
        "layout": config.layout,
        "dtype": str(dtype).removeprefix("torch."),
        "contexts": {str(n): [dataclasses.asdict(cost) for cost in costs_at(config, n, dtype)] for n in contexts},
    }
