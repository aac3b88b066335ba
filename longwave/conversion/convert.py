"""A conversion: a pretrained model with softmax attention goes in, efficient students of it come out.

Its stages are runs in a folder of their own, one after the other, and every one of them goes on where it was stopped:

| stage | what happens |
|---|---|
| transfer | the teacher's weights are put into the new layers; nothing is learned |
| align | every linear layer learns what its softmax layer says, once for all students |
| select | layers are ranked by measurements, where the rule of a student needs them |
| distil | whole students learn their teacher's next-token distribution, side by side if there are several |
| train, sft | students learn the next token, at growing windows, or from conversations |
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch

from longwave import checkpoints, files, machine
from longwave.config import ModelConfig
from longwave.conversion.align import Alignment
from longwave.conversion.choosing import Measured, measured_layers
from longwave.conversion.distil import Distillation, Teacher
from longwave.conversion.heads import attention_distances
from longwave.conversion.insertion import insert_levels
from longwave.conversion.recipe import (
    ALONE,
    ConversionRecipe,
    DistilStage,
    Rule,
    SelectConfig,
    SftStage,
    Stage,
    StudentConfig,
    stage_recipe,
    tables_for,
)
from longwave.conversion.record import (
    FORMAT,
    Record,
    StageRecord,
    StudentRecord,
    plain_recipe,
    read_record,
    require_same,
    source_facts,
)
from longwave.conversion.scaling import fitted_scaling
from longwave.conversion.selection import even, kept, last
from longwave.conversion.students import (
    converted_layout,
    head_orders,
    letters_of,
    next_model,
    require_convertible,
    student_config,
)
from longwave.conversion.transfer import transfers
from longwave.conversion.writing import DATA, written_data
from longwave.data.packed import Batch
from longwave.errors import require, within
from longwave.model import Decoder
from longwave.training.clock import read_seconds
from longwave.training.data import TrainingData
from longwave.training.loop import Run, complete_together
from longwave.training.metrics import METRICS, Observer, read_metrics
from longwave.training.next_token import NextToken, held_out_figures
from longwave.training.recipe import Recipe

STAGES, MODEL, MODELS = "stages", "model", "models"
_FREE = ("tokens_per_second", "seconds", "training_seconds", "grad_norm", "clip", "lr_scale")
_TOKENS_A_CHANNEL = 32  # of the hidden size, by which levels are placed
_DISTANCE_WINDOWS = 16  # of training text, by which it is known how far back heads look
Watching = Callable[[str, Run[Any]], Observer]


@dataclasses.dataclass(frozen=True)
class Choice:
    """Which layers of a student keep softmax. ranking: all layers, most important first."""

    kept: tuple[int, ...]
    ranking: tuple[int, ...]

    def until(self, share: float) -> list[int]:
        """The layers that have softmax once this share of those to be converted is, the least important ones first."""
        converted = len(self.ranking) - len(self.kept)
        order = [*self.kept, *(layer for layer in self.ranking if layer not in self.kept)]
        return sorted(order[: len(order) - round(share * converted)])


class Conversion:
    """A conversion of a source by a recipe, in an output folder with which the same conversion goes on.

    Raises UserError for a source that cannot be converted, for stages that do not fit it, and for a folder that holds
    anything but this conversion.
    """

    def __init__(self, source: str | Path, output: str | Path, recipe: ConversionRecipe) -> None:
        self.folder, self.output = checkpoints.find(source), Path(output)
        self.config = checkpoints.load_config(self.folder)
        require_convertible(self.config)
        self.layers = len(letters_of(self.config.parsed))
        self.record = self._found_record(recipe)
        written = {"folder": str(self.output / DATA)}
        self.recipe = recipe if recipe.written is None else dataclasses.replace(recipe, written=None, data=written)
        self.written = recipe.written
        self._require_students()

    # The models ----------------------------------------------------------------------------------------------------

    @cached_property
    def teacher(self) -> Decoder:
        """The source's weights, in fp32, from which students begin and learn."""
        device = machine.device_of(str(self.recipe.training.get("device", "auto")))
        model = checkpoints.load(self.folder, dtype=torch.float32, device=device, tokenizer=True)
        return model.eval().requires_grad_(False)

    @property
    def students(self) -> Mapping[str, StudentConfig]:
        """The students by name."""
        return self.recipe.named

    def choice(self, student: str) -> Choice:
        """Which layers a student keeps, by a rule that does not measure, or as they have been selected."""
        known = self.record.students.get(student)
        if known is not None:
            return Choice(tuple(known.kept), tuple(known.ranking))
        return self.expected_choice(student)

    def expected_choice(self, student: str) -> Choice:
        """The layers that a student keeps; evenly spaced ones stand for those that are still to be measured."""
        select = self.students[student].select
        count = self._count(select)
        pinned = self._pinned(student)
        with within(f"select.keep = {count}"):
            match select.rule:
                case "list":
                    found = sorted({self._layer(layer, "layers") for layer in select.layers})
                case "last":
                    found = _with_pinned(last(self.layers, count), pinned, self.layers)
                case _:
                    found = _with_pinned(even(self.layers, count), pinned, self.layers)
        others = [layer for layer in range(self.layers) if layer not in found]
        return Choice(tuple(found), (*found, *others))

    def layout(self, student: str, share: float = 1.0, choice: Choice | None = None) -> str:
        """The layout of a student of which this share of the layers to be converted is."""
        own = self.students[student]
        keep = (choice or self.choice(student)).until(share)
        return converted_layout(self.config, own.layout, keep, own.linear, own.softmax)

    def student_config(self, student: str, stage: str, choice: Choice | None = None) -> ModelConfig:
        """The config of a student in a stage."""
        share = self.recipe.stages_of(student)[stage].share
        tables = tables_for(self.recipe, student, stage)
        return student_config(self.config, self.layout(student, share, choice), tables)

    def final_config(self, student: str, choice: Choice | None = None) -> ModelConfig:
        """The config of a finished student."""
        stages = list(self.recipe.stages_of(student))
        if stages:
            return self.student_config(student, stages[-1], choice)
        return student_config(self.config, self.layout(student, 1.0, choice), [self.recipe.model])

    def aligned_config(self, stage: str) -> ModelConfig:
        """The config of the model in which every layer is converted."""
        linear = self.recipe.student.linear
        layout = converted_layout(self.config, None, (), linear, None)
        return student_config(self.config, layout, [self.recipe.model, self.recipe.stages[stage].model])

    # The whole -----------------------------------------------------------------------------------------------------

    def run(
        self,
        watching: Watching | None = None,
        say: Callable[[str], None] = lambda line: None,
        reached: Callable[[Record], None] = lambda record: None,
    ) -> Record:
        """Runs all stages that are not finished, and writes the students' folders.

        watching: makes an observer of the run of a stage, which is named. say: told of what is being done. reached:
        given the record after every stage. Raises what `Run.complete` does.
        """
        if self.written is None:
            self._require_data()
        with files.locked(self.output):
            self._say, self._watching, self._reached = say, watching, reached
            self._keep(self.record)
            if self.written is not None:
                written_data(self.teacher, self.written, self.output, say)
            for name in self.recipe.aligning:
                self._align(name)
            for student in self.students:
                self._select(student)
            for name, stage in self.recipe.stages.items():
                if name not in self.recipe.aligning:
                    self._learn(name, stage)
            for student in self.students:
                self._finish(student)
        return self.record

    def _align(self, name: str) -> None:
        if self._finished(name, ""):
            return
        recipe, stage = stage_recipe(self.recipe, name, self.aligned_config(name)), self.recipe.aligning[name]
        orders = self._orders(recipe) if self.recipe.student.sort_heads else {}
        make = partial(Alignment, teacher=self.teacher, error=stage.error, orders=orders)
        run = Run(recipe, self._stage_folder(name, ""), make)
        self._complete(name, stage, {"": run})

    def _orders(self, recipe: Recipe) -> Mapping[int, Sequence[int]]:
        """In which order the heads of each layer begin, from how far back the teacher's look in training text."""
        with torch.device("meta"):
            student = Decoder(recipe.model)
        batch = TrainingData(recipe).batch(range(_DISTANCE_WINDOWS))
        texts = batch.tokens.split(list(batch.runs))
        return head_orders({at: one.tolist() for at, one in attention_distances(self.teacher, texts).items()}, student)

    def _select(self, student: str) -> None:
        """Decides which layers a student keeps, and writes it down."""
        if student in self.record.students:
            return
        choice = self._measured_choice(student) if self.students[student].select.measures else self.choice(student)
        config = self.final_config(student, choice)
        counts = dict[str, int]()
        for one in transfers(self.config, config):
            counts[one.how] = counts.get(one.how, 0) + 1
        made = StudentRecord(config.layout, list(choice.kept), counts, list(choice.ranking))
        self._keep(dataclasses.replace(self.record, students={**self.record.students, student: made}))
        self._say(f"{student}: {config.layout}")

    def _measured_choice(self, student: str) -> Choice:
        """The layers of a student whose rule measures; everything is measured once for all students."""
        select = self.students[student].select
        ranking = self._measured.ranking(select.rule)
        return Choice(tuple(kept(ranking, self._count(select), self._pinned(student))), ranking)

    @cached_property
    def _measured(self) -> Measured:
        """What is measured of the layers, which then stands in the record."""
        name, aligned = next(iter(self.recipe.aligning)), self._aligned()
        assert aligned is not None
        data = TrainingData(stage_recipe(self.recipe, name, self.aligned_config(name)))
        measuring = [own.select for own in self.students.values() if own.select.measures]
        rules: set[Rule] = {one.rule for one in measuring}
        rounds = max(self._count(one) for one in measuring)
        asked = self.recipe.measure
        found = measured_layers(self.teacher, aligned, data, rules, rounds, asked, self.output, self._say)
        self._keep(dataclasses.replace(self.record, selection=found.record()))
        return found

    def _count(self, select: SelectConfig) -> int:
        """The number of layers that keep softmax; a quarter by default."""
        return max(1, self.layers // 4) if select.keep is None else select.keep

    def _pinned(self, student: str) -> list[int]:
        return [self._layer(layer, "pinned") for layer in self.students[student].select.pinned]

    def _learn(self, name: str, stage: Stage) -> None:
        """A stage of all students that take part: together where they learn from the teacher, else one by one."""
        taking = [one for one in self.students if name in self.recipe.stages_of(one) and not self._finished(name, one)]
        if isinstance(stage, DistilStage):
            teacher = Teacher(self.teacher, self._batches_a_step(name, taking) if len(taking) > 1 else 0)
            self._complete(name, stage, {one: self._run_of(name, one, teacher) for one in taking})
            return
        for one in taking:
            self._complete(name, stage, {one: self._run_of(name, one)})

    def _batches_a_step(self, name: str, students: Sequence[str]) -> int:
        """Micro-batches of a step, which a teacher remembers for the next student."""
        run = stage_recipe(self.recipe, name, self.student_config(students[0], name)).training
        return run.batch_windows // (run.micro_windows or run.batch_windows)

    def _run_of(self, name: str, student: str, teacher: Teacher | None = None) -> Run[NextToken]:
        """The run of a stage of a student."""
        stage = self.recipe.stages_of(student)[name]
        recipe = stage_recipe(self.recipe, name, self.student_config(student, name))
        if isinstance(stage, SftStage) and "freeze" not in {**self.recipe.training, **stage.training}:
            training = dataclasses.replace(recipe.training, freeze=self._frozen(student))
            recipe = dataclasses.replace(recipe, training=training)
        start = partial(self._start, name, student, recipe)
        make = partial(NextToken, start=start)
        if isinstance(stage, DistilStage) and teacher is not None:
            options = {"direction": stage.direction, "rows": stage.rows, "hidden": stage.hidden}
            make = partial(Distillation, teacher=teacher, start=start, **options)
        return Run(recipe, self._stage_folder(name, student), make)

    def _frozen(self, student: str) -> tuple[str, ...]:
        """The projections of queries and keys in the layers that keep softmax."""
        layers = self.choice(student).kept
        return tuple(f"blocks.{layer}.mixer.{one}_proj" for layer in layers for one in "qk")

    def _start(self, name: str, student: str, recipe: Recipe) -> Decoder:
        """The model with which a stage of a student begins."""
        stages = list(self.recipe.stages_of(student))
        at, seed = stages.index(name), recipe.training.seed
        before = self._model_after(stages[at - 1], student) if at else self.teacher
        model = self._next(before, recipe.model, seed)
        if model.resamplers and not before.resamplers and self.students[student].levels == "placed":
            for level in insert_levels(model, [_some_text(recipe)]):
                self._say(f"{name}: {level.name} begins with {level.kept:.0%} kept (target {level.target:.0%})")
        return model

    def _next(self, before: Decoder, config: ModelConfig, seed: int) -> Decoder:
        return next_model(before, self._aligned(), config, self.recipe.student.gate, seed)

    def _aligned(self) -> Decoder | None:
        name = next(iter(self.recipe.aligning), None)
        return None if name is None else self._model_after(name, "")

    def _model_after(self, name: str, student: str) -> Decoder:
        device = self.teacher.embed.weight.device
        model = checkpoints.load(self._stage_folder(name, student) / MODEL, dtype=torch.float32, device=device)
        model.tokenizer, model.origin.generation = self.teacher.tokenizer, self.teacher.origin.generation
        return model

    def _complete(self, name: str, stage: Stage, runs: Mapping[str, Run[Any]]) -> None:
        """Completes the runs of a stage, and writes down what they reached."""
        for student, run in runs.items():
            self._say(f"{name}{f' of {student}' if student not in ('', ALONE) else ''}: {run.recipe.model.layout}")
            if self.record.stage(name, student) is None:
                self._keep(self.record.with_stage(self._begun(name, stage, student, run)))
            if self._watching is not None:
                run.watch(self._watching(name if student in ("", ALONE) else f"{name} {student}", run))
        complete_together(list(runs.values()))
        for student, run in runs.items():
            begun = self.record.stage(name, student)
            assert begun is not None
            entries = [one for one in read_metrics(run.output / METRICS) if "held_out_loss" in one]
            curve = [{key: value for key, value in one.items() if key not in _FREE} for one in entries]
            seconds = read_seconds(run.output).total
            spent = {"steps": run.step, "tokens": run.tokens, "flops": run.flops, "seconds": seconds}
            figures = {key: value for key, value in curve[-1].items() if key not in ("step", "tokens", "flops")}
            self._keep(self.record.with_stage(dataclasses.replace(begun, figures=figures, curve=curve, **spent)))

    def _begun(self, name: str, stage: Stage, student: str, run: Run[Any]) -> StageRecord:
        """The record of a stage that begins, with its measure before the first step, and the teacher's."""
        teacher = dict[str, Any]()
        if student:
            known = [one.teacher for one in self.record.stages if one.stage == name]
            teacher = known[0] if known else self._measured_teacher(run)
        return StageRecord(name, stage.kind, student, run.recipe.model.layout, run.measure(), teacher)

    def _measured_teacher(self, run: Run[Any]) -> Mapping[str, Any]:
        with run.computing():
            return held_out_figures(self.teacher, run.data, run.recipe.training.evaluate_windows)

    def _finish(self, student: str) -> None:
        """Writes the folder of a finished student."""
        made = self.record.students[student]
        folder = self.output / MODEL if student == ALONE else self.output / MODELS / student
        stages, config = list(self.recipe.stages_of(student)), self.final_config(student)
        spent = sum(one.tokens for one in self.record.stages if one.student in ("", student))
        key = f"{stages[-1] if stages else 'transfer'}, {spent}"
        if made.folder == key and folder.is_dir():
            return
        before = self._model_after(stages[-1], student) if stages else self.teacher
        model = self._next(before, config, int(self.recipe.training.get("seed", 0)))
        losses = dict[str, float]()
        if self.recipe.logit_scaling is not None:
            recipe = stage_recipe(self.recipe, stages[-1], config)
            model, losses = fitted_scaling(model, recipe, self.recipe.logit_scaling)
            self._say(f"{student}: logit_scaling = {model.config.table('infllm').logit_scaling}")
        model.origin.training = {
            "converted from": str(self.record.source["name"]),
            "layers with softmax": ", ".join(map(str, made.kept)) or "none",
            "tokens of the conversion": spent,
        }
        checkpoints.save(model, folder, tokenizer=self.teacher.tokenizer, format=self.recipe.format)
        done = dataclasses.replace(made, folder=key, scaling=losses)
        self._keep(dataclasses.replace(self.record, students={**self.record.students, student: done}))

    # What is refused -----------------------------------------------------------------------------------------------

    def _found_record(self, asked: ConversionRecipe) -> Record:
        """The record of this conversion in the output folder, or a new one."""
        facts, recipe = source_facts(self.folder), plain_recipe(asked)
        found = read_record(self.output)
        if found is None:
            free = not self.output.exists() or (self.output.is_dir() and not any(self.output.iterdir()))
            require(free, f"{self.output}: exists, and is no conversion; give another folder")
            return Record(FORMAT, facts, recipe, machine.facts())
        require_same(found, facts, recipe, self.output)
        return dataclasses.replace(found, recipe=recipe)

    def _require_students(self) -> None:
        """Raises UserError for what cannot be run, before anything is."""
        require(len(self.recipe.aligning) < 2, "stages: more than one of kind align; one serves all students")
        for name in self.recipe.aligning:
            self._require_stage(name, self.aligned_config(name))
        for student, own in self.students.items():
            with within(f"students.{student}") if student != ALONE else within("student"):
                self._require_student(student, own)
        read = {table for config in self._configs() for table in config.tables}
        for table in self.recipe.model.keys() - {entry.name for entry in dataclasses.fields(ModelConfig)}:
            require(table in read, f"model.{table} has no effect: no layer of any student reads it; leave it out")

    def _configs(self) -> Iterator[ModelConfig]:
        """The configs of all finished students, and of the aligned model."""
        yield from map(self.final_config, self.students)
        yield from map(self.aligned_config, self.recipe.aligning)

    def _require_student(self, student: str, own: StudentConfig) -> None:
        choice, common = self.choice(student), self.recipe.student
        for name in ("linear", "sort_heads", "gate"):
            same = getattr(own, name) == getattr(common, name)
            require(same, f"{name} = {getattr(own, name)!r}: is the same for all students; give it in [student]")
        able = bool(self.recipe.aligning) or not (own.select.measures or own.sort_heads)
        asked = f"select.rule = {own.select.rule!r}" if own.select.measures else "sort_heads = true"
        require(able, f"{asked}: needs aligned layers; give a stage of kind align")
        config = self.final_config(student, choice)
        transfers(self.config, config)
        with torch.device("meta"):
            checkpoints.require_format(Decoder(config), self.recipe.format)
        if self.recipe.logit_scaling is not None:
            able = config.infllm is not None and bool(self.recipe.stages_of(student))
            require(able, "logit_scaling: is for students with S blocks and a stage of their own; leave it out")
        for name in self.recipe.stages_of(student):
            self._require_stage(name, self.student_config(student, name, choice))

    def _require_stage(self, name: str, config: ModelConfig) -> None:
        recipe = stage_recipe(self.recipe, name, config)
        with torch.device("meta"):
            Decoder(recipe.model)

    def _require_data(self) -> None:
        """Raises UserError for data of a stage that are not there, or were made with another tokenizer."""
        tokenizer = self.teacher.tokenizer
        for name in self.recipe.stages:
            aligns = name in self.recipe.aligning
            taking = [one for one in self.students if name in self.recipe.stages_of(one)]
            configs = [self.aligned_config(name)] if aligns else [self.student_config(one, name) for one in taking[:1]]
            for config in configs:
                with within(f"stages.{name}"):
                    data = TrainingData(stage_recipe(self.recipe, name, config))
                    if tokenizer is not None:
                        data.require_tokenizer(tokenizer)

    def _layer(self, layer: int, field: str) -> int:
        found = layer + self.layers if layer < 0 else layer
        require(0 <= found < self.layers, f"select.{field} = {layer}: the source has layers 0 to {self.layers - 1}")
        return found

    # The folder ----------------------------------------------------------------------------------------------------

    def _keep(self, record: Record) -> None:
        self.record = record
        record.write(self.output)
        self._reached(record)

    def _finished(self, name: str, student: str) -> bool:
        found = self.record.stage(name, student)
        return found is not None and found.finished

    def _stage_folder(self, name: str, student: str) -> Path:
        own = self.output / STAGES / name
        return own if student in ("", ALONE) else own / student


def _some_text(recipe: Recipe) -> Batch:
    """Training windows of several times as many tokens as the model has channels, by which levels are placed."""
    windows = max(1, math.ceil(_TOKENS_A_CHANNEL * recipe.model.hidden_size / recipe.training.window))
    return TrainingData(recipe).batch(range(windows))


def _with_pinned(found: Sequence[int], pinned: Sequence[int], layers: int) -> list[int]:
    """Layers of a simple rule, of which pinned ones take the places of the nearest."""
    others = sorted((layer for layer in range(layers)), key=lambda layer: (layer not in found, layer))
    return kept(others, len(found), pinned)
