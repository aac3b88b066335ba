"""The recipe of a conversion: what a pretrained model becomes, which layers keep softmax, and the stages in between.

Tables `[model]`, `[data]`, `[training]`, `[optimizer]` and `[schedule]` are those of a training recipe and hold for all
stages; a stage has tables of the same names for what is its own. Tables of `[model]` add to the source's.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import Discriminator

from longwave import trial
from longwave.config import ModelConfig, Strict, build
from longwave.conversion.align import Error
from longwave.conversion.distil import Direction, Rows
from longwave.errors import UserError, require, shown, within
from longwave.training.recipe import Overrides, Recipe, given_values

Rule = Literal["halo", "halo_corrected", "jet_nemotron", "kl", "even", "last", "list"]
KINDS = ("align", "distil", "train", "sft")
ALONE = "student"  # the name of the student of a conversion that makes one
_TABLES = ("data", "training", "optimizer", "schedule")
_MOST = 100  # stages, and students
Table = Mapping[str, Any]
_Known = TypeVar("_Known")


def _no_values() -> dict[str, Any]:
    return {}


@dataclass(frozen=True)
class SelectConfig(Strict):
    """Which layers keep softmax attention.

    rule: `even` distances, the `last` ones, a `list`, or by measurement: `halo` as published, `halo_corrected`,
        `jet_nemotron` (`conversion.selection`), `kl` for the layers whose return brings the student nearest to its
        teacher, one after the other.
    keep: number of layers; a quarter by default. layers: of the list. pinned: layers that stay in any case, numbered
        from 0, negative ones from the end: `[0, -1]` as MiniCPM-SALA does.
    """

    rule: Rule = "even"
    keep: int | None = None
    layers: tuple[int, ...] = ()
    pinned: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        listed = self.rule == "list"
        require(listed or not self.layers, f"select.layers: has no effect with rule = {self.rule!r}; leave it out")
        require(not listed or self.keep in (None, len(self.layers)), f"select.keep = {self.keep}: the list says it")
        require(not listed or not self.pinned, "select.pinned: the list says it; leave it out")

    @property
    def measures(self) -> bool:
        """Whether the rule needs measurements."""
        return self.rule not in ("even", "last", "list")


@dataclass(frozen=True)
class StudentConfig(Strict):
    """What the source becomes.

    softmax: the letter of the layers that keep softmax attention; by default they stay as they are. With `S` and a
        table `[model.infllm]` they lose their rotation and get a gate, as in MiniCPM-SALA and HypeNet.
    linear: the letter of all others.
    layout: the source's layout with brackets around some of its blocks, such as `"2F subllm(0.64: 4F) 2F"`.
    gate: how gates that the source does not have begin: `open`, which changes nothing, or `random` as published.
    sort_heads: whether heads are dealt to decays by how far back they look (`conversion.heads`).
    levels: how levels that the source does not have begin: `placed` by a little text, so that they break little, or
        `new` as in a model that is trained from the start (`conversion.insertion`).
    select: which layers keep softmax.
    """

    softmax: str | None = None
    linear: str = "L"
    layout: str | None = None
    gate: Literal["open", "random"] = "open"
    sort_heads: bool = False
    levels: Literal["placed", "new"] = "placed"
    select: SelectConfig = SelectConfig()


@dataclass(frozen=True)
class MeasureConfig(Strict):
    """The measurements by which layers are selected.

    recall: tasks of `longwave eval`, answered by generation. length: their tokens; the window of the align stage by
        default. samples: of each task. sense: tasks of lm-eval; the share of right next tokens in held-out text by
        default. windows: held-out windows. seed: of the samples. least_recall: of the teacher, below which a line says
        that there is little to lose.
    """

    recall: tuple[str, ...] = ("single", "key-value")
    length: int | None = None
    samples: int = 200
    sense: tuple[str, ...] = ()
    windows: int = 64
    seed: int = 0
    least_recall: float = 0.5

    def __post_init__(self) -> None:
        for name in ("samples", "windows", "length"):
            value = getattr(self, name)
            require(value is None or value > 0, f"measure.{name} = {value}: 1 or more")


@dataclass(frozen=True)
class ScalingConfig(Strict):
    """HypeNet's factor log_a(position + a) of queries, fitted once all stages are over (arXiv 2601.22156).

    window: tokens of the held-out windows on which the base a with the lowest loss is found, several times those of
    the training. bases: that are tried, beside no factor at all. windows: held-out windows.
    """

    window: int
    bases: tuple[float, ...] = (100, 200, 362, 500, 600, 900, 1500, 3000)
    windows: int = 16

    def __post_init__(self) -> None:
        for name in ("window", "windows"):
            require(getattr(self, name) > 0, f"logit_scaling.{name} = {getattr(self, name)}: 1 or more")
        require(all(base > 1 for base in self.bases), f"logit_scaling.bases = {self.bases}: numbers above 1")


@dataclass(frozen=True)
class WrittenConfig(Strict):
    """Text that the source itself writes, in place of prepared data: where none of its own is at hand.

    tokens: in all. length: of a text, in tokens. prompts: with which texts begin, in turn; by default with nothing but
    the token that begins a text. temperature, top_p: of the draws. held_out: share of the texts kept from training.
    """

    tokens: float
    length: int = 512
    prompts: tuple[str, ...] = ("",)
    temperature: float = 1.0
    top_p: float = 1.0
    held_out: float = 0.05
    seed: int = 0

    def __post_init__(self) -> None:
        require(self.length > 1, f"written.length = {self.length}: 2 or more")
        require(0 < self.tokens < 1e12, f"written.tokens = {self.tokens}: more than 0")
        require(bool(self.prompts), "written.prompts: give one or more")


@dataclass(frozen=True, kw_only=True)
class _Stage(Strict):
    """The keys of every stage.

    tokens: in place of `training.steps`, rounded to whole steps. students: those that take part; all by default.
    """

    tokens: float | None = None
    students: tuple[str, ...] = ()
    model: Table = field(default_factory=_no_values)
    data: Table = field(default_factory=_no_values)
    training: Table = field(default_factory=_no_values)
    optimizer: Table = field(default_factory=_no_values)
    schedule: Table = field(default_factory=_no_values)

    def __post_init__(self) -> None:
        require(self.tokens is None or self.tokens > 0, f"tokens = {self.tokens}: more than 0")
        for name in ("start_from", "flops"):
            require(name not in self.training, f"training.{name}: is not for stages of a conversion; leave it out")


@dataclass(frozen=True, kw_only=True)
class AlignStage(_Stage):
    """Linear mixers learn the outputs of the softmax layers that they may replace (`conversion.align`)."""

    kind: Literal["align"] = "align"
    error: Error = "mse"


@dataclass(frozen=True, kw_only=True)
class _OfStudents(_Stage):
    """The keys of stages in which whole students learn.

    share: of the layers to be converted, those that are by this stage, the least important ones first.
    """

    share: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 <= self.share <= 1, f"share = {self.share}: from 0 to 1")


@dataclass(frozen=True, kw_only=True)
class DistilStage(_OfStudents):
    """Students learn their teacher's distribution of the next token (`conversion.distil`)."""

    kind: Literal["distil"] = "distil"
    direction: Direction = "forward"
    rows: Rows = "all"
    hidden: float = 0.0


