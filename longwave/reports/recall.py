"""The page of an evaluation: maps of recall by length and depth, and what else was asked of the model.

From plain values it makes one self-contained HTML page. Of fewer than 100 samples only the interval of a share is told.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from longwave import files
from longwave.errors import require
from longwave.evaluation.ablation import Ablated, Ablation, Turned
from longwave.evaluation.few_shot import FewShot
from longwave.evaluation.outcome import Evaluation, Probes
from longwave.evaluation.recall import Recall, RecallScore
from longwave.files.jsonfile import finite
from longwave.intervals import Interval
from longwave.reports.page import Fact, Headline, Kind
from longwave.units import counted

_PAGE = Kind("recall")
_FEW = 100


def page_to_write(path: str | Path) -> Path:
    """The path of a page. Raises UserError for a folder, and for one in a folder that is not there."""
    page = Path(path)
    require(page.parent.is_dir(), f"page = {page}: there is no folder {page.parent}")
    require(not page.is_dir(), f"page = {page}: a folder; give the name of a page, such as {page}/eval.html")
    return page


def write_evaluation(found: Probes, path: Path, model: str, machine: dict[str, str]) -> None:
    """Writes the page to `path`; a reader sees the old page or the whole new one."""
    title = f"What {model} finds in long texts" if found.recall else f"How {model} does"
    files.write_file(path, _PAGE.render(title, _payload(found, title, model, machine)).encode())


def _payload(found: Probes, title: str, model: str, machine: dict[str, str]) -> dict[str, Any]:
    facts = {"model": model, **found.versions}
    facts |= {f"seed of {one.task}": str(one.seed) for one in found.recall}
    report = {
        "title": title,
        "subtitle": ", ".join(one.task for one in found.recall),
        "created": datetime.now().astimezone().isoformat(timespec="seconds"),
        "notes": _notes(found),
        "run": [Fact(label, value) for label, value in facts.items()],
        "machine": [Fact(label, value) for label, value in machine.items()],
        "command": found.command,
    }
    payload = {
        "report": report,
        "headline": [_headline(one)._asdict() for one in found.recall],
        "families": [_family(one) for one in found.recall],
        "contexts": _contexts(found),
        "labels": [_labels(one) for one in found.tasks],
        "ablation": _ablation(found.ablation),
    }
    return finite(payload)


# Recall ---------------------------------------------------------------------------------------------------------------


def _headline(found: Recall) -> Headline:
    """The score at the longest length."""
    last = max(found.by_length, key=lambda one: one.length)
    sentence = f"of {counted(last.samples, 'sample')} of {last.length:,} tokens were answered right."
    if last.chance >= 0.001:
        sentence += f" A guess is right {last.chance:.1%} of the time."
    return Headline(found.task, f"{_shown(last).removesuffix(' %')} %", f"{sentence} {_range(last)}")


def _family(found: Recall) -> dict[str, Any]:
    depths = list(dict.fromkeys(one.depth for one in found.by_depth))
    rows = [
        {"length": whole.length, "cells": [*map(_cell, _of_length(found.by_depth, whole.length)), _cell(whole)]}
        for whole in found.by_length
    ]
    return {"task": found.task, "depths": depths, "rows": rows}


def _of_length(cells: Sequence[RecallScore], length: int) -> list[RecallScore]:
    return [one for one in cells if one.length == length]


def _cell(found: RecallScore) -> dict[str, Any]:
    depth = "" if found.depth is None else f", {found.depth:.0%} of the text before it"
    words = f"{found.length:,} tokens{depth}: {found.right:,} of {found.samples:,} right. {_range(found)}"
    return {"shown": _shown(found), "accuracy": round(found.accuracy, 4), "words": words}


def _shown(found: RecallScore) -> str:
    """A share in per cent, or the range of one of few samples."""
    low, high = (round(100 * end) for end in found.interval)
    return f"{low}–{high}" if found.samples < _FEW else f"{100 * found.accuracy:.0f} %"  # noqa: RUF001


def _range(found: RecallScore) -> str:
    low, high = found.interval
    return f"The share lies between {low:.1%} and {high:.1%} (95 %)."


# Tables ---------------------------------------------------------------------------------------------------------------


def _contexts(found: Probes) -> list[list[str]]:
    parts = found.by_context if isinstance(found, Evaluation) else ()
    spans = [f"{part.first:,}" if part.first == part.last else f"{part.first:,} to {part.last:,}" for part in parts]
    return [
        [span, f"{part.tokens:,}", f"{part.loss:.4g}", f"{part.perplexity:.4g}"]
        for span, part in zip(spans, parts, strict=True)
    ]


def _labels(found: FewShot) -> list[str]:
    low, high = found.interval
    span = f"{low:.1%} to {high:.1%}"
    right = span if found.rows < _FEW else f"{found.accuracy:.1%} ({span})"
    return [found.task, str(found.shots), f"{found.rows:,}", right, f"{found.chance:.1%}"]


def _ablation(found: Ablation | None) -> dict[str, Any]:
    if found is None:
        return {"words": "", "head": [], "rows": []}
    lossy = found.loss is not None
    head = [*(["loss", "change (95 %)"] if lossy else []), *found.recall, "verdict"]
    whole = [*([f"{found.loss:.4f}", ""] if lossy else []), *(f"{one:,} right" for one in found.recall.values()), ""]
    rows = [["none taken away", *whole], *(_without(one, lossy) for one in found.mixers)]
    words = "The output of one mixer at a time is set to zero. Whatever then stays as it was does not run through it."
    return {"words": words, "head": head, "rows": rows}


def _without(found: Ablated, lossy: bool) -> list[str]:
    losses = [f"{found.loss:.4f}", _change(found.change)] if lossy and found.change is not None else []
    verdict = "changes nothing" if found.changes_nothing else ""
    return [f"{found.mixer} ({found.letter})", *losses, *map(_answers, found.recall), verdict]


def _answers(found: Turned) -> str:
    return f"{found.right:,} of {found.samples:,} right (−{found.lost} +{found.gained})"  # noqa: RUF001


def _change(change: Interval) -> str:
    return f"{change.mean:+.4f}" + ("" if change.low is None else f" ({change.low:+.4f} to {change.high:+.4f})")


def _notes(found: Probes) -> list[str]:
    recall = [
        "A length is that of prompt and answer together, in the model's own tokens, exactly. The depth is the share of "
        "the text that comes before what is asked for.",
        "A sample is right if every answer stands in the first line that the model writes, as a word of its own, and "
        "at most 8 tokens later than it could. Nothing is scored by likelihood.",
    ]
    ablation = (
        "A mixer changes nothing where the loss without it stays within 0.1 %, with all of its interval, and at most "
        "2 % of the answers turn. Where the whole model answers too little right, its recall shows nothing."
    )
    return [*(recall if found.recall else []), *([ablation] if found.ablation else [])]
