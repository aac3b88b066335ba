"""`longwave plan`: what a model takes, in a table per context."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from longwave.cli.options import Options, argument, option
from longwave.cli.parser import Verb
from longwave.units import parse_sizes, short, short_bytes

if TYPE_CHECKING:
    from longwave.costs import Cost

_COLUMNS = ("parts", "parameters", "prefill FLOPs", "FLOPs/token", "bytes/token", "state")


@dataclass(frozen=True, kw_only=True)
class Plan(Options):
    """Options of `longwave plan`."""

    model: str = argument("a recipe, or a folder of which only config.json need exist")
    context: str = option("token counts, such as 4096,1M", default="4096")
    dtype: Literal["fp32", "bf16", "fp16"] = option("of weights and activations", default="bf16")


def run(options: Plan) -> dict[str, Any]:
    """Prints the costs of each kind of part and their total, at every context."""
    from longwave import plan
    from longwave.machine import dtype_of

    config, contexts, dtype = plan.model_config(options.model), parse_sizes(options.context), dtype_of(options.dtype)
    tables = {context: plan.costs_at(config, context, dtype) for context in contexts}  # which may refuse the config
    print(f"{config.layout}  (hidden {config.hidden_size}, vocabulary {config.vocab_size:,})")
    for context, costs in tables.items():
        _show(f"{context:,} tokens, {str(dtype).removeprefix('torch.')}", costs)
    return plan.to_json(config, contexts, dtype)


def _show(title: str, costs: Sequence[Cost]) -> None:
    """Prints a table, the total in bold and last, never narrower than its figures."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    table.add_column("part", no_wrap=True)
    for column in _COLUMNS:
        table.add_column(column, justify="right", no_wrap=True)
    for cost in costs:
        table.add_row(*_cells(cost), style="bold" if cost is costs[-1] else "")
    Console(width=max(Console().width, 100)).print(table)


def _cells(cost: Cost) -> list[str]:
    flops, traffic = (cost.prefill_flops, cost.decode_flops), (cost.decode_bytes, cost.state_bytes)
    return [cost.kind, str(cost.parts), f"{cost.parameters:,}", *map(short, flops), *map(short_bytes, traffic)]


VERB = Verb("plan", "parameters, FLOPs and state bytes, before they are paid", Plan, run)
