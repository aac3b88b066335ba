"""`longwave inspect`: writes the page of one text, and prints a summary."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longwave.cli.options import OfModel, OnDevice, argument, option
from longwave.cli.parser import Verb
from longwave.errors import require
from longwave.units import counted, short

if TYPE_CHECKING:
    from longwave.inspection.agreement import Agreement
    from longwave.inspection.flops import Passage
    from longwave.inspection.inspect import Inspection, Level


@dataclass(frozen=True, kw_only=True)
class Inspect(OnDevice, OfModel):
    """Options of `longwave inspect`."""

    model: str = argument("a model folder")
    text: str | None = argument("a text file, or - for stdin", default=None)
    literal: str | None = option("the text itself, in place of a file", name="--text", metavar="TEXT")
    against: str | None = option("a model with the same tokenizer, to compare attention with", metavar="DIR")
    layers: str | None = option("blocks whose attention to draw, such as 0,5 (a few)")
    heads: str | None = option("heads to draw beside the mean of all, such as 0,3 (the first two)")
    first: int | None = option("the first N tokens of the text alone", metavar="N")
    output: str = option("the page to write", default="inspect.html")


def run(options: Inspect) -> dict[str, Any]:
    """Inspects, writes the page, prints the short form and returns its figures."""
    from longwave import machine
    from longwave.inspection.inspect import Choice, inspect
    from longwave.inspection.source import text_of
    from longwave.reports.inspect import write_inspection

    output = Path(options.output)
    require(output.parent.is_dir(), f"--output {output}: there is no folder {output.parent}")
    require(not output.is_dir(), f"--output {output}: a folder; give the name of a page, such as {output}/inspect.html")
    choice = Choice(_numbers("--layers", options.layers), _numbers("--heads", options.heads), options.against)
    name, text = text_of(options.text, options.literal)
    found = inspect(options.model, name, text, options.first, choice, machine.device_of(options.device))
    write_inspection(found, output, machine.facts(), _command(options))
    print(*_lines(found), sep="\n")
    print(f"{output}: open it in a browser ({output.stat().st_size / 1e6:.1f} MB)")
    return found.plain() | {"page": str(output)}


def _numbers(option: str, text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    parts = [part.strip() for part in text.split(",")]
    for part in parts:
        number = part.isdecimal() and part.isascii() and len(part) < 10
        require(number, f"{option} {text}: {part!r} is no number; write 0,5")
    return tuple(map(int, parts))


def _command(options: Inspect) -> str:
    """The command line that makes the page again."""
    named = {name: getattr(options, name) for name in ("against", "layers", "heads", "first", "output")}
    text = options.text if options.literal is None else f"--text={options.literal}"
    words = ["longwave", "inspect", options.model, str(text)]
    return shlex.join([*words, *(word for name, value in named.items() if value for word in (f"--{name}", str(value)))])


def _lines(found: Inspection) -> Iterator[str]:
    """The short form: levels, cost, and the cheapest and the dearest passage."""
    yield f"{found.source}: {counted(len(found.tokens), 'token')} through {found.layout}"
    for level in found.levels:
        yield from _level_lines(level, found.against)
    spent, dense = float(found.flops.spent.mean()), float(found.flops.dense.mean())
    part = f", {spent / dense:.1%} of the dense model's {short(dense)}" if found.levels else ""
    yield f"cost: {short(spent)} FLOPs per token in the layers{part}"
    for name, passages in (("cheapest", found.cheap), ("dearest", found.dear)):
        yield from (f"{name}: {_passage_words(found, passage)}" for passage in passages[:1])


def _level_lines(level: Level, against: str | None) -> Iterator[str]:
    trace = level.trace
    if level.retention is None:
        yield f"{level.name}: no token got this far"
        return
    sides = {"kept": trace.scores[trace.kept], "dropped": trace.scores[~trace.kept]}
    score = ", ".join(f"{name} {float(side.mean()):+.3f}" for name, side in sides.items() if len(side))
    kept = f"keeps {level.retention:.1%} of {counted(len(trace.kept), 'token')} (target {level.target:.0%})"
    threshold = "" if level.threshold is None else f"; threshold {level.threshold:+.3f}"
    mean = f"mean score {float(trace.scores.mean()):+.3f} ({score}{threshold})"
    yield f"{level.name}: {kept}, {mean}"
    yield f"  with its own attention: {_agreement_words(level.own)}"
    if level.other is not None:
        yield f"  with that of {against}: {_agreement_words(level.other)}"


def _agreement_words(found: Agreement) -> str:
    if found.overlap_nearby is None or found.correlation_nearby is None:
        return found.reason
    overlap, correlation = found.overlap_nearby, found.correlation_nearby
    return (
        f"block {found.depth}, among neighbours {overlap.value:.1%} of the kept are the most attended "
        f"(chance {overlap.chance:.1%}, {overlap.verdict}), rank correlation {correlation.value:+.3f} "
        f"({correlation.verdict})"
    )


def _passage_words(found: Inspection, passage: Passage) -> str:
    text = " ".join("".join(piece.text for piece in found.tokens[passage.start : passage.stop]).split())
    shown = text if len(text) <= 60 else f"{text[:57]}..."
    return f"tokens {passage.start + 1:,} to {passage.stop:,}, {passage.share:.1%} of dense: {shown!r}"


VERB = Verb("inspect", "a page of one text: what is kept, where attention goes, the cost", Inspect, run)
