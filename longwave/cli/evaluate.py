"""`longwave eval`: the loss of a model on held-out text, its recall over long texts, and its accuracy on tasks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from longwave.cli.options import OfModel, OnDevice, argument, option
from longwave.cli.parser import Verb
from longwave.intervals import Interval, wilson
from longwave.units import counted

if TYPE_CHECKING:
    from longwave.evaluation.ablation import Ablation
    from longwave.evaluation.breakdown import AtContext, OfSource
    from longwave.evaluation.few_shot import FewShot
    from longwave.evaluation.harness import HarnessScore
    from longwave.evaluation.outcome import Evaluation, Probes
    from longwave.evaluation.recall import Recall, RecallScore

_FIGURES = ("loss", "loss_on", "perplexity", "bits_per_byte", "tokens", "retention")
_MOST_SOURCES = 20  # lines of a table; --json has all
_FEW = 100  # rows or samples, below which a share is told by its interval alone
_SHADES = " ░▒▓█"  # of a share, from none to all


@dataclass(frozen=True, kw_only=True)
class Evaluate(OnDevice, OfModel):
    """Options of `longwave eval`."""

    model: str = argument("a model folder, or a hub id")
    data: str | None = argument("prepared data, written with the model's own tokenizer", default=None)
    tasks: tuple[str, ...] = option(
        "a recall task (single, multi-key, multi-value, multi-query, variables, common-words, frequent-words, or ruler "
        "for these; key-value, copy, questions:FILE), or a few-shot task: synthetic, or a file of rows with a text and "
        "a label; or lm-eval:NAME (may be repeated)",
        default=(),
        metavar="TASK",
    )
    shots: int | None = option("examples in the prompt (4)")
    template: str | None = option("how a row of a file is written, such as '{text} Label: {label}'")
    limit: int | None = option("only the first so many tested rows of a task")
    lengths: str | None = option("of recall tasks, in tokens: 512,4k (the context window)", metavar="N,...")
    samples: int | None = option("of a recall task at each length (100)")
    depths: int | None = option("at how many depths of the text needles lie (5)")
    seed: int | None = option("of the examples in the prompt, and of recall tasks (0)")
    window: str | None = option("tokens of a held-out window, or of several (the context window)", metavar="N,...")
    page: str | None = option("a page to write, with maps of recall by length and depth", metavar="FILE")
    ablate: bool = option("take each mixer away in turn, and show what loss and recall become", default=False)


def run(options: Evaluate) -> Probes:
    """Evaluates, and prints one figure a line, then tables."""
    from longwave.evaluation.outcome import Evaluation
    from longwave.verbs import evaluate

    keywords = options.keywords()
    if options.template is not None:  # a shell gives a line end as a backslash and an n
        keywords["template"] = options.template.replace("\\n", "\n")
    result = evaluate(**keywords)
    if isinstance(result, Evaluation):
        _show_held_out(result)
    for task in result.tasks:
        print("\n".join(_of_task(task)))
    for found in result.recall:
        print("\n".join(_of_recall(found)))
    if result.lm_eval:
        print("\n".join(["", *map(_of_lm_eval, result.lm_eval)]))
    if result.ablation is not None:
        print("\n".join(_of_ablation(result.ablation)))
    if options.page is not None:
        print(f"\n{options.page}: open it in a browser")
    return result


def _show_held_out(result: Evaluation) -> None:
    for name in _FIGURES:
        print(f"{name:<16} {_words(getattr(result, name))}")
    if result.by_window:
        print("\n".join(_table("window", [(f"{one.window:,}", one.tokens, one.loss) for one in result.by_window])))
    print("\n".join(_by_context(result.by_context)))
    if len(result.by_source) > 1:
        print("\n".join(_by_source(result.by_source)))


def _by_context(parts: Sequence[AtContext]) -> list[str]:
    names = [f"{part.first:,}" if part.first == part.last else f"{part.first:,} to {part.last:,}" for part in parts]
    rows = [(name, part.tokens, part.loss) for name, part in zip(names, parts, strict=True)]
    return _table("tokens seen", rows)


def _by_source(parts: Sequence[OfSource]) -> list[str]:
    lines = _table("source", [(part.source, part.tokens, part.loss) for part in parts[:_MOST_SOURCES]])
    more = len(parts) - _MOST_SOURCES
    return [*lines, f"and {counted(more, 'more source')} (--json has all)"] if more > 0 else lines


def _table(title: str, rows: Sequence[tuple[str, int, float]]) -> list[str]:
    """Lines of a table of losses, below a blank one."""
    from longwave.evaluation.breakdown import perplexity_of

    width = max(len(title), *(len(name) for name, *_ in rows))
    lines = [f"{name:<{width}} {tokens:>12,} {loss:>8.4g} {perplexity_of(loss):>10.4g}" for name, tokens, loss in rows]
    return ["", f"{title:<{width}} {'predictions':>12} {'loss':>8} {'perplexity':>10}", *lines]


def _of_task(found: FewShot) -> list[str]:
    """The outcome of a task, below a blank line."""
    shots = counted(found.shots, "example")
    if found.shots < found.asked:
        shots += f" (of {found.asked}: no more fit into the context window)"
    chosen = ", ".join(f"{label} {count:,}" for label, count in found.predicted.items())
    figures = {
        "task": f"{found.task}, {shots}, {counted(found.rows, 'row')}, seed {found.seed}",
        "accuracy": _share(found.accuracy, found.interval, found.rows),
        "calibrated": _share(found.calibrated, wilson(round(found.calibrated * found.rows), found.rows), found.rows),
        "per token, byte": ", ".join(
            _share(one, wilson(round(one * found.rows), found.rows), found.rows)
            for one in (found.per_token, found.per_byte)
        ),
        "chance": f"{found.chance:.1%}, always the most frequent label {found.majority:.1%}",
        "chosen": chosen,
    }
    return ["", *(f"{name:<16} {words}" for name, words in figures.items())]


def _share(share: float, interval: tuple[float, float], rows: int) -> str:
    """A share with its 95 % interval; of fewer than 100 rows the interval alone, since the share itself says little."""
    low, high = interval
    span = f"{low:.1%} to {high:.1%}"
    return span if rows < _FEW else f"{share:.1%} ({span})"


def _of_recall(found: Recall) -> list[str]:
    """The scores of a family of recall tasks: a line for each length, then how it depends on the depth."""
    lines = [
        "",
        f"{found.task}, seed {found.seed}",
        f"{'tokens':>10} {'samples':>8}  {'right':<24} {'found':>6} {'chance':>7}",
    ]
    for one in found.by_length:
        right = _share(one.accuracy, one.interval, one.samples)
        lines.append(f"{one.length:>10,} {one.samples:>8,}  {right:<24} {one.found:>6.1%} {one.chance:>7.1%}")
    return [*lines, *_by_depth(found.by_depth)]


def _by_depth(cells: Sequence[RecallScore]) -> list[str]:
    """Right answers by length and depth: the share in per cent, or the interval of few samples, shaded by the share."""
    if not cells:
        return []
    depths = list(dict.fromkeys(one.depth for one in cells))
    lines = [f"{'by depth':>10} " + " ".join(f"{depth:>8.0%}" for depth in depths if depth is not None)]
    for length in dict.fromkeys(one.length for one in cells):
        row = [_cell(one) for one in cells if one.length == length]
        lines.append(f"{length:>10,} {' '.join(row)}")
    return lines


def _cell(found: RecallScore) -> str:
    shade = _SHADES[min(int(found.accuracy * len(_SHADES)), len(_SHADES) - 1)]
    low, high = (round(100 * end) for end in found.interval)
    words = f"{low}-{high}" if found.samples < _FEW else f"{100 * found.accuracy:.0f}"
    return f"{shade}{words:>7}"


def _of_lm_eval(found: HarnessScore) -> str:
    """A figure of lm-eval; a share of few rows is told by its interval alone."""
    span = "" if found.interval is None else f"{found.interval[0]:.4g} to {found.interval[1]:.4g}"
    few = found.samples < _FEW and found.interval is not None
    words = span if few else f"{found.value:.4g}{span and f' ({span})'}"
    return f"{found.task:<24} {found.metric:<24} {words}, {counted(found.samples, 'row')}"


def _of_ablation(found: Ablation) -> list[str]:
    """What the model is without each mixer: a line for each, below the whole model's; of tasks the right answers."""
    widths = [max(len(name), 7) for name in found.recall]
    lossy = found.loss is not None
    head = f"{'without':<18}" + (f" {'loss':>8} {'change, 95 %':>24}" if lossy else "")
    lines = ["", head + "".join(f" {name:>{width}}" for name, width in zip(found.recall, widths, strict=True))]
    whole = f"{'nothing':<18}" + (f" {found.loss:>8.4f} {'':>24}" if lossy else "")
    lines.append(whole + "".join(f" {one:>{width},}" for one, width in zip(found.recall.values(), widths, strict=True)))
    for one in found.mixers:
        change = "" if one.change is None else f" {one.loss:>8.4f} {_change(one.change):>24}"
        recall = "".join(f" {turned.right:>{width},}" for turned, width in zip(one.recall, widths, strict=True))
        name = f"{one.mixer} ({one.letter})"
        lines.append(f"{name:<18}{change}{recall}{'  changes nothing' if one.changes_nothing else ''}")
    blind = any(one.changes_nothing is None for one in found.mixers)
    return [*lines, *(["the whole model answers too little right to tell what a mixer changes"] if blind else [])]


def _change(change: Interval) -> str:
    """A change with its interval, where it has one."""
    span = "" if change.low is None else f" ({change.low:+.4f} to {change.high:+.4f})"
    return f"{change.mean:+.4f}{span}"


def _words(value: str | float | tuple[float, ...]) -> str:
    """A figure as people read it: as many digits as say something."""
    if isinstance(value, tuple):
        return ", ".join(f"{share:.1%}" for share in value) or "all"
    return f"{value:.5g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else value


VERB = Verb("eval", "loss of a model on held-out text, its recall, and its accuracy on tasks", Evaluate, run)