@dataclass(frozen=True, kw_only=True)
class TrainStage(_OfStudents):
    """Students learn the next token, without the teacher."""

    kind: Literal["train"] = "train"


@dataclass(frozen=True, kw_only=True)
class SftStage(_OfStudents):
    """Students learn from conversations or instructions.

    Unless `training.freeze` says otherwise, the projections of queries and keys of the layers that keep softmax stay
    as they are: fine-tuning them after a conversion takes recall away (arXiv 2606.11052).
    """

    kind: Literal["sft"] = "sft"


Stage = AlignStage | DistilStage | TrainStage | SftStage


@dataclass(frozen=True)
class ConversionRecipe(Strict):
    """Everything about a conversion but its source and its destination.

    student: what is made. students: several, by name, each with the keys in which it differs from `student`.
    stages: by name, in order; `kind` may be left out where the name is one.
    source_tokens: that the source was trained with, where a plan is to say the share of them that is spent.
    written: text that the source writes, which then stands for `[data]`. logit_scaling: fitted in the end.
    format: of the folders of the finished students.
    """

    student: StudentConfig = StudentConfig()
    students: Mapping[str, Table] = field(default_factory=dict[str, Table])
    measure: MeasureConfig = MeasureConfig()
    stages: Mapping[str, Annotated[Stage, Discriminator("kind")]] = field(default_factory=dict[str, Stage])
    model: Table = field(default_factory=_no_values)
    data: Table = field(default_factory=_no_values)
    training: Table = field(default_factory=_no_values)
    optimizer: Table = field(default_factory=_no_values)
    schedule: Table = field(default_factory=_no_values)
    source_tokens: float | None = None
    written: WrittenConfig | None = None
    logit_scaling: ScalingConfig | None = None
    format: str = "longwave"

    def __post_init__(self) -> None:
        both = self.written is not None and bool(self.data)
        require(not both, "data: is what the source writes; leave out [data], or [written]")
        require(len(self.stages) <= _MOST and len(self.students) <= _MOST, f"more than {_MOST} stages or students")
        require(ALONE not in self.students, f"students.{ALONE}: is what one alone is called; choose another name")
        for name in (*self.stages, *self.students):
            legal = name.replace("-", "").replace("_", "").isalnum() and name.isascii()
            require(legal and len(name) <= 64, f"{shown(name)}: a name of letters, digits, - and _, for a folder")
        kinds = [stage.kind for stage in self.stages.values()]
        first = next((at for at, kind in enumerate(kinds) if kind != "align"), len(kinds))
        require("align" not in kinds[first:], "stages: align comes before the students' stages; put it first")
        for name in self.stages:
            taking = set(self.stages[name].students) - set(self.named)
            require(not taking, f"stages.{name}.students = {shown(sorted(taking))}: students: {', '.join(self.named)}")

    @property
    def named(self) -> dict[str, StudentConfig]:
        """Every student by its name."""
        return {name: self._student(name) for name in self.students} or {ALONE: self.student}

    @property
    def aligning(self) -> dict[str, AlignStage]:
        """The stages in which layers are aligned, by name."""
        return {name: stage for name, stage in self.stages.items() if isinstance(stage, AlignStage)}

    def stages_of(self, student: str) -> dict[str, DistilStage | TrainStage | SftStage]:
        """The stages through which a student goes, by name."""
        found = ((name, one) for name, one in self.stages.items() if not isinstance(one, AlignStage))
        return {name: one for name, one in found if student in (one.students or (student,))}

    def _student(self, name: str) -> StudentConfig:
        base = {one: getattr(self.student, one) for one in StudentConfig.__dataclass_fields__}
        base["select"] = vars(self.student.select)
        own = dict(self.students[name])
        if isinstance(own.get("select"), Mapping) and "rule" in own["select"]:
            common = () if own["select"]["rule"] == "list" else ("keep", "pinned")
            base["select"] = {one: getattr(self.student.select, one) for one in common}
        return build(StudentConfig, merged(base, own), f"students.{name}")


