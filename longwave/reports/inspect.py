"""The page about one text as a model reads it: tokens kept, attention, and cost.

From plain values it makes one self-contained HTML page. The wording of the headline and the notes stands here.
"""

from __future__ import annotations

import base64
import dataclasses
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from longwave import files
from longwave.files.jsonfile import finite
from longwave.inspection.agreement import STRETCH, Agreement
from longwave.inspection.attention import BlockAttention
from longwave.inspection.inspect import Inspection, Level
from longwave.reports.page import Fact, Headline, Kind, PassageToken
from longwave.units import counted, short

_PAGE = Kind("inspect", ("passage", "heatmap"))


def write_inspection(found: Inspection, path: Path, machine: dict[str, str], command: str) -> None:
    """Writes the page to `path`; a reader sees the old page or the whole new one."""
    title = f"{Path(found.source).name or found.source} as {found.model} reads it"
    files.write_file(path, _PAGE.render(title, _payload(found, title, machine, command)).encode())


def _payload(found: Inspection, title: str, machine: dict[str, str], command: str) -> dict[str, Any]:
    report = {
        "title": title,
        "subtitle": f"{counted(len(found.tokens), 'token')}, {found.layout}",
        "created": datetime.now().astimezone().isoformat(timespec="seconds"),
        "notes": _notes(found),
        "run": [Fact(label, value) for label, value in _facts(found).items()],
        "machine": [Fact(label, value) for label, value in machine.items()],
        "command": command,
    }
    costs = {"spent": _short(found.flops.spent), "dense": _short(found.flops.dense), "head": found.flops.head}
    payload = {
        "report": report,
        "headline": [figure._asdict() for figure in _headline(found)],
        "tokens": [
            PassageToken(piece.text, token.kept, [_digits(score) for score in token.scores], piece.label)
            for piece, token in zip(found.tokens, found.traced, strict=True)
        ],
        "levels": [_level(level, found.against) for level in found.levels],
        "blocks": [_block(found, block) for block in found.blocks.values()],
        "costs": costs | {"passages": [[*map(dataclasses.asdict, side)] for side in (found.cheap, found.dear)]},
    }
    return finite(payload)


def _level(level: Level, against: str | None) -> dict[str, Any]:
    return {
        "name": level.name,
        "target": level.target,
        "threshold": level.threshold,
        "entered": len(level.trace.kept),
        "retention": level.retention,
        "comparisons": [
            {"model": name, **dataclasses.asdict(found), **found.statistics()}
            for name, found in (("this model", level.own), (against, level.other))
            if found is not None
        ],
    }


def _block(found: Inspection, block: BlockAttention) -> dict[str, Any]:
    return {
        "depth": block.depth,
        "level": block.level,
        "window": block.window,
        "edges": block.edges,
        "received": _short(block.received),
        "first_share": block.first_share,
        "maps": [{"head": one.head, "cells": _packed(one.cells)} for one in block.maps if block.depth in found.layers],
    }


def _packed(cells: Tensor) -> str:
    """The lower triangle of a map, row by row, as base64 of little-endian fp32; above it no query sees a key."""
    rows = cells.numpy().astype("<f4")
    return base64.b64encode(rows[np.tril_indices(rows.shape[0])].tobytes()).decode()


def _short(values: Tensor) -> list[Any]:
    return [_digits(value) for value in values.tolist()]


def _digits(value: float | None) -> float | int | None:
    """The value rounded to five significant digits, more than the page shows, to keep the page small."""
    if value is None:
        return None
    rounded = float(f"{value:.5g}")
    return int(rounded) if rounded.is_integer() else rounded


# Words ----------------------------------------------------------------------------------------------------------------


def _headline(found: Inspection) -> list[Headline]:
    figures = [_kept_headline(found.levels), _cost_headline(found), *_sink_headline(found)]
    for level in found.levels[:1]:
        figures.append(_agreement_headline("Kept and attended", level.name, level.own))
        if level.other is not None:
            figures.append(_agreement_headline("And in the other model", level.name, level.other))
    return figures


def _kept_headline(levels: list[Level]) -> Headline:
    if not levels:
        return Headline("Kept", "all", "The model has no levels: every token goes through every block.")
    shares = [level.retention for level in levels]
    shown = ", ".join("—" if share is None else f"{share:.0%}" for share in shares)
    targets = ", ".join(f"{level.target:.0%}" for level in levels)
    words = "Share of the tokens reaching" + (" the level" if len(levels) == 1 else " each level") + " that it keeps"
    return Headline("Kept", shown, f"{words}; it was trained to keep {targets}.")


def _cost_headline(found: Inspection) -> Headline:
    spent, dense = float(found.flops.spent.mean()), float(found.flops.dense.mean())
    if not found.levels:
        return Headline("Cost", short(spent), "FLOPs per token in the layers, growing with the text before it.")
    words = f"{short(spent)} FLOPs per token in the layers, {short(dense)} if every block ran on every token."
    return Headline("Cost", f"{spent / dense:.0%} of dense", words)


def _sink_headline(found: Inspection) -> list[Headline]:
    """The share of attention that the first token gets; only for models without levels to compare attention with."""
    if found.levels or not found.blocks:
        return []
    most = max(found.blocks.values(), key=lambda block: block.first_share)
    sentence = f"of the attention of block {most.depth} goes to the first token, the most of the blocks watched."
    return [Headline("First token", f"{most.first_share:.1%}", sentence)]


def _agreement_headline(label: str, level: str, found: Agreement) -> Headline:
    overlap = found.overlap_nearby
    if overlap is None:
        return Headline(label, "—", f"{level}: {found.reason}.".capitalize())
    sentence = (
        f"of what {level} keeps is among the most attended of its neighbourhood in block {found.depth}; chance gives "
        f"{overlap.chance:.0%}, so this is {overlap.verdict}."
    )
    return Headline(label, f"{overlap.value:.0%}", sentence)


def _notes(found: Inspection) -> list[str]:
    attention = [
        "The attention that a token gets (mean of all heads) is given as a multiple of what tokens get on average that "
        "are seen from the same distances. Fewer can see a later token, and most look at what is near: a plain sum "
        "would favour early tokens, a plain mean the last ones. What trends remain along the text do not touch the "
        f"“nearby” figures, which compare a token with those of its own {STRETCH} alone.",
        "The first token is left out of every comparison, since attention that has nowhere to go is put there whatever "
        "it says, and so are the last ones, which too few tokens can see.",
        "Chance is 200 random choices of the same size; a figure inside their 95 % says nothing. Neighbouring "
        "tokens are not independent, so one just outside says little.",
    ]
    cost = (
        "FLOPs are those of matrix products and of attention in the layers, from each block's own formula, as if the "
        f"text were written token by token; reading it at once costs the same. Logits would add "
        f"{short(found.flops.head)} wherever they are needed."
    )
    return [*(attention if found.levels else attention[:1]), cost]


def _facts(found: Inspection) -> dict[str, str]:
    return {
        "text": found.source,
        "model": found.model,
        "layout": found.layout,
        **({"compared with": found.against} if found.against else {}),
        "tokens": f"{len(found.tokens):,}",
        "FLOPs, all tokens": short(float(found.flops.spent.sum())),
        "FLOPs, dense": short(float(found.flops.dense.sum())),
        "attention watched": ", ".join(f"block {depth}" for depth in found.blocks) or "none",
    }
