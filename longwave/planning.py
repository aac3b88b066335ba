"""The costs of a model that need not exist yet: parameters, FLOPs and state bytes of each kind of part and in total."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from longwave import checkpoints
from longwave.config import ModelConfig, build
from longwave.costs import Cost, by_kind, total
from longwave.errors import UserError
from longwave.model import Decoder
from longwave.training.recipe import read_values


@dataclass(frozen=True)
class Plan:
    """What a model takes, at each of several contexts.

    layout, hidden_size, vocab_size: of the model. dtype: of weights and activations, such as `bfloat16`.
    contexts: for each number of tokens, the costs of each kind of part, and their total as the last one.
    """

    layout: str
    hidden_size: int
    vocab_size: int
    dtype: str
    contexts: Mapping[int, tuple[Cost, ...]]

    @property
    def parameters(self) -> int:
        """The number of weights of the whole model."""
        return next(iter(self.contexts.values()))[-1].parameters

    def total(self, context: int) -> Cost:
        """The costs of the whole model at one of the contexts."""
        return self.contexts[context][-1]


def plan_of(config: ModelConfig, contexts: Sequence[int], dtype: torch.dtype) -> Plan:
    """What a model of this config takes at every one of the contexts. UserError for a config that cannot be built."""
    model = meta_model(config)
    rows = {context: _with_total(by_kind(model.costs(context, dtype))) for context in contexts}
    return Plan(config.layout, config.hidden_size, config.vocab_size, str(dtype).removeprefix("torch."), rows)


def model_config(path: str | Path) -> ModelConfig:
    """The config of the model in a recipe, a folder, or a hub id of any supported format; no weights are read.

    Raises UserError for a recipe without a `[model]` table, and for a faulty one.
    """
    if Path(path).is_dir() or checkpoints.is_hub_id(path):
        return checkpoints.load_config(path)
    values = read_values(path)
    if "model" not in values:
        raise UserError(f"{path}: no [model] table; give a recipe or a model folder")
    return build(ModelConfig, values["model"], str(path), "model")


def meta_model(config: ModelConfig) -> Decoder:
    """The model on torch's `meta` device, where weights have shapes but no memory."""
    with torch.device("meta"):
        return Decoder(config)


def costs_at(config: ModelConfig, context: int, dtype: torch.dtype) -> list[Cost]:
    """The costs of each kind of part at a context of so many tokens; the total comes last."""
    return list(plan_of(config, [context], dtype).contexts[context])


def _with_total(rows: list[Cost]) -> tuple[Cost, ...]:
    return (*rows, total(rows))
