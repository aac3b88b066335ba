"""`longwave compare`: models at equal budgets, with intervals over seeds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longwave.cli.options import Options, argument, option
from longwave.cli.parser import Verb
from longwave.cli.tables import print_table
from longwave.errors import UserError, require, shown
from longwave.units import short

if TYPE_CHECKING:
    from longwave.comparison.compare import Expectation
    from longwave.comparison.summary import Comparison, Row
    from longwave.intervals import Interval
    from longwave.reports.content import Speed


_WORDS = ("model", "setting", "budget")  # columns of words
_FORWARDED = ("output", "tokens", "flops", "minutes", "grid", "jobs")


@dataclass(frozen=True, kw_only=True)
class Compare(Options):
    """Options of `longwave compare`."""

    recipes: tuple[str, ...] = argument(
        "recipes, folders already trained, and key=value for all recipes", default=(), metavar="RECIPE"
    )
    output: str = option("folder of the runs, comparison.json and report.html", default="comparison")
    tokens: str | None = option("budget in tokens: 2.5M, or several, 1M,2.5M")
    flops: str | None = option("budget in training FLOPs, at the tokens really kept: 3e13")
    minutes: str | None = option("budget in minutes of training, at the speed measured here")
    seeds: str = option("of every model; three or more give intervals worth having", default="0")
    grid: str | None = option("values to try first, with one seed: optimizer.lr=7.5e-4,1.5e-3,3e-3")
    jobs: int = option("runs side by side, with their share of the threads", default=1)
    dry_run: bool = option("only print runs, FLOPs, and hours at the speed measured here", default=False)
    results: tuple[str, ...] = option(
        "a result.json or a folder of them, in place of recipes; may be repeated", default=(), name="--from"
    )


def run(options: Compare) -> Comparison | Expectation:
    """Trains and compares, or shows what that would take, and prints the table and what it allows to be said."""
    from longwave.verbs import compare, compare_results

    if options.results:
        changed = [field.name for field in fields(Compare) if getattr(options, field.name) != field.default]
        idle = sorted({*changed} - {"results", "output", "json"})
        named = " and ".join("RECIPE" if name == "recipes" else f"--{name.replace('_', '-')}" for name in idle)
        require(not idle, f"--from: results take the place of runs; leave out {named}")
        found = compare_results(options.results, output=options.output)
        return _shown(found, Path(options.output))
    require(bool(options.recipes), "give recipes to compare, or --from with results (see longwave compare --help)")
    recipes = [word for word in options.recipes if "=" not in word or Path(word).exists()]
    overrides = [word for word in options.recipes if word not in recipes]
    if options.dry_run:
        return _planned(_expected(options, recipes, overrides))
    given: dict[str, Any] = {name: getattr(options, name) for name in _FORWARDED} | {"seeds": _seeds(options.seeds)}
    return _shown(compare(recipes, overrides, **given, progress=True), Path(options.output))


def _expected(options: Compare, recipes: Sequence[str], overrides: Sequence[str]) -> Expectation:
    from longwave.comparison import compare
    from longwave.comparison.budgets import budgets
    from longwave.comparison.grid import Grid
    from longwave.comparison.runs import Candidate, distinct

    models = distinct([Candidate.read(recipe, overrides) for recipe in recipes])
    grid = None if options.grid is None else Grid.parse(options.grid)
    asked = compare.Options(_seeds(options.seeds), grid, options.jobs)
    amounts = budgets(options.tokens, options.flops, options.minutes)
    return compare.Comparing(models, amounts, Path(options.output), asked).expected()


def _seeds(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise UserError(f"--seeds {shown(text)}: numbers with commas between, such as 0,1,2") from None


def _planned(found: Expectation) -> Expectation:
    rows = list[list[str]]()
    for one in found.models:
        sizes = f"{one.steps:,}", short(one.tokens), short(one.flops), f"{one.seconds / 60:.1f} min"
        rows.append([one.model, one.budget.words(), str(one.runs), *sizes])
    print_table(("model", "budget", "runs", "steps", "tokens each", "FLOPs each", "time each"), rows, _WORDS)
    print(f"in all: {short(found.flops)} FLOPs, {found.seconds / 3600:.2f} hours of runs at the speed measured here")
    return found


def _shown(found: Comparison, output: Path) -> Comparison:
    print_table(_columns(found), [_cells(row, found) for row in found.rows], _WORDS)
    if found.speed.rows:
        print_table(*_speed_table(found.speed), _WORDS)
    for choice in found.choices:
        print(choice.words())
    for statement in found.statements:
        print(statement.text)
    for note in found.notes:
        print(f"note: {note}")
    print(f"{output / 'report.html'}: open it in a browser; {output / 'comparison.json'} has the figures")
    return found


def _columns(found: Comparison) -> tuple[str, ...]:
    setting = ("setting",) if found.choices else ()
    return ("model", *setting, "budget", "seeds", "tokens", "FLOPs", "minutes", "loss", "bits/byte", "kept", "gap")


def _cells(row: Row, found: Comparison) -> list[str]:
    setting = [row.setting] if found.choices else []
    sizes = [short(row.tokens), short(row.flops), f"{row.seconds / 60:.1f}"]
    kept = " ".join(f"{share:.0%}" for share in row.retention) or "-"
    losses = [interval_words(row.loss, ".3f"), interval_words(row.bits_per_byte, ".4f")]
    gap = "-" if row.gap is None else interval_words(row.gap, "+.1%")
    return [row.model, *setting, row.budget.words(), str(len(row.seeds)), *sizes, *losses, kept, gap]


def _speed_table(speed: Speed) -> tuple[tuple[str, ...], list[list[str]]]:
    """Titles and rows of the speed of every model."""
    from longwave.reports.words import cell

    found = {key: [cell(row.figures[key], None, row.kind) for row in speed.rows] for key in speed.columns}
    rows = [[speed.columns[key], *(one.get("value", "-") for one in cells)] for key, cells in found.items()]
    return ("model", *(row.label for row in speed.rows)), rows


def interval_words(found: Interval | None, form: str) -> str:
    """A mean with half of its interval, such as `4.366 ± 0.031`."""
    if found is None:
        return "diverged"
    half = "" if found.high is None else f" ± {format(found.high - found.mean, form.replace('+', ''))}"
    return f"{format(found.mean, form)}{half}"


VERB = Verb("compare", "train models at equal budgets and say which is better", Compare, run)
