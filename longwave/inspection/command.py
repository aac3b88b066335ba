"""`longwave inspect`: writes the page of one text, and prints a summary."""

from __future__ import annotations

import argparse
import dataclasses
import shlex
from pathlib import Path
from typing import Any

from longwave import doctor
from longwave.device import device_of
from longwave.errors import require
from longwave.inspection.agreement import Agreement
from longwave.inspection.flops import Passage
from longwave.inspection.inspect import Choice, Inspection, Level, inspect
from longwave.inspection.source import read_text
from longwave.plan import short
from longwave.reports.inspect import write_inspection
from longwave.reports.page import finite


def inspect_command(options: argparse.Namespace) -> dict[str, Any]:
    """Inspects, writes the page, prints the short form and returns its figures."""
    output = Path(options.output)
    require(output.parent.is_dir(), f"--output {output}: there is no folder {output.parent}")
    require(not output.is_dir(), f"--output {output}: a folder; give the name of a page, such as {output}/inspect.html")
    choice = Choice(_numbers("--layers", options.layers), _numbers("--heads", options.heads), options.against)
    name, text = read_text(options.text, options.literal)
    found = inspect(options.model, name, text, options.first, choice, device_of(options.device))
    machine = {label: value for label, value in doctor.facts().items() if not label.startswith("op ")}
    write_inspection(found, output, machine, _command(options))
    for line in _lines(found):
        print(line)
    print(f"{output}: open it in a browser ({output.stat().st_size / 1e6:.1f} MB)")
    return finite(_figures(found)) | {"page": str(output)}


def _numbers(option: str, text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    parts = [part.strip() for part in text.split(",")]
    for part in parts:
        require(part.isdecimal() and part.isascii(), f"{option} {text}: {part!r} is no number; write 0,5")
    return tuple(map(int, parts))


def _command(options: argparse.Namespace) -> str:
    """The command line that makes the page again."""
    named = {name: getattr(options, name) for name in ("against", "layers", "heads", "first", "output")}
    text = options.text if options.literal is None else f"--text={options.literal}"
    words = ["longwave", "inspect", options.model, text]
    return shlex.join([*words, *(word for name, value in named.items() if value for word in (f"--{name}", str(value)))])


# The short form -------------------------------------------------------------------------------------------------------


def _lines(found: Inspection) -> list[str]:
    lines = [f"{found.source}: {len(found.tokens):,} tokens through {found.layout}"]
    for level in found.levels:
        lines += _level_lines(level, found.against)
    spent, dense = float(found.flops.spent.mean()), float(found.flops.dense.mean())
    part = f", {spent / dense:.1%} of the dense model's {short(dense)}" if found.levels else ""
    lines.append(f"cost: {short(spent)} FLOPs per token in the layers{part}")
    for name, passages in (("cheapest", found.cheap), ("dearest", found.dear)):
        lines += [f"{name}: {_passage_words(found, one)}" for one in passages[:1]]
    return lines


def _level_lines(level: Level, against: str | None) -> list[str]:
    trace = level.trace
    if level.retention is None:
        return [f"{level.name}: no token got this far"]
    sides = {"kept": trace.scores[trace.kept], "dropped": trace.scores[~trace.kept]}
    score = ", ".join(f"{name} {float(side.mean()):+.3f}" for name, side in sides.items() if len(side))
    kept = f"keeps {level.retention:.1%} of {len(trace.kept):,} tokens (target {level.target:.0%})"
    mean = f"mean score {float(trace.scores.mean()):+.3f} ({score}; threshold {level.threshold:+.3f})"
    lines = [f"{level.name}: {kept}, {mean}"]
    lines.append(f"  with its own attention: {_agreement_words(level.own)}")
    if level.other is not None:
        lines.append(f"  with that of {against}: {_agreement_words(level.other)}")
    return lines


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


def _figures(found: Inspection) -> dict[str, Any]:
    """The figures as plain values."""
    return {
        "tokens": len(found.tokens),
        "flops": float(found.flops.spent.sum()),
        "dense_flops": float(found.flops.dense.sum()),
        "levels": [_level_figures(level) for level in found.levels],
        "cheapest": [dataclasses.asdict(passage) for passage in found.cheap],
        "dearest": [dataclasses.asdict(passage) for passage in found.dear],
    }


def _level_figures(level: Level) -> dict[str, Any]:
    scores = level.trace.scores
    return {
        "entered": len(level.trace.kept),
        "kept": int(level.trace.kept.sum()),
        "target": level.target,
        "mean_score": float(scores.mean()) if len(scores) else None,
        "own": _agreement_figures(level.own),
        "other": level.other and _agreement_figures(level.other),
    }


def _agreement_figures(found: Agreement) -> dict[str, Any]:
    return {"block": found.depth, "compared": found.compared, "reason": found.reason, **found.statistics()}
