"""`conversion.json`: what a conversion is made of, how far it is, and the figures of every stage."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, TypeAdapter, ValidationError

from longwave import files
from longwave.conversion.recipe import ConversionRecipe
from longwave.errors import UserError, require
from longwave.files.jsonfile import to_json
from longwave.training.progress import FREE_TO_CHANGE
from longwave.training.recipe import flat

RECORD, FORMAT = "conversion.json", 1


@dataclass(frozen=True)
class StageRecord:
    """A stage of one student, or the alignment that all share (student "").

    layout: of the model that learns. start, figures: the held-out measure before the first step, and after the last;
    figures are empty while the stage is not finished. teacher: the same measure of the teacher, where it has one.
    tokens, flops: spent. seconds: that passed. curve: the figures at every measure on the way.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    stage: str
    kind: str
    student: str
    layout: str
    start: Mapping[str, Any]
    teacher: Mapping[str, Any] = field(default_factory=dict[str, Any])
    figures: Mapping[str, Any] = field(default_factory=dict[str, Any])
    steps: int = 0
    tokens: int = 0
    flops: int = 0
    seconds: float = 0.0
    curve: Sequence[Mapping[str, Any]] = field(default_factory=list[Mapping[str, Any]])

    @property
    def finished(self) -> bool:
        """Whether the stage is over."""
        return bool(self.figures)


@dataclass(frozen=True)
class StudentRecord:
    """A student. layout: of the finished model. kept: layers with softmax. transfer: how many tensors were copied.

    ranking: all layers, most important first. folder: after which stage and how many tokens its folder was written.
    scaling: the held-out loss with every base of the logit scaling that was tried.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    layout: str
    kept: list[int]
    transfer: Mapping[str, int]
    ranking: list[int]
    folder: str = ""
    scaling: Mapping[str, float] = field(default_factory=dict[str, float])


@dataclass(frozen=True)
class Record:
    """A conversion. source: the model, by what tells it apart. recipe: plain values. selection: what was measured."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    format: int
    source: Mapping[str, Any]
    recipe: Mapping[str, Any]
    machine: Mapping[str, str]
    students: Mapping[str, StudentRecord] = field(default_factory=dict[str, StudentRecord])
    selection: Mapping[str, Any] = field(default_factory=dict[str, Any])
    stages: Sequence[StageRecord] = field(default_factory=list[StageRecord])
    command: str = ""

    def stage(self, name: str, student: str) -> StageRecord | None:
        """A stage of a student, if it has begun."""
        return next((one for one in self.stages if (one.stage, one.student) == (name, student)), None)

    def with_stage(self, stage: StageRecord) -> Record:
        """The record with a stage, in place of what it said of that stage before."""
        key = (stage.stage, stage.student)
        found = {(one.stage, one.student): one for one in self.stages} | {key: stage}
        return dataclasses.replace(self, stages=list(found.values()))

    def write(self, folder: Path) -> None:
        """Writes the file, whole or not at all."""
        text = to_json(_ADAPTER.dump_python(self, mode="json"), indent=1)
        files.write_file(folder / RECORD, f"{text}\n".encode())


_ADAPTER = TypeAdapter(Record)


def read_record(folder: Path) -> Record | None:
    """The record in the folder of a conversion; None where there is none. UserError for a file that is no record."""
    path = folder / RECORD
    if not path.exists():
        return None
    try:
        found = _ADAPTER.validate_json(path.read_bytes())
    except (OSError, ValidationError):
        raise UserError(f"{path}: not what a conversion writes; give another folder") from None
    require(found.format == FORMAT, f"{path}: format = {found.format}: this version reads {FORMAT}")
    return found


def plain_recipe(recipe: ConversionRecipe) -> dict[str, Any]:
    """The recipe as JSON gives it back."""
    return json.loads(json.dumps(dataclasses.asdict(recipe)))


def source_facts(folder: Path) -> dict[str, Any]:
    """What tells a source apart: its name, the checksum of its config, and the sizes of its files of weights."""
    config = (folder / "config.json").read_bytes()
    weights = {path.name: path.stat().st_size for path in sorted(folder.glob("*.safetensors"))}
    return {"name": folder.resolve().name, "config": hashlib.sha256(config).hexdigest()[:16], "weights": weights}


def require_same(record: Record, source: Mapping[str, Any], recipe: Mapping[str, Any], folder: Path) -> None:
    """Raises UserError unless a record is of this source and recipe; stages may have been added to those that began."""
    advice = "give another folder, or the recipe that it was begun with"
    same = {name: record.source.get(name) for name in ("config", "weights")}
    ours = {name: source[name] for name in same}
    require(same == ours, f"{folder}: is a conversion of another source, {record.source.get('name')}; {advice}")
    begun = list(dict.fromkeys(one.stage for one in record.stages))
    values = [_identity(one, begun) for one in (record.recipe, recipe)]
    for name in sorted({*values[0], *values[1]}):
        there, here = (one.get(name) for one in values)
        require(there == here, f"{folder}: a conversion with {name} = {there!r} there, {here!r} here; {advice}")


def _identity(recipe: Mapping[str, Any], begun: list[str]) -> dict[str, Any]:
    """The values by which conversions are told apart: without stages that have not begun, or settings that are free."""
    stages = {name: stage for name, stage in recipe.get("stages", {}).items() if name in begun}
    found = flat({**recipe, "stages": stages, "order": [name for name in recipe.get("stages", {}) if name in begun]})
    return {name: value for name, value in found.items() if not _is_free(name)}


def _is_free(name: str) -> bool:
    tables = name.split(".")
    return len(tables) > 1 and tables[-2] == "training" and tables[-1] in FREE_TO_CHANGE
