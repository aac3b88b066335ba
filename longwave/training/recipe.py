"""A recipe: everything one training run needs, in one TOML file.

Precedence: defaults < recipe file < `key.path=value` on the command line. An unknown key is an error.
"""

from __future__ import annotations

import dataclasses
import math
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch

from longwave import recipes, trial
from longwave.checkpoints import load_config
from longwave.config import ModelConfig, Strict, build
from longwave.errors import UserError, cut, require, shown, within
from longwave.extension import FIELDS as EXTENDING
from longwave.extension import extended, extension_notes, require_extension
from longwave.medusa import MedusaConfig
from longwave.model import Decoder
from longwave.training.divergence import weights_of
from longwave.training.freezing import frozen_names, parameters_of
from longwave.training.optimizers import OptimizerConfig, ScaledAdamConfig
from longwave.training.pose import PoseConfig
from longwave.training.schedules import Eden, ScheduleConfig

Overrides = Mapping[str, Any] | Sequence[str]
_LARGEST, _DEEPEST = 1 << 20, 16  # bytes of a recipe file, and tables within tables
_FOLDERS = 100  # that a mix may have
_TOO_DEEP = f"tables nested deeper than {_DEEPEST}; no recipe has such a key"


@dataclass(frozen=True)
class MixedFolder(Strict):
    """One prepared folder of a mix. share: of the training windows; what counts is the ratio of all shares."""

    folder: str
    share: float

    def __post_init__(self) -> None:
        require(0 < self.share < math.inf, f"data.mix.share = {self.share}: a number above 0")


@dataclass(frozen=True)
class DataConfig(Strict):
    """Prepared data: a folder that `longwave prepare` wrote, or several of one tokenizer.

    mix: in place of `folder`, a table `[[data.mix]]` for each of several folders, with its `folder` and `share`. At
        every moment of a run each folder has given its share of the training windows, within one window.
    """

    folder: str = ""
    mix: tuple[MixedFolder, ...] = ()

    def __post_init__(self) -> None:
        require(bool(self.folder or self.mix), "data.folder is missing; give it, or [[data.mix]]")
        require(not (self.folder and self.mix), "data.mix: in place of data.folder; leave one out")
        require(len(self.mix) <= _FOLDERS, f"data.mix: {len(self.mix):,} folders; at most {_FOLDERS}")
        folders = [one.folder for one in self.mix]
        twice = next((folder for folder in folders if folders.count(folder) > 1), None)
        require(twice is None, f"data.mix.folder = {shown(twice)}: named twice; name it once, with all of its share")

    @property
    def folders(self) -> Sequence[MixedFolder]:
        """The folders with their shares: those of the mix, or the one that is all of the data."""
        return self.mix or (MixedFolder(self.folder, 1.0),)


@dataclass(frozen=True)
class TrainingConfig(Strict):
    """Settings of a run.

    window: tokens of a training window. batch_windows: training windows of one step, processed `micro_windows` at a
        time (all at once by default).
    steps: number of optimizer steps. flops: in place of it, the run ends once so many FLOPs are spent, counted at the
        tokens that every level really keeps, and schedules go by the share of them that is spent.
    pose: in a table `[training.pose]`, positions of a longer window than the training window. Held-out text is always
        measured at its ordinary positions.
    start_from: a model folder whose weights to start from, and whose shape `[model]` then need not repeat; random
        weights by default. A longer `context_window`, a `rotary.scaling` and a larger `rotary.base` in `[model]` extend
        it: what a scaling leaves out of `original_window` and `factor` follows from the two windows.
    freeze: patterns over the names of the model's folder, such as `["embed", "blocks.*.mixer.q_proj"]`: parameters
        that stay as they are, to the bit. A pattern after `!` exempts what earlier ones froze. FLOPs are counted as if
        nothing were frozen, and the thresholds of levels, which are no parameters, still follow their scores.
    precision: `bf16` computes in bf16 with weights in fp32. device: `auto`, or a device of torch.
    deterministic: a GPU's kernels add in a fixed order, so that a resumed run is the same to the bit (a CPU's always
        is), for a third to half more time with long training windows.
    recompute: blocks keep only their inputs and run again in the backward pass. compile: whether feed-forwards go
    through
        torch.compile.
    log_every, evaluate_every, checkpoint_every: in steps; 0 means only at the end. evaluate_windows: held-out windows
    of
        one evaluation; 0 for all. keep: number of newest checkpoints kept.
    max_skipped: so many updates in a row that are skipped, since a gradient is not finite, end the run.
    """

    window: int
    batch_windows: int
    steps: int | None = None
    flops: float | None = None
    pose: PoseConfig | None = None
    start_from: str | None = None
    freeze: tuple[str, ...] = ()
    micro_windows: int | None = None
    precision: Literal["fp32", "bf16"] = "fp32"
    device: str = "auto"
    seed: int = 0
    deterministic: bool = False
    recompute: bool = False
    compile: bool = False
    tensorboard: bool = False
    log_every: int = 10
    evaluate_every: int = 0
    evaluate_windows: int = 0
    checkpoint_every: int = 0
    keep: int = 2
    max_skipped: int = 10

    def __post_init__(self) -> None:
        require(
            self.steps is not None or self.flops is not None, "training.steps is missing; give it, or training.flops"
        )
        require(self.steps is None or self.flops is None, "training.flops: in place of training.steps; leave one out")
        for name in ("steps", "flops", "window", "batch_windows", "log_every", "keep", "max_skipped"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"training.{name} = {value}: 1 or more")
        for name in ("evaluate_every", "evaluate_windows", "checkpoint_every"):
            require(getattr(self, name) >= 0, f"training.{name} = {getattr(self, name)}: 0 or more")
        if self.pose is not None:
            longer = f"training.pose.window = {self.pose.window}: at least training.window = {self.window}"
            require(self.pose.window >= self.window, longer)
        micro = self.micro_windows
        fits = micro is None or (micro > 0 and self.batch_windows % micro == 0)
        require(fits, f"training.micro_windows = {micro}: a divisor of training.batch_windows = {self.batch_windows}")


