"""The page of a conversion: every stage with the figures it reached, in one self-contained `report.html`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from longwave import files
from longwave.conversion.record import Record, StageRecord
from longwave.files.jsonfile import finite
from longwave.reports.page import Fact, Headline, Kind
from longwave.units import counted, short

_PAGE = Kind("conversion")
_LOSS, _APART = "held_out_loss", "held_out_kl"
_CURVES = {_APART: ("KL", "from the teacher, nats per token"), _LOSS: ("Held-out loss", "nats per token")}
_HOW = ("copied", "repeated", "new", "left out")


def write_conversion(found: Record, path: Path) -> None:
    """Writes the page to `path`; a reader sees the old page or the whole new one."""
    title = f"longwave convert {found.source['name']}"
    files.write_file(path, _PAGE.render(title, _payload(found, title)).encode())


def _payload(found: Record, title: str) -> dict[str, Any]:
    report = {
        "title": title,
        "subtitle": ", ".join(dict.fromkeys(one.layout for one in found.students.values())),
        "created": datetime.now().astimezone().isoformat(timespec="seconds"),
        "notes": list(_notes(found)),
        "run": [Fact(label, value) for label, value in _facts(found).items()],
        "machine": [Fact(label, value) for label, value in found.machine.items()],
        "command": found.command,
    }
    payload = {
        "report": report,
        "headline": [one._asdict() for one in _headlines(found)],
        "stages": {"head": _STAGE_HEAD, "rows": [_stage(one) for one in found.stages]},
        "layers": {"points": _fits(found)},
        "selection": _selection(found),
        "learning": [chart for name in _CURVES if (chart := _chart(found, name))["series"]],
        "tensors": {"head": ["student", *_HOW], "rows": list(_tensors(found))},
    }
    return finite(payload)


def _headlines(found: Record) -> Iterator[Headline]:
    """For every student its last loss and how it stands to the teacher's."""
    for name in found.students:
        stages = [one for one in found.stages if one.student == name and one.finished and _LOSS in one.figures]
        if not stages:
            continue
        last = stages[-1]
        loss, theirs = last.figures[_LOSS], last.teacher.get(_LOSS)
        spent = sum(one.tokens for one in found.stages if one.student in ("", name))
        words = f"after {short(spent)} tokens of conversion"
        words += "." if theirs is None else f"; the teacher has {theirs:.4f}."
        yield Headline("held-out loss", f"{loss:.4f}", words, about=name if len(found.students) > 1 else "")


_STAGE_HEAD = ["stage", "student", "model", "tokens", "minutes", "begins at", "ends at", "KL", "teacher"]


def _stage(one: StageRecord) -> list[str]:
    spent = [short(one.tokens), f"{one.seconds / 60:.1f}"] if one.finished else ["begun", ""]
    losses = [_number(one.start, _LOSS), _number(one.figures, _LOSS), _number(one.figures, _APART)]
    return [one.stage, one.student or "all", one.layout, *spent, *losses, _number(one.teacher, _LOSS)]


def _number(figures: Mapping[str, Any], name: str) -> str:
    value = figures.get(name)
    return "—" if value is None else f"{value:.4f}"


def _fits(found: Record) -> list[list[float]]:
    """Layer and R2 of every aligned layer."""
    stage = next((one for one in found.stages if one.kind == "align" and one.finished), None)
    if stage is None:
        return []
    return [[layer, fit] for layer, fit in enumerate(stage.figures.get("r2", ()))]


def _selection(found: Record) -> dict[str, Any]:
    """Which layers each student keeps, beside what was measured of every layer."""
    names = list(found.students)
    layers = len(found.students[names[0]].ranking) if names else 0
    measured: Mapping[str, Sequence[float]] = found.selection.get("layers", {})
    rows = [
        [str(layer), *(_cell(one[layer]) for one in measured.values()), *(_kept(found, one, layer) for one in names)]
        for layer in range(layers)
    ]
    correlations: Mapping[str, Mapping[str, float]] = found.selection.get("agreement", {})
    agreement = [[rule, *(f"{value:.2f}" for value in row.values())] for rule, row in correlations.items()]
    words = "Layers are numbered from 0. " + found.selection.get("words", "")
    return {
        "words": words,
        "layers": {"head": ["layer", *measured, *names], "rows": rows},
        "agreement": {"head": ["rank correlation", *correlations], "rows": agreement},
    }


def _cell(value: float | None) -> str:
    return "—" if value is None else f"{value:.4g}"


def _kept(found: Record, student: str, layer: int) -> str:
    return "softmax" if layer in found.students[student].kept else "linear"


def _chart(found: Record, figure: str) -> dict[str, Any]:
    """The curves of a figure over the tokens of a student's stages, one after the other."""
    title, note = _CURVES[figure]
    series = [{"name": name, "points": points} for name in found.students if (points := _curve(found, name, figure))]
    if figure == _LOSS and series:
        teacher = next((one.teacher.get(_LOSS) for one in reversed(found.stages) if one.teacher), None)
        ends = [point[0] for one in series for point in one["points"]]
        if teacher is not None:
            series.append({"name": "teacher", "points": [[min(ends), teacher], [max(ends), teacher]]})
    return {"title": title, "note": note, "series": series}


def _curve(found: Record, student: str, figure: str) -> list[list[float]]:
    points, before = list[list[float]](), 0
    for one in found.stages:
        if one.student != student:
            continue
        if one.start.get(figure) is not None:
            points.append([before, one.start[figure]])
        points += [[before + entry["tokens"], entry[figure]] for entry in one.curve if entry.get(figure) is not None]
        before += one.tokens
    return points


def _tensors(found: Record) -> Iterator[list[str]]:
    for name, student in found.students.items():
        yield [name, *(str(student.transfer.get(how, 0)) for how in _HOW)]


def _facts(found: Record) -> dict[str, str]:
    spent = sum(one.tokens for one in found.stages)
    return {
        "source": str(found.source["name"]),
        "tokens": f"{short(spent)} in all stages",
        "FLOPs": short(sum(one.flops for one in found.stages)),
        "time": f"{sum(one.seconds for one in found.stages) / 60:.1f} min",
        **{f"softmax in {name}": ", ".join(map(str, one.kept)) or "none" for name, one in found.students.items()},
    }


def _notes(found: Record) -> Iterator[str]:
    yield (
        "A loss near the teacher's does not say that recall is: measure it with longwave eval --tasks, by generation, "
        "and take each mixer away with --ablate."
    )
    unfinished = [one for one in found.stages if not one.finished]
    if unfinished:
        yield f"{counted(len(unfinished), 'stage')} of this conversion have begun and are not finished."
