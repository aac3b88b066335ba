"""The plan of a conversion, before it is paid: what becomes of every tensor, and what each stage takes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from longwave.benchmarks.measure.memory import Meter
from longwave.config import ModelConfig
from longwave.conversion.align import Alignment
from longwave.conversion.convert import Conversion
from longwave.conversion.distil import Distillation
from longwave.conversion.recipe import AlignStage, DistilStage, stage_recipe
from longwave.conversion.students import next_model
from longwave.conversion.transfer import Transfer, is_softmax, mixer_of, transfers
from longwave.conversion.writing import DATA
from longwave.costs import count
from longwave.model import Decoder
from longwave.part import Part
from longwave.training.flops import trained_flops
from longwave.training.next_token import NextToken
from longwave.training.objective import AnyObjective, Maker
from longwave.training.pace import step_seconds
from longwave.training.recipe import Recipe

_FP32 = 4  # bytes of a weight, of a gradient, and of a moment
_PACE_SECONDS = 3.0
_MOMENTS = 2  # of a weight in the optimizer, the most that any of them keeps


@dataclass(frozen=True)
class StagePlan:
    """A stage of one student, or the alignment that all share (student ""). flops, tokens: of all of its steps.

    bytes: the most that is held at a time, the teacher's weights among it where it is read. Where the stage is measured
    that is the peak of its first steps; otherwise weights, gradients and the optimizer's state, without activations.
    seconds: at the speed measured here; None where it was not measured.
    """

    stage: str
    kind: str
    student: str
    layout: str
    window: int
    steps: int
    tokens: int
    flops: int
    bytes: int
    seconds: float | None = None


@dataclass(frozen=True)
class StudentPlan:
    """A student. layout: of the finished model; measured: whether layers are still to be selected, and are a guess.

    transfers: what becomes of every tensor.
    """

    layout: str
    kept: Sequence[int]
    measured: bool
    parameters: int
    transfers: Sequence[Transfer]


@dataclass(frozen=True)
class ConversionPlan:
    """What a conversion does and takes. share: of the tokens that the source was trained with, if the recipe knows."""

    source: str
    source_parameters: int
    students: Mapping[str, StudentPlan]
    stages: Sequence[StagePlan]
    share: float | None

    @property
    def tokens(self) -> int:
        """Tokens of all stages."""
        return sum(one.tokens for one in self.stages)

    @property
    def flops(self) -> int:
        """FLOPs of all stages."""
        return sum(one.flops for one in self.stages)

    @property
    def seconds(self) -> float | None:
        """Seconds of all stages at the speed measured here, one after the other."""
        known = [one.seconds for one in self.stages if one.seconds is not None]
        return sum(known) if known and len(known) == len(self.stages) else None


def plan_of_conversion(conversion: Conversion, measure: bool = True) -> ConversionPlan:
    """The plan of a conversion.

    measure: whether the speed and the memory of each stage are measured, which loads the source.
    """
    recipe, source = conversion.recipe, _meta(conversion.config)
    measure = measure and (conversion.written is None or (conversion.output / DATA).is_dir())
    students, stages = dict[str, StudentPlan](), list[StagePlan]()
    for name, own in conversion.students.items():
        choice, config = conversion.choice(name), conversion.final_config(name)
        unknown = own.select.measures and name not in conversion.record.students
        found = transfers(conversion.config, config)
        students[name] = StudentPlan(config.layout, choice.kept, unknown, count(_meta(config)), found)
    for name, stage in recipe.stages.items():
        if isinstance(stage, AlignStage):
            stages.append(_stage(conversion, name, "", conversion.aligned_config(name), source, measure))
            continue
        for student in conversion.students:
            if name in recipe.stages_of(student):
                stages.append(
                    _stage(conversion, name, student, conversion.student_config(student, name), source, measure)
                )
    spent = sum(one.tokens for one in stages)
    share = None if recipe.source_tokens is None else spent / recipe.source_tokens
    return ConversionPlan(conversion.config.layout, count(source), students, stages, share)


def _stage(
    conversion: Conversion, name: str, student: str, config: ModelConfig, source: Decoder, measure: bool
) -> StagePlan:
    stage, recipe = conversion.recipe.stages[name], stage_recipe(conversion.recipe, name, config)
    run, model = recipe.training, _meta(recipe.model)
    step_tokens, steps = run.batch_windows * run.window, recipe.steps
    trained = sum(map(count, _learning(source, model))) if isinstance(stage, AlignStage) else count(model)
    read = count(source) if isinstance(stage, AlignStage | DistilStage) else 0
    held, pace = trained * (2 + _MOMENTS) * _FP32, None
    if measure:
        peak, pace = _measured(recipe, _maker(conversion, stage, config), conversion.teacher)
        held = max(held, peak)  # a process that has freed memory before may need no more of it
    return StagePlan(
        name,
        stage.kind,
        student,
        recipe.model.layout,
        run.window,
        steps,
        steps * step_tokens,
        steps * _step_flops(stage, source, model, recipe),
        held + read * _FP32,
        None if pace is None else steps * pace,
    )


def _measured(recipe: Recipe, make: Maker[AnyObjective], teacher: Decoder) -> tuple[int, float]:
    """The most bytes that the first steps of a stage hold, beside the teacher, and the seconds of a step."""
    meter = Meter(teacher.embed.weight.device)
    seconds = step_seconds(recipe, make, _PACE_SECONDS)
    return meter.peak(), seconds


def _maker(conversion: Conversion, stage: Any, config: ModelConfig) -> Callable[..., Any]:
    """The objective of a stage, from weights that were not aligned: its speed is that of any others."""
    if isinstance(stage, AlignStage):
        return partial(Alignment, teacher=conversion.teacher, error=stage.error)
    start = partial(next_model, conversion.teacher, None, config, "random", 0)
    if isinstance(stage, DistilStage):
        return partial(Distillation, teacher=conversion.teacher, start=start)
    return partial(NextToken, start=start)


def _step_flops(stage: Any, source: Decoder, model: Decoder, recipe: Recipe) -> int:
    """FLOPs of an optimizer step over whole windows, the teacher's forward pass included."""
    window, windows = recipe.training.window, recipe.training.batch_windows
    read = sum(part.prefill_flops(window) for part in source.parts)
    if isinstance(stage, AlignStage):
        learning = _learning(source, model)
        return windows * (read + sum(trained_flops(mixer, Counter({window: 1})) for mixer in learning))
    taught = read + window * source.head_flops() if isinstance(stage, DistilStage) else 0
    return windows * (model.training_flops(window) + taught)


def _learning(source: Decoder, model: Decoder) -> list[Part]:
    """The mixers that learn in an alignment."""
    pairs = zip(source.blocks, model.blocks, strict=True)
    return [mixer_of(ours) for theirs, ours in pairs if is_softmax(theirs) and not is_softmax(ours)]


def _meta(config: ModelConfig) -> Decoder:
    with torch.device("meta"):
        return Decoder(config)