def read_conversion(path: str | Path, overrides: Overrides = ()) -> ConversionRecipe:
    """The recipe in a file, or one that comes with the package, with overrides; a UserError names key and value."""
    values = given_values(path, overrides)
    require("stages" in values or "student" in values or "students" in values, _no_conversion(path))
    for name, stage in values.get("stages", {}).items() if isinstance(values.get("stages"), dict) else ():
        if isinstance(stage, dict) and name in KINDS:
            stage.setdefault("kind", name)
    recipe = build(ConversionRecipe, values, str(path))
    with within(path):
        assert recipe.named
    return recipe


def _no_conversion(path: str | Path) -> str:
    return f"{path}: no [student] and no [stages]; give the recipe of a conversion (longwave convert --help)"


# The recipes of stages ------------------------------------------------------------------------------------------------


def stage_recipe(whole: ConversionRecipe, name: str, model: ModelConfig) -> Recipe:
    """The training recipe of a stage for a model of this config. UserError for what does not fit."""
    stage = whole.stages[name]
    values: dict[str, Any] = {table: _joined(table, whole, stage) for table in _TABLES}
    values = {table: found for table, found in values.items() if found} | {"model": model.to_dict()}
    source = f"stages.{name}"
    require("data" in values, f"{source}: no data; give [data] folder, or [[data.mix]]")
    if stage.tokens is not None:
        values["training"] = dict(values.get("training", {})) | {"steps": _steps(stage, values, source)}
    return build(Recipe, trial.recipe(values), source)


def tables_for(whole: ConversionRecipe, student: str, until: str) -> Iterator[Table]:
    """The tables of the model that hold for a student in a stage: those for all, and its stages' up to this one."""
    yield whole.model
    for name, stage in whole.stages_of(student).items():
        yield stage.model
        if name == until:
            return


def merged(base: Any, over: Any) -> Any:
    """Nested tables with the values of `over` in place of those of `base`; of another kind, all of them."""
    if not (isinstance(base, Mapping) and isinstance(over, Mapping)):
        return copy.deepcopy(over)
    if over.get("kind", base.get("kind")) != base.get("kind"):
        return copy.deepcopy(dict(over))
    return {**base, **{name: merged(base.get(name), value) for name, value in over.items()}}


def _joined(table: str, whole: ConversionRecipe, stage: Stage) -> Table:
    """A table for a stage: its own data alone, if it names any; of the others its own values over those for all."""
    shared, own = getattr(whole, table), getattr(stage, table)
    return own or shared if table == "data" else merged(shared, own)


def _steps(stage: Stage, values: Mapping[str, Any], source: str) -> int:
    """The number of steps in which the tokens of a stage are read."""
    training = values.get("training", {})
    require("steps" not in stage.training, f"{source}.tokens: in place of training.steps; leave one out")
    try:
        step = int(training["window"]) * int(training["batch_windows"])
    except (KeyError, TypeError, ValueError):
        raise UserError(f"{source}.tokens: needs training.window and training.batch_windows") from None
    return max(1, round((stage.tokens or 0) / max(step, 1)))
