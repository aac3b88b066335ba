"""`longwave bench compare`: has anything become slower?"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from longwave.cli.options import Options, argument, option
from longwave.cli.output import json_line
from longwave.cli.parser import Verb
from longwave.errors import MachineError
from longwave.units import counted


@dataclass(frozen=True, kw_only=True)
class Compare(Options):
    """Options of `longwave bench compare`."""

    before: str = argument("a file that --save wrote")
    after: str = argument("another one, of the same models or ops")
    threshold: float = option("share that counts as slower", default=0.05)


def run(options: Compare) -> dict[str, Any]:
    """Prints the comparison; MachineError, after the table, if the later run is slower."""
    from longwave.benchmarks.results.compare import compare, compared_table, read
    from longwave.benchmarks.results.table import show

    comparison = compare(read(options.before), read(options.after), options.threshold)
    show(*compared_table(comparison))
    plain = dataclasses.asdict(comparison)
    slower = [row for row in comparison.rows if row.verdict == "slower"]
    if slower:
        if options.json:
            print(json_line(plain))
        raise MachineError(f"slower in {options.after}: {len(slower)} of {counted(len(comparison.rows), 'row')}")
    return plain


VERB = Verb("compare", "compare two runs kept by --save; exit code 1 if one is slower", Compare, run)
