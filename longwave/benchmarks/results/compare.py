"""`longwave bench compare`: two saved runs, row by row, to see whether anything has become slower."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rich.console import RenderableType

from longwave.benchmarks.results.results import FORMAT, VERSION
from longwave.benchmarks.results.table import duration, table
from longwave.errors import UserError, require
from longwave.units import counted

_FREE = (
    "contexts",
    "batches",
    "ops",
    "threads",
    "device",
    "repeats",
    "limit",
    "memory",
)  # options that may differ, since rows and hardware are compared by themselves
_FEWEST, _NOTABLE = 3, 0.05  # rounds that a spread takes; relative difference of FLOPs or peaks that is listed

Key = tuple[str, int, int, str]
Verdict = Literal["slower", "faster", "same", "unjudged"]


@dataclass(frozen=True)
class Figure:
    """The seconds of one row in one run, with their spread, the number of rounds, and the row's FLOPs."""

    median: float
    low: float
    high: float
    rounds: int
    flops: float

    def holds(self, seconds: float) -> bool:
        """Whether a time lies within the spread."""
        return self.low <= seconds <= self.high


@dataclass(frozen=True)
class Kept:
    """A run read from a file. rows: by quantity, context, batch and subject (a model, or a form of an op)."""

    path: str
    kind: str
    options: dict[str, Any]
    hardware: dict[str, Any]
    models: dict[str, Any]
    peaks: dict[str, float]
    rows: dict[Key, Figure]


@dataclass(frozen=True)
class Compared:
    """A row that both runs have. ratio: the time after relative to the time before."""

    quantity: str
    context: int
    batch: int
    subject: str
    before: Figure
    after: Figure
    ratio: float
    verdict: Verdict


@dataclass(frozen=True)
class Comparison:
    """The verdicts on two runs. only_before, only_after: rows of one run; differs: other values, by name."""

    before: str
    after: str
    threshold: float
    rows: list[Compared]
    only_before: list[str]
    only_after: list[str]
    differs: dict[str, tuple[Any, Any]]


def read(path: str | Path) -> Kept:
    """Reads a file that `longwave bench ... --save` wrote; UserError for any other file."""
    try:
        plain = json.loads(Path(path).read_bytes())
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; give a file that `longwave bench ... --save` wrote") from None
    except (ValueError, RecursionError):
        plain = None
    if not isinstance(plain, dict) or plain.get("format") != FORMAT:
        raise UserError(f"{path} was not written by longwave bench ... --save")
    version = plain.get("version")
    require(version == VERSION, f"{path} has version {version!r}; this longwave reads version {VERSION}")
    try:
        rows = {_key(row): _figure(row) for row in plain["rows"]}
        options, hardware, models, peaks = (dict(plain[name]) for name in ("options", "hardware", "models", "peaks"))
        kept = Kept(str(path), plain["kind"], options, hardware, models, peaks, rows)
    except (KeyError, TypeError, ValueError, AttributeError):
        raise UserError(f"{path} is damaged: a row or a table of it is not what bench ... --save writes") from None
    most = max((figure.rounds for figure in rows.values()), default=0)
    require(
        most >= _FEWEST,
        f"{path}: {counted(most, 'repeat')}; a verdict needs the spread of {_FEWEST} or more (--repeats)",
    )
    return kept


def _key(row: Mapping[str, Any]) -> Key:
    return str(row["quantity"]), int(row["context"]), int(row["batch"]), str(row["subject"])


def _figure(row: Mapping[str, Any]) -> Figure:
    seconds = row["seconds"]
    median, low, high = (float(seconds[name]) for name in ("median", "low", "high"))
    if not 0 < low <= median <= high:
        raise ValueError
    return Figure(median, low, high, len(seconds["all"]), float(row["work"]["flops"]))


def compare(before: Kept, after: Kept, threshold: float) -> Comparison:
    """Compares the rows that both runs have.

    `slower`: each median lies beyond the other run's spread, and the ratio is more than `threshold` above 1; `faster`
    likewise; `unjudged`: a run has fewer than 3 rounds of the row; else `same`. UserError for runs with different
    models or options.
    """
    require(0 <= threshold < 1, f"threshold = {threshold}: a share, at least 0 and below 1, such as 0.05")
    _check_comparable(before, after)
    common = [key for key in before.rows if key in after.rows]
    rows = [_compared(key, before.rows[key], after.rows[key], threshold) for key in common]
    alone, new = ([_label(key) for key in one.rows if key not in common] for one in (before, after))
    return Comparison(before.path, after.path, threshold, rows, alone, new, dict(_differences(before, after, rows)))


