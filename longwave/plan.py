"""What a model will cost, before it exists: parameters, FLOPs and state bytes per part and in total."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from longwave import checkpoints
from longwave.config import ModelConfig, build
from longwave.costs import Cost, by_kind, total
from longwave.errors import UserError
from longwave.model import Decoder
from longwave.states.state import LAST_PLACE
from longwave.training.recipe import read_values

_UNITS = {"k": 1 << 10, "m": 1 << 20, "g": 1 << 30}


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


def parse_sizes(text: str) -> list[int]:
    """Token counts such as `4096,64k,1M` (k, M and G are powers of 1024)."""
    sizes = [_size(part, f"{text!r}: {part!r} is no number of tokens; write 4096,64k,1M") for part in text.split(",")]
    if (longest := max(sizes)) > LAST_PLACE + 1:
        raise UserError(f"{text!r}: {longest:,} tokens; places are counted up to {LAST_PLACE:,}")
    return sizes


def parse_bytes(text: str) -> int:
    """A number of bytes such as `512M` or `8G`."""
    return _size(text, f"{text!r} is no number of bytes; write 512M or 8G")


def _size(text: str, problem: str) -> int:
    number, unit = (text[:-1], _UNITS[text[-1].lower()]) if text[-1:].lower() in _UNITS else (text, 1)
    if not number.strip().isdigit() or int(number) == 0:
        raise UserError(problem)
    return int(number) * unit


def table(costs: list[Cost], context: int, dtype: torch.dtype) -> Table:
    """A table for people."""
    name = str(dtype).removeprefix("torch.")
    view = Table(title=f"{context:,} tokens, {name}", title_justify="left")
    view.add_column("part", no_wrap=True)
    for column in ("parts", "parameters", "prefill FLOPs", "FLOPs/token", "bytes/token", "state"):
        view.add_column(column, justify="right", no_wrap=True)
    for cost in costs:
        view.add_row(
            cost.kind,
            str(cost.parts),
            f"{cost.parameters:,}",
            short(cost.prefill_flops),
            short(cost.decode_flops),
            short_bytes(cost.decode_bytes),
            short_bytes(cost.state_bytes),
            style="bold" if cost is costs[-1] else "",
        )
    return view


def show(costs: list[Cost], context: int, dtype: torch.dtype) -> None:
    """Prints the table, never narrower than its figures."""
    Console(width=max(Console().width, 100)).print(table(costs, context, dtype))


def short(number: float) -> str:
    """1.23 T for large numbers."""
    for unit in ("", "k", "M", "G", "T", "P"):
        if abs(number) < 1000:
            return f"{number:.3g} {unit}".strip()
        number /= 1000
    return f"{number:.3g} E"


def short_bytes(number: float) -> str:
    """1.2 GiB for large numbers."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(number) < 1024:
            return f"{number:.4g} {unit}"
        number /= 1024
    return f"{number:.4g} TiB"


def to_json(config: ModelConfig, contexts: list[int], dtype: torch.dtype) -> dict[str, Any]:
    """Everything as plain values."""
    return {
        "layout": config.layout,
        "dtype": str(dtype).removeprefix("torch."),
        "contexts": {str(n): [dataclasses.asdict(cost) for cost in costs_at(config, n, dtype)] for n in contexts},
    }
