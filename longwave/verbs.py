"""The verbs of the command line as functions: each takes its verb's options, and returns what the verb prints."""

from __future__ import annotations

import dataclasses
import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, TypedDict, Unpack, overload

from longwave.api import load
from longwave.comparison.budgets import Budget, budgets
from longwave.comparison.compare import Options, compared, write_files
from longwave.comparison.grid import Grid
from longwave.comparison.runs import Candidate, distinct
from longwave.comparison.summary import Comparison, summarised
from longwave.comparison.trained import read_results, results_of_folders, settled
from longwave.config import ModelConfig
from longwave.conversion.convert import Conversion
from longwave.conversion.plan import ConversionPlan, plan_of_conversion
from longwave.conversion.recipe import read_conversion
from longwave.conversion.record import Record
from longwave.data.recall.documents import NAME as RECALL
from longwave.data.recall.documents import recall_plan
from longwave.data.recall.prepare import prepare_recall
from longwave.data.selection import parse_keep
from longwave.data.shards import PreparedInfo
from longwave.data.shards import prepare as write_shards
from longwave.data.sources import standard_library
from longwave.data.tokenizer import Tokenizer
from longwave.errors import require, shown, within
from longwave.evaluation.ablation import ablate as ablated
from longwave.evaluation.outcome import Evaluation, Probes, held_out_windows
from longwave.evaluation.outcome import evaluate as judge
from longwave.evaluation.suite import Asked, Lengths, sizes_of, suite_of
from longwave.machine import dtype_of, facts, versions
from longwave.model import Decoder
from longwave.planning import Plan, model_config, plan_of
from longwave.progress import TrainingProgress, say
from longwave.reports.conversion import write_conversion
from longwave.reports.recall import page_to_write, write_evaluation
from longwave.training.loop import Run, Trainer, TrainingResult
from longwave.training.medusa import MedusaTraining
from longwave.training.metrics import Observer
from longwave.training.next_token import NextToken
from longwave.training.recipe import read_recipe
from longwave.units import parse_amount, parse_sizes

_MOST_CONTEXTS = 100


def prepare(
    source: str | Path,
    output: str | Path,
    *,
    vocab_size: int | None = None,
    tokenizer: str | Path | Tokenizer | None = None,
    held_out: float | None = None,
    text_field: str | None = None,
    ignore: Sequence[str] = (),
    loss_on: Literal["assistant", "all"] | None = None,
    families: str | Sequence[str] | None = None,
    lengths: int | str | Sequence[int | str] | None = None,
    tokens: str | float | None = None,
    questions: int | None = None,
    for_recall: bool = False,
    keep: str | None = None,
    seed: int = 0,
) -> PreparedInfo:
    """Turns text or conversations into a new folder of tokenised shards, which appears whole or not at all.

    source: a file or a folder of texts, or of rows of texts or chats; `"stdlib"` for Python's own sources; `"recall"`
    for recall tasks that are made. output: the folder to write. vocab_size: entries of the tokenizer to train; 8192 by
    default. tokenizer: one to use instead, or a folder with `tokenizer.json`, such as a prepared one or a model's.
    held_out: share of the documents kept from training, which `seed` draws; 0.02 by default, one document at least.
    text_field: the field of the text in rows. ignore: keys of rows and messages to pass over.
    loss_on: what is learned of conversations and recall tasks; the answers by default.
    families: of recall tasks, such as `"key-value,copy"`. lengths: of their documents in tokens, such as `"256,1k"`.
    tokens: of recall tasks in all, such as `"2.5M"`; of a source of documents, the training tokens to take in all, of
    each source among them its share of what there is. questions: that a recall task asks in turn, all of whose answers
    are learned; 1 by default. for_recall: whether the tokenizer that is trained has an entry for every word of recall
    tasks.
    keep: lengths of documents to take, in tokens, with a probability: `"0-4k:0.1,4k-"` takes a tenth of the short ones.
    Raises UserError for a source that cannot be read or used, and for a folder that exists.
    """
    given = Tokenizer.load(tokenizer) if isinstance(tokenizer, str | Path) else tokenizer
    ignored = (ignore,) if isinstance(ignore, str) else tuple(ignore)
    if str(source) == RECALL:
        idle = {"vocab_size": vocab_size, "text_field": text_field, "ignore": ignored or None, "keep": keep}
        _require_idle(f"the source {RECALL}", **idle, for_recall=for_recall or None)
        plan = recall_plan(families, lengths, tokens, seed, questions)
        require(given is not None, f"tokenizer: the source {RECALL} needs one; name a prepared folder or a model's")
        assert given is not None
        return prepare_recall(plan, output, given, held_out=held_out, loss_on=loss_on)
    _require_idle(f"any source but {RECALL}", families=families, lengths=lengths, questions=questions)
    return write_shards(
        standard_library if source == "stdlib" else source,
        output,
        tokenizer=given,
        vocab_size=vocab_size,
        held_out=held_out,
        seed=seed,
        loss_on=loss_on,
        text_field=text_field,
        ignore=ignored,
        for_recall=for_recall,
        keep=() if keep is None else parse_keep(keep),
        tokens=None if tokens is None else math.ceil(parse_amount(str(tokens))),
    )


