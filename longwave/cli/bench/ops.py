"""`longwave bench ops`: every op in each of its forms."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from longwave.cli.bench.measuring import Measuring, chosen, measured
from longwave.cli.options import argument, option
from longwave.cli.parser import Verb


@dataclass(frozen=True, kw_only=True)
class Ops(Measuring):
    """Options of `longwave bench ops`; sizes that are not given are those of the model, if there is one."""

    model: str | None = argument("a recipe or folder whose sizes to take; options go before them", default=None)
    ops: str | None = option("which ops, such as attention; all by default")
    heads: int | None = option("query heads (12)")
    kv_heads: int | None = option("KV heads (4, or as many as --heads)")
    head_size: int | None = option("channels of a head (64)")
    hidden_size: int | None = option("channels of a layer (768)")
    vocab_size: int | None = option("rows of the head (32000)")
    window: int | None = option("a sliding window to time as well")
    blocks: int | None = option("blocks of 64 keys that a query of block_sparse sees (96)")
    forms: str | None = option("which forms; all that there are by default")
    no_backward: bool = option("forward only", default=False)


def run(options: Ops) -> dict[str, Any]:
    """Times the ops, each checked against its reference first."""
    from longwave.benchmarks.ops import OpsOptions, ops_options, run_ops

    values = chosen(options, OpsOptions) | {"backward": not options.no_backward}
    config = ops_options(options.model, values)
    return measured(options, config, lambda: run_ops(config, bool(options.profile)))


VERB = Verb("ops", "time every op in each of its forms, checked against its reference", Ops, run)
