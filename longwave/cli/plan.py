"""`longwave plan`: what a model takes, in a table per context."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from longwave.cli.options import OfModel, argument, option
from longwave.cli.parser import Verb
from longwave.units import counted, short, short_bytes

if TYPE_CHECKING:
    from longwave.costs import Cost
    from longwave.planning import Plan as Planned

_COLUMNS = ("parts", "parameters", "prefill FLOPs", "FLOPs/token", "bytes/token", "state")


@dataclass(frozen=True, kw_only=True)
class Plan(OfModel):
    """Options of `longwave plan`."""

    model: str = argument("a recipe, or a folder of which only config.json need exist")
    context: str = option("token counts, such as 4096,1M", default="4096")
    dtype: Literal["fp32", "bf16", "fp16", "fp64"] = option("of weights and activations", default="bf16")


def run(options: Plan) -> Planned:
    """Prints the costs of each kind of part and their total, at every context."""
    from longwave.verbs import plan

    planned = plan(**options.keywords())
    print(f"{planned.layout}  (hidden {planned.hidden_size}, vocabulary {planned.vocab_size:,})")
    for context, costs in planned.contexts.items():
        _show(f"{counted(context, 'token')}, {planned.dtype}", costs)
    return planned


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