def _require_idle(where: str, **options: object) -> None:
    """UserError for an option that was given and has no effect there."""
    for name, value in options.items():
        require(value is None, f"{name} = {shown(value)}: has no effect on {where}; leave it out")


def train(
    recipe: str | Path,
    overrides: Mapping[str, Any] | Sequence[str] = (),
    *,
    output: str | Path | None = None,
    progress: bool = False,
) -> TrainingResult:
    """Trains a model from a recipe, or goes on with the run that is in the folder.

    recipe: a TOML file, or the name of a recipe that comes with the package.
    overrides: values of the recipe to change, such as `{"training.steps": 100}` or `["training.steps=100"]`.
    output: folder of the run; `runs/` and the name of the recipe by default. progress: whether stderr tells of it.
    Raises UserError for a recipe, data or a folder that do not fit, MachineError for a run whose numbers ceased to be
    finite, and KeyboardInterrupt once a stopped run has its checkpoint.
    """
    folder = Path("runs") / Path(recipe).stem if output is None else Path(output)
    read = read_recipe(recipe, overrides)
    trainer = Trainer(read, folder) if read.medusa is None else Run(read, folder, MedusaTraining)
    if progress:
        _tell(trainer)
    trainer.complete()
    return trainer.result()


def compare(
    recipes: Sequence[str | Path],
    overrides: Sequence[str] = (),
    *,
    output: str | Path = "comparison",
    tokens: str | float | None = None,
    flops: str | float | None = None,
    minutes: str | float | None = None,
    seeds: Sequence[int] = (0,),
    grid: str | None = None,
    jobs: int = 1,
    progress: bool = False,
) -> Comparison:
    """Trains models at equal budgets and says which is better, or goes on with the comparison in the folder.

    recipes: TOML files, or names of recipes that come with the package; the first is the one to compare with.
    overrides: of every recipe, such as `["data.folder=runs/data"]`. output: folder of the runs and the report.
    tokens, flops, minutes: the budget, one of them: `2.5e6`, `"2.5M"`, or several, `"1M,2.5M"`. FLOPs are those of
    training, at the tokens that every level really keeps; minutes are made steps by the speed measured here.
    seeds: of every model; three or more give intervals worth having. grid: `"optimizer.lr=7.5e-4,1.5e-3,3e-3"`, tried
    with the first seed. jobs: runs side by side, with their share of the threads. progress: whether stderr tells of it.
    Raises UserError for recipes, budgets and folders that do not fit.
    """
    folders = [one for one in recipes if Path(one).is_dir()]
    amounts = _budgets(tokens, flops, minutes, optional=len(folders) == len(recipes) > 0)
    trained = results_of_folders(folders, amounts)
    models = [Candidate.read(str(one), overrides) for one in recipes if one not in folders]
    idle = not models and (overrides or grid is not None or tuple(seeds) != (0,) or jobs != 1)
    require(not idle, "recipes: none is given, so overrides, seeds, grid and jobs have no effect; leave them out")
    options = Options(tuple(seeds), None if grid is None else Grid.parse(grid), jobs, progress)
    found = compared(distinct(models), amounts, Path(output), options, trained)
    given = {"tokens": tokens, "flops": flops, "minutes": minutes, "seeds": ",".join(map(str, seeds)), "grid": grid}
    write_files(found, Path(output), _compare_command([*map(str, recipes), *overrides], **given, output=output))
    return found


def _budgets(*given: str | float | None, optional: bool = False) -> tuple[Budget, ...]:
    """The budgets in tokens, FLOPs or minutes; none where none need be given."""
    texts = [None if one is None else str(one) for one in given]
    return () if optional and not any(texts) else budgets(*texts)


