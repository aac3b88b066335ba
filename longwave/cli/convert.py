"""`longwave convert`: a pretrained model in, an efficient long-context model out."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longwave.cli.options import Options, argument, option
from longwave.cli.parser import Verb
from longwave.cli.tables import print_table
from longwave.errors import require
from longwave.units import counted, short, short_bytes

if TYPE_CHECKING:
    from longwave.conversion.plan import ConversionPlan, StagePlan, StudentPlan
    from longwave.conversion.record import Record, StageRecord

_WORDS = ("stage", "student", "model")  # columns of words
_MOST_NAMES = 6  # of tensors that are told by name


@dataclass(frozen=True, kw_only=True)
class Convert(Options):
    """Options of `longwave convert`."""

    source: str = argument("folder of a pretrained model, or its name on the hub", metavar="SRC")
    output: str = argument("folder of the conversion; the same command goes on with it", metavar="DST")
    overrides: tuple[str, ...] = argument("values to change: training.window=256", default=(), metavar="key=value")
    recipe: str | None = option("a TOML file, or the name of a recipe (`longwave recipes` lists them)")
    dry_run: bool = option("only print the plan: tensors, layers, tokens, FLOPs, bytes, hours", default=False)


def run(options: Convert) -> Record | ConversionPlan:
    """Converts, or goes on with a conversion, and prints what each stage reached; or prints the plan alone."""
    from longwave.verbs import convert, plan_conversion

    require(options.recipe is not None, "--recipe: give the recipe of the conversion (see longwave convert --help)")
    assert options.recipe is not None
    given: tuple[Any, ...] = (options.source, options.output, options.recipe, options.overrides)
    if options.dry_run:
        return _planned(plan_conversion(*given))
    return _shown(convert(*given, progress=True), Path(options.output))


def _planned(plan: ConversionPlan) -> ConversionPlan:
    print(f"source: {plan.source}, {plan.source_parameters:,} parameters")
    for name, student in plan.students.items():
        _tell(name, student)
    columns = ("stage", "student", "model", "window", "steps", "tokens", "FLOPs", "memory", "time")
    print_table(columns, [_planned_row(one) for one in plan.stages], _WORDS)
    hours = "" if plan.seconds is None else f", {plan.seconds / 3600:.2f} hours at the speed measured here"
    share = "" if plan.share is None else f", {plan.share:.2%} of the source's"
    print(f"in all: {plan.tokens / 1e9:,.4g} G tokens{share}, {short(plan.flops)} FLOPs{hours}")
    return plan


def _tell(name: str, student: StudentPlan) -> None:
    guess = "; its layers are still to be selected" if student.measured else ""
    print(f"{name}: {student.layout}, {student.parameters:,} parameters{guess}")
    for how in ("copied", "repeated", "new", "left out"):
        found = [one for one in student.transfers if one.how == how]
        names = ", ".join(one.name for one in found[:_MOST_NAMES])
        more = f" and {len(found) - _MOST_NAMES} more" if len(found) > _MOST_NAMES else ""
        if found:
            print(f"  {counted(len(found), 'tensor')} {how}: {names}{more}")


def _planned_row(one: StagePlan) -> list[str]:
    time = "-" if one.seconds is None else f"{one.seconds / 60:.1f} min"
    sizes = [f"{one.window:,}", f"{one.steps:,}", short(one.tokens), short(one.flops), short_bytes(one.bytes), time]
    return [one.stage, one.student or "all", one.layout, *sizes]


def _shown(found: Record, output: Path) -> Record:
    columns = ("stage", "student", "tokens", "minutes", "begins at", "ends at", "KL", "teacher")
    print_table(columns, [_row(one) for one in found.stages], _WORDS)
    for name, student in found.students.items():
        print(f"{name}: {student.layout}")
    print(f"{output / 'report.html'}: open it in a browser; {output / 'conversion.json'} has the figures")
    return found


def _row(one: StageRecord) -> list[str]:
    losses = [_figure(table, "held_out_loss") for table in (one.start, one.figures)]
    apart = _figure(one.figures, "held_out_kl")
    spent = [short(one.tokens), f"{one.seconds / 60:.1f}"]
    return [one.stage, one.student or "all", *spent, *losses, apart, _figure(one.teacher, "held_out_loss")]


def _figure(table: Any, name: str) -> str:
    value = table.get(name)
    return "-" if value is None else f"{value:.4f}"


VERB = Verb("convert", "turn a pretrained model into an efficient one; the same command resumes", Convert, run)
