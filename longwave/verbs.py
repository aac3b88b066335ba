"""The verbs of the command line as functions: each takes its verb's options, and returns what the verb prints."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from longwave.config import ModelConfig
from longwave.errors import require, within
from longwave.machine import dtype_of
from longwave.planning import Plan, model_config, plan_of
from longwave.units import parse_sizes

_MOST_CONTEXTS = 100


def plan(
    model: str | Path | ModelConfig,
    *,
    context: int | str | Sequence[int | str] = 4096,
    dtype: Literal["fp32", "bf16", "fp16", "fp64"] = "bf16",
) -> Plan:
    """Parameters, FLOPs and state bytes of a model, before they are paid: no weight is read or made.

    model: a recipe, a folder of which only `config.json` need exist, a hub id, or a config.
    context: numbers of tokens, such as `4096`, `"64k"` or `[4096, "1M"]`. dtype: of weights and activations.
    Raises UserError for a config that cannot be built and for what is no number of tokens.
    """
    contexts = _contexts(context)
    if isinstance(model, ModelConfig):
        return plan_of(model, contexts, dtype_of(dtype))
    config = model_config(model)
    with within(model):
        return plan_of(config, contexts, dtype_of(dtype))


def _contexts(given: int | str | Sequence[int | str]) -> list[int]:
    one_by_one = [given] if isinstance(given, int | str) else given
    contexts = [size for one in one_by_one for size in parse_sizes(str(one))]
    fits = 0 < len(contexts) <= _MOST_CONTEXTS
    require(fits, f"context: {len(contexts)} numbers of tokens; give 1 to {_MOST_CONTEXTS} of them")
    return contexts
