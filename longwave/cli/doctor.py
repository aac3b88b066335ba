"""`longwave doctor`: what the machine has, and which form each op runs on it, and why."""

from __future__ import annotations

from longwave.cli.options import Options
from longwave.cli.parser import Verb


def run(options: Options) -> dict[str, str]:
    """Prints one fact a line."""
    found = facts()
    width = max(map(len, found))
    for label, value in found.items():
        print(f"{label:<{width}}  {value}")
    return found


def facts() -> dict[str, str]:
    """Label -> value: the machine, then the ops."""
    from longwave import machine
    from longwave.ops import attention, block_sparse, decay_linear, linear

    ops = {"attention": attention, "block_sparse": block_sparse, "decay_linear": decay_linear, "linear": linear}
    chosen = {f"op {name}": "{} ({})".format(*op.choose()) for name, op in ops.items()}
    return machine.facts() | chosen | {"op cross_entropy": "torch (chunks of rows; the only form)"}


VERB = Verb("doctor", "tell what this machine has and which form each op will run, and why", Options, run)
