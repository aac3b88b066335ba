"""The result of one run, as `result.json` keeps it: all that a comparison needs to know of it, and no weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from longwave import files
from longwave.comparison.budgets import Budget
from longwave.errors import UserError
from longwave.files.jsonfile import to_json
from longwave.training.clock import Seconds

RESULT, COMPARISON, FORMAT = "result.json", "comparison.json", 1
_MOST_POINTS = 200  # of the training curve


@dataclass(frozen=True)
class Point:
    """A point of a curve, after so many steps, tokens, FLOPs, and seconds of training alone.

    loss: of training, in nats per token. held_out: on held-out text, at some points. retention: of each level there.
    """

    step: int
    tokens: int
    flops: int
    seconds: float
    loss: float | None
    held_out: float | None = None
    retention: tuple[float, ...] = ()


@dataclass(frozen=True)
class Level:
    """What one level of resampling chose at the logged steps of training; shares are of the tokens entering it."""

    target: float
    steps: tuple[int, ...]
    shares: Mapping[str, tuple[float | None, ...]]


@dataclass(frozen=True)
class Result:
    """A finished run.

    setting: the value of the grid, by its key. recipe: its plain values. parameters: weights of the model.
    loss: on all held-out text as the model runs at inference, in nats per token; None where the run diverged.
    bits_per_byte: the same, which can be compared between tokenizers. training_loss: with tokens selected as in
    training, for models that select. retention: of each level on held-out text. tokens, flops: trained on, and spent.
    seconds: that passed. threads: of the processor. data: fingerprint of the tokenizer, and checksum of the data.
    ended: why the run ended early, "" if it did not. folder: where it was read from, which the file does not tell.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    format: int
    model: str
    setting: Mapping[str, Any]
    seed: int
    budget: Budget
    recipe: dict[str, Any]
    layout: str
    parameters: int
    steps: int
    tokens: int
    flops: int
    seconds: Seconds
    threads: int
    loss: float | None
    bits_per_byte: float | None
    training_loss: float | None
    retention: tuple[float, ...]
    curve: Sequence[Point]
    levels: Sequence[Level]
    data: Mapping[str, str]
    machine: Mapping[str, str]
    ended: str = ""
    folder: Annotated[str, Field(exclude=True)] = field(default="", compare=False)

    def words(self) -> str:
        """The run for people."""
        setting = "".join(f", {key} = {value}" for key, value in self.setting.items())
        return f"{self.model}{setting}, seed {self.seed}, {self.budget.words()}"


_ADAPTER = TypeAdapter(Result)


def read_result(path: Path) -> Result:
    """A result from its file, or from the folder of its run. UserError for a file that is none."""
    file = path / RESULT if path.is_dir() else path
    try:
        found = _ADAPTER.validate_json(file.read_bytes())
    except OSError as error:
        raise UserError(f"{path}: {(error.strerror or str(error)).lower()}; give a {RESULT} of a comparison") from None
    except ValidationError as error:
        fault = error.errors()[0]
        where = ".".join(str(part) for part in fault["loc"]) or "content"
        raise UserError(f"{file}: no result of a run ({where}: {fault['msg']})") from None
    if found.format != FORMAT:
        raise UserError(f"{file}: format = {found.format}: this version reads {FORMAT}")
    return replace(found, folder=str(file.parent))


def write_result(result: Result, folder: Path) -> None:
    """Writes `result.json`, whole or not at all."""
    files.write_file(folder / RESULT, (to_json(_ADAPTER.dump_python(result, mode="json"), indent=1) + "\n").encode())


def curve_of(entries: Sequence[Mapping[str, Any]]) -> list[Point]:
    """The points of a run's log: all evaluations, and of the others as many as a chart can show."""
    every = -(-len(entries) // _MOST_POINTS)
    return [_point(entry) for number, entry in enumerate(entries) if number % every == 0 or "held_out_loss" in entry]


def _point(entry: Mapping[str, Any]) -> Point:
    return Point(
        entry["step"],
        entry["tokens"],
        entry.get("flops", 0),
        entry.get("training_seconds", entry.get("seconds", 0.0)),
        entry.get("loss"),
        entry.get("held_out_loss"),
        tuple(entry.get("retention", ())),
    )


def levels_of(entries: Sequence[Mapping[str, Any]], targets: Sequence[float]) -> list[Level]:
    """The choices of every level that a run's log tells of."""
    watched = [entry for entry in entries if "positive" in entry]
    names = ("positive", "live", "false_keep", "false_drop")
    steps = tuple(entry["step"] for entry in watched)
    return [
        Level(target, steps, {name: tuple(entry[name][index] for entry in watched if name in entry) for name in names})
        for index, target in enumerate(targets)
    ]