@dataclass(frozen=True)
class Recipe(Strict):
    """Everything about a training run: model, data, training, optimizer and learning-rate schedule.

    medusa: in a table `[medusa]`, heads that learn to draft for the model of `training.start_from`, all of which stays
        as it is; the model itself is trained without it.
    """

    model: ModelConfig
    data: DataConfig
    training: TrainingConfig
    medusa: MedusaConfig | None = None
    optimizer: OptimizerConfig = field(default_factory=ScaledAdamConfig)
    schedule: ScheduleConfig = field(default_factory=Eden)

    def __post_init__(self) -> None:
        fits = self.training.window <= self.model.context_window
        window, most = f"training.window = {self.training.window}", self.model.context_window
        require(fits, f"{window}: at most model.context_window = {most}")
        if (pose := self.training.pose) is not None:
            fits = pose.window <= most
            require(
                fits, f"training.pose.window = {pose.window}: at most model.context_window = {most}; give more there"
            )
        if self.medusa is not None:
            start, freeze = self.training.start_from, self.training.freeze
            require(start is not None, "medusa: heads are trained on a model; give its folder as training.start_from")
            require(
                not freeze, "training.freeze has no effect with [medusa], where all of the model stays; leave it out"
            )
        self.schedule.scale(0, 0, self.steps)  # refuses a warm-up that does not fit the run

    @property
    def steps(self) -> int:
        """Optimizer steps of the run; where it ends by its FLOPs, those that are expected at the nominal retention."""
        run = self.training
        return run.steps if run.steps is not None else math.ceil((run.flops or 0) / self.step_flops)

    @cached_property
    def step_flops(self) -> int:
        """Training FLOPs of one step at the nominal retention, with whole windows as documents."""
        with torch.device("meta"):
            model = Decoder(self.model)
        return self.training.batch_windows * model.training_flops(self.training.window)

    def to_dict(self) -> dict[str, Any]:
        """The recipe as plain values, from which `build` makes an equal one."""
        return dataclasses.asdict(self) | {"model": self.model.to_dict()}


def read_recipe(path: str | Path, overrides: Overrides = ()) -> Recipe:
    """Reads a recipe and applies overrides; a UserError names the file, key and value.

    path: of a TOML file, or the name of a recipe that comes with the package. overrides: `key.path=value` words, or
    values by `key.path`.
    """
    return recipe_of(read_values(path, overrides), str(path))


def recipe_of(values: dict[str, Any], source: str) -> Recipe:
    """The recipe of plain values; a UserError names the source, key and value."""
    recipe = build(Recipe, trial.recipe(values), source)
    with within(source), torch.device("meta"):
        model = Decoder(recipe.model)  # checks what only parts that are put together can
        frozen_names(recipe.training.freeze, parameters_of(weights_of(model)))
        turns = recipe.training.pose is None or any(part.rotation is not None for part in model.parts)
        require(turns, "training.pose has no effect: no part of the model rotates by position; leave it out")
    return recipe


def read_values(path: str | Path, overrides: Overrides = ()) -> dict[str, Any]:
    """The plain values of a TOML file, given by its path or by the name of a recipe, with overrides applied.

    `[model]` is completed from the folder that `training.start_from` names. UserError for a file that is not TOML.
    """
    return _with_start(given_values(path, overrides))