def compare_results(results: Sequence[str | Path], *, output: str | Path = "comparison") -> Comparison:
    """The comparison of finished runs, from their `result.json` or the folders that hold them; nothing is trained."""
    found = summarised(*settled(read_results(results)))
    write_files(found, Path(output), _compare_command([f"--from={path}" for path in results], output=output))
    return found


def _compare_command(words: Sequence[str], **options: object) -> str:
    """The command line that does the same."""
    named = [f"--{name}={value}" for name, value in options.items() if value is not None]
    return shlex.join(["longwave", "compare", *words, *named])


Names = str | Path | Sequence[str] | Sequence[str | Path]
Model = str | Path | Decoder


class EvaluateOptions(TypedDict, total=False):
    """How `evaluate` asks.

    tasks: names of tasks (`longwave.evaluation.suite`): recall families such as `single`, `ruler` for seven of them,
    `questions:FILE`, `lm-eval:NAME`, `synthetic`, files of rows with a `text` and a `label`.
    shots: examples in the prompt of a few-shot task; 4 by default. template: how a row is written, with the names of
    its fields in braces; `"{text}\\nLabel: {label}"` by default. limit: only the first so many tested rows of a task.
    lengths: of recall tasks in tokens, such as `"512,4k"`; the context window by default. samples: of a recall task at
    each length; 100 by default. depths: at how many depths needles lie; 5 by default. seed: of examples and samples.
    window: tokens of a held-out window, or several such as `"256,1k"`; the context window by default. ablate: whether
    each mixer is taken away in turn. page: a file to write, with maps of recall.
    device: `cpu`, `cuda`, `cuda:N`, or `auto` for a GPU where there is one.
    """

    tasks: Names
    shots: int | None
    template: str | None
    limit: int | None
    lengths: Lengths | None
    samples: int | None
    depths: int | None
    seed: int | None
    window: Lengths | None
    ablate: bool
    page: str | Path | None
    device: str


@overload
def evaluate(model: Model, data: str | Path, **options: Unpack[EvaluateOptions]) -> Evaluation: ...
@overload
def evaluate(model: Model, data: None = None, **options: Unpack[EvaluateOptions]) -> Probes: ...
def evaluate(
    model: Model,
    data: str | Path | None = None,
    *,
    tasks: Names = (),
    shots: int | None = None,
    template: str | None = None,
    limit: int | None = None,
    lengths: Lengths | None = None,
    samples: int | None = None,
    depths: int | None = None,
    seed: int | None = None,
    window: Lengths | None = None,
    ablate: bool = False,
    page: str | Path | None = None,
    device: str = "auto",
) -> Probes:
    """How well a model predicts the held-out split of prepared data, and solves tasks, as it runs in use.

    model: a folder, a hub id, or a model that is loaded, which stays on the device where it is. data: prepared with the
    model's own tokenizer; without it only the tasks are run. options: as in `EvaluateOptions`.
    Raises UserError for data of another tokenizer, a task that cannot be read or asked of this model, and an option
    without effect; MachineError for a loss that is not finite.
    """
    asked = Asked(shots, template, limit, lengths, samples, depths, seed)
    options = dataclasses.asdict(asked) | {"tasks": tasks, "window": window, "ablate": ablate, "device": device}
    suite = suite_of([tasks] if isinstance(tasks, str | Path) else list(tasks), asked)  # read before a model is loaded
    require(window is None or data is not None, f"window = {window}: has no effect without prepared data")
    nothing = suite.is_empty and data is None
    require(not nothing, "nothing to evaluate: give prepared data, or a task such as synthetic or single")
    probed = data is not None or bool(suite.families)
    require(probed or not ablate, "ablate: give prepared data or a recall task, to see what a mixer does")
    if isinstance(model, Decoder):
        require(device == "auto", f"device = {device}: no effect on a model that is loaded; leave it out")
    windows = () if window is None else sizes_of(window, "window")
    place = None if page is None else page_to_write(page)
    loaded = model if isinstance(model, Decoder) else load(model, device=device)
    judged = Probes() if data is None else judge(loaded, data, windows)
    packed = None if data is None else held_out_windows(loaded, data, windows)
    found = replace(
        judged,
        tasks=suite.few_shot(loaded),
        recall=suite.recall(loaded),
        lm_eval=suite.lm_eval(loaded),
        ablation=ablated(loaded, packed, suite.families, suite.recall_asked(loaded)) if ablate else None,
        command=_evaluate_command(model, data, options),
        versions=versions(),
    )
    if place is not None:
        write_evaluation(found, place, "the model" if isinstance(model, Decoder) else str(model), facts())
    return found