def _check_comparable(before: Kept, after: Kept) -> None:
    both = f"{before.path} and {after.path}"
    require(before.kind == after.kind, f"{both}: one is of bench {before.kind}, the other of bench {after.kind}")
    for name in sorted({*before.options, *after.options} - {*_FREE}):
        mine, other = (one.options.get(name) for one in (before, after))
        require(mine == other, f"{both} are not comparable: {name} = {mine} and {other}")
    for name in [name for name in before.models if name in after.models]:
        mine, other = (one.models[name] for one in (before, after))
        require(mine == other, f"{both} are not comparable: {name} is {_model(mine)} and {_model(other)}")
    have = any(key in after.rows for key in before.rows)
    require(have, f"{both} have no row in common: {_label(next(iter(before.rows)))} is in the first only")


def _model(model: Mapping[str, Any]) -> str:
    return f"{model.get('layout')} of {model.get('parameters'):,} parameters"


def _compared(key: Key, before: Figure, after: Figure, threshold: float) -> Compared:
    ratio = after.median / before.median
    if min(before.rounds, after.rounds) < _FEWEST:
        return Compared(*key, before, after, ratio, "unjudged")
    apart = not before.holds(after.median) and not after.holds(before.median)
    slower, faster = apart and ratio > 1 + threshold, apart and ratio < 1 / (1 + threshold)
    return Compared(*key, before, after, ratio, "slower" if slower else "faster" if faster else "same")


def _differences(before: Kept, after: Kept, rows: list[Compared]) -> Iterator[tuple[str, tuple[Any, Any]]]:
    """Other explanations of a difference: hardware, versions, the machine's measured peaks, and FLOPs of rows."""
    for name in {**before.hardware, **after.hardware}:
        mine, other = before.hardware.get(name), after.hardware.get(name)
        if mine != other:
            yield name, (mine, other)
    for name in {**before.peaks, **after.peaks}:
        mine, other = before.peaks.get(name, 0.0), after.peaks.get(name, 0.0)
        if abs(mine - other) > _NOTABLE * max(mine, other):
            yield f"measured {name}", (f"{mine:.3g}/s", f"{other:.3g}/s")
    for row in rows:
        mine, other = row.before.flops, row.after.flops
        if abs(mine - other) > _NOTABLE * max(mine, other):
            yield f"FLOPs of {_label((row.quantity, row.context, row.batch, row.subject))}", (mine, other)


def _label(key: Key) -> str:
    quantity, context, batch, subject = key
    return f"{quantity}, {counted(context, 'token')}, batch {batch}, {subject}"


def compared_table(comparison: Comparison) -> list[RenderableType]:
    """A table of both times with the verdicts, and a line for everything else that differs."""
    columns = ["quantity", "context", "batch", "subject", "before", "spread", "after", "spread", "ratio", "verdict"]
    lines = [
        [*_place(row), *_cells(row.before), *_cells(row.after), f"{row.ratio:.3f}", row.verdict]
        for row in comparison.rows
    ]
    notes = [f"{name}: {before} before, {after} after" for name, (before, after) in comparison.differs.items()]
    if any(row.verdict == "unjudged" for row in comparison.rows):
        notes.append(f"unjudged: of fewer than {_FEWEST} rounds (--repeats)")
    notes += [f"only in {comparison.before}: {label}" for label in comparison.only_before]
    notes += [f"only in {comparison.after}: {label}" for label in comparison.only_after]
    title = f"{comparison.before} (before) and {comparison.after} (after)"
    return [table(title, columns, lines), "\n".join(notes or ["hardware and versions are the same"])]


def _place(row: Compared) -> list[str]:
    return [row.quantity, f"{row.context:,}", str(row.batch), row.subject]


def _cells(figure: Figure) -> list[str]:
    return [duration(figure.median), f"{duration(figure.low)} - {duration(figure.high)}"]