def given_values(path: str | Path, overrides: Overrides = ()) -> dict[str, Any]:
    """The same as they are written. UserError for a file that is not TOML."""
    values = _parsed(path)
    for key, value in _pairs(overrides):
        _override(values, key, value)
    _require_shallow(values, "overrides")
    return values


def _parsed(path: str | Path) -> dict[str, Any]:
    """The tables of a recipe file; UserError for one that is no TOML, or larger or deeper than any recipe."""
    try:
        with recipes.find(path).open("rb") as file:
            raw = file.read(_LARGEST + 1)
        require(len(raw) <= _LARGEST, f"{path}: more than {_LARGEST >> 20} MiB; {_remedy(path)}")
        text = raw.decode("utf-8-sig")
        require(_longest_key(text) <= _DEEPEST, f"{path}: {_TOO_DEEP}")
        values = tomllib.loads(text)
    except OSError as error:
        raise UserError(f"{path}: {(error.strerror or str(error)).lower()}; give a recipe file") from None
    except RecursionError:
        raise UserError(f"{path}: {_TOO_DEEP}") from None
    except UserError:
        raise
    except ValueError as error:  # TOML's own, bytes that are not UTF-8, and numbers of thousands of digits
        raise UserError(f"{path}: not TOML: {cut(str(error))}; {_remedy(path)}") from None
    _require_shallow(values, str(path))
    return values


def _remedy(path: str | Path) -> str:
    """What to give in place of a file that is no recipe."""
    of_model = Path(path).suffix in (".json", ".safetensors")
    return f"give the model's folder, {Path(path).parent}" if of_model else "give a recipe file"


def _require_shallow(values: dict[str, Any], source: str) -> None:
    """Raises UserError for tables within tables beyond what any recipe has, which nothing could walk."""
    level: list[Any] = [values]
    for _ in range(_DEEPEST):
        level = [one for held in level for one in (held.values() if isinstance(held, dict) else held)]
        level = [one for one in level if isinstance(one, dict | list)]
    require(not level, f"{source}: {_TOO_DEEP}")


def _longest_key(text: str) -> int:
    """The number of names in the longest dotted key: `tomllib` takes the square of it in time."""
    longest = run = 1
    for piece in text.split("."):
        run = run + 1 if len(piece.split()) == 1 and not set("=,[]{}#").intersection(piece) else 1
        longest = max(longest, run)
    return longest


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested tables as one table with dotted keys."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        found |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return found


def require_start(model: ModelConfig, start: ModelConfig, folder: str) -> None:
    """Raises UserError where a model's shape differs from the model it starts from.

    Settings of training may differ, and those that make a context window longer (`extension`).
    """
    ours, theirs = (flat(one.completed(model.tables).to_dict()) for one in (model, start))
    free = {f"{name}.{entry}" for name, table in model.tables.items() for entry in table.only_training}
    for name in sorted(ours.keys() - free):
        given, there = ours[name], theirs.get(name)
        has = f"{folder}, from which training.start_from starts, has {there!r}"
        require(given == there or name.startswith(EXTENDING), f"model.{name} = {given!r}: {has}; leave it out")
    require_extension(model, start, f"{folder}, from which training.start_from starts,")


def start_notes(recipe: Recipe) -> list[str]:
    """Lines for people about a model that is extended from the one it starts from."""
    folder = recipe.training.start_from
    return [] if folder is None else list(extension_notes(recipe.model, load_config(folder), folder))


def _with_start(values: dict[str, Any]) -> dict[str, Any]:
    """The values, with the [model] table completed from the folder that `training.start_from` names, if it does."""
    training = values.get("training", {})
    folder = training.get("start_from") if isinstance(training, dict) else None
    if not isinstance(folder, str):
        return values
    over = values.get("model", {})
    return {**values, "model": extended(load_config(folder), over) if isinstance(over, dict) else over}


def _pairs(overrides: Overrides) -> Iterator[tuple[str, Any]]:
    """The key and the value of each override."""
    if isinstance(overrides, Mapping):
        yield from overrides.items()
        return
    for word in [overrides] if isinstance(overrides, str) else overrides:
        key, separator, text = word.partition("=")
        if not separator or not key:
            raise UserError(f"{shown(word)}: an override reads key.path=value")
        yield key, parsed_override(text)


def _override(values: dict[str, Any], key: str, value: Any) -> None:
    *tables, last = key.split(".")
    for name in tables:
        values = values.setdefault(name, {})
        if not isinstance(values, dict):
            raise UserError(f"{shown(key)}: {name} is a value, not a table")
    values[last] = value


def parsed_override(text: str) -> Any:
    """The text as a TOML value; as a string where it is not one, so that strings need no quotes."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except (ValueError, RecursionError):
        return text