def _evaluate_command(model: Model, data: str | Path | None, options: Mapping[str, Any]) -> str:
    """The command line that does the same."""
    words = ["longwave", "eval", "MODEL" if isinstance(model, Decoder) else str(model)]
    words += [] if data is None else [str(data)]
    for name in EvaluateOptions.__annotations__:
        value = options.get(name)
        several = [value] if isinstance(value, str | Path) or not isinstance(value, Sequence) else list(value)
        if name in ("lengths", "window") and value is not None:
            several = [",".join(map(str, several))]
        usual = value in (None, False) or (name, value) == ("device", "auto")
        words += ["--ablate"] if value is True else [] if usual else [f"--{name}={one}" for one in several]
    return shlex.join(words)


def convert(
    source: str | Path,
    output: str | Path,
    recipe: str | Path,
    overrides: Mapping[str, Any] | Sequence[str] = (),
    *,
    progress: bool = False,
) -> Record:
    """Converts a pretrained model by a recipe, or goes on with the conversion that is in the folder.

    source: a folder of any supported format, or a hub id. output: folder of the conversion: `stages/`,
    `conversion.json`, `report.html`, and `model/` (`models/` for several students). recipe: a TOML file, or the name of
    one that comes with the package. overrides: values of it to change. progress: whether stderr tells of it.
    Raises UserError for a source, recipe, data or a folder that do not fit, and what `train` raises.
    """
    conversion = Conversion(source, output, read_conversion(recipe, overrides))
    given = [f"{key}={value}" for key, value in overrides.items()] if isinstance(overrides, Mapping) else overrides
    words = ["longwave", "convert", str(source), str(output), "--recipe", str(recipe), *given]
    conversion.record = dataclasses.replace(conversion.record, command=shlex.join(words))

    def reached(record: Record) -> None:
        write_conversion(record, Path(output) / "report.html")

    if not progress:
        return conversion.run(reached=reached)

    def watching(name: str, run: Run[Any]) -> Observer:
        if run.step:
            say(f"{name}: resuming after step {run.step}")
        return TrainingProgress(name, run.recipe.steps, run.step)

    return conversion.run(watching, say, reached)


def plan_conversion(
    source: str | Path,
    output: str | Path,
    recipe: str | Path,
    overrides: Mapping[str, Any] | Sequence[str] = (),
    *,
    measure: bool = True,
) -> ConversionPlan:
    """What a conversion would do and take. measure: whether the speed of its stages is measured, which takes a while.

    The other arguments, and errors, are those of `convert`; nothing is written.
    """
    return plan_of_conversion(Conversion(source, output, read_conversion(recipe, overrides)), measure)


def _tell(trainer: Run[NextToken] | Run[MedusaTraining]) -> None:
    """Says what is run, and goes on to show how far it is."""
    if trainer.step:
        say(f"{trainer.output}: resuming after step {trainer.step}")
    for line in [*trainer.objective.model.describe(), *trainer.notes()]:
        say(line)
    trainer.watch(TrainingProgress(trainer.output.name, trainer.recipe.steps, trainer.step))


def plan(
    model: str | Path | ModelConfig,
    *,
    context: int | str | Sequence[int | str] = 4096,
    dtype: Literal["fp32", "bf16", "fp16", "fp64"] = "bf16",
) -> Plan:
    """Parameters, FLOPs and state bytes of a model, before they are paid: no weight is read or made.

    model: a recipe, a folder of which only `config.json` need exist, a hub id, or a config.
    context: numbers of tokens, such as `4096`, `"64k"` or `[4096, "1M"]`. dtype: of weights and activations.
    Raises UserError for a config that cannot be built and for what is no number of tokens.
    """
    contexts = _contexts(context)
    if isinstance(model, ModelConfig):
        return plan_of(model, contexts, dtype_of(dtype))
    config = model_config(model)
    with within(model):
        return plan_of(config, contexts, dtype_of(dtype))


def _contexts(given: int | str | Sequence[int | str]) -> list[int]:
    one_by_one = [given] if isinstance(given, int | str) else given
    contexts = [size for one in one_by_one for size in parse_sizes(str(one))]
    fits = 0 < len(contexts) <= _MOST_CONTEXTS
    require(fits, f"context: {len(contexts)} numbers of tokens; give 1 to {_MOST_CONTEXTS} of them")
    return contexts
