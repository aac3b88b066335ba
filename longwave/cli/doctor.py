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
    from longwave import machine, ops

    return machine.facts() | {f"op {name}": form for name, form in ops.forms_here().items()}


VERB = Verb("doctor", "tell what this machine has and which form each op will run, and why", Options, run)
