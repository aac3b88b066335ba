"""Tasks of lm-eval (EleutherAI's harness) on a longwave model, with its own figures and how sure they are."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longwave.errors import MachineError, UserError, require, shown
from longwave.files.jsonfile import brief
from longwave.intervals import wilson
from longwave.model import Decoder

_SHARES = ("acc", "acc_norm", "exact_match")  # means of right and wrong, which have Wilson's interval
_NORMAL = 1.96  # standard errors on either side, of any other mean


@dataclass(frozen=True)
class HarnessScore:
    """A figure of a task. metric: its name and filter in lm-eval. samples: rows that it is a mean of.

    interval: 95 %, Wilson's of shares, and of other means by lm-eval's standard error; None where it gives none.
    """

    task: str
    metric: str
    value: float
    samples: int
    interval: tuple[float, float] | None


def harness_scores(model: Decoder, names: Sequence[str], limit: int | None = None) -> tuple[HarnessScore, ...]:
    """Runs tasks of lm-eval, by name or from a file that defines one. limit: only the first so many rows of each.

    Raises UserError where lm-eval is not installed, for a task that it does not have or cannot load, and for a prompt
    that does not fit into the context window.
    """
    if not names:
        return ()
    require(model.tokenizer is not None, "this model has no tokenizer, which lm-eval needs: set model.tokenizer")
    assert model.tokenizer is not None
    try:
        from lm_eval import simple_evaluate
        from lm_eval.tasks import TaskManager

        from longwave.evaluation.harness_model import HarnessModel
    except ImportError as error:
        raise UserError(f"lm-eval: not installed ({brief(error)}): pip install 'longwave[eval]'") from None
    folders: list[str | Path] = [Path(name).parent for name in names if _is_file(name)]
    asked = [task_name(name) for name in names]
    options: dict[str, Any] = {"tasks": asked, "limit": limit, "bootstrap_iters": 1000, "log_samples": False}
    try:
        options["task_manager"] = TaskManager(include_path=folders or None, include_defaults=len(folders) < len(names))
        found = simple_evaluate(HarnessModel(model, model.tokenizer), **options)
    except (UserError, MachineError):
        raise
    except Exception as error:  # of any kind: tasks are code and data of others
        raise UserError(
            f"tasks = {shown(', '.join(names))}: lm-eval: {brief(error) or type(error).__name__}"
        ) from error
    return tuple(_scores(found or {}))


def task_name(name: str) -> str:
    """What lm-eval calls a task that is given by its name, or by a file that defines it."""
    return _task_in(Path(name)) if _is_file(name) else name


def _is_file(name: str) -> bool:
    return name.endswith((".yaml", ".yml"))


def _task_in(path: Path) -> str:
    """The name of the task that a file defines."""
    require(path.is_file(), f"{path}: no such file; give a task of lm-eval, or a file that defines one")
    found = re.search(r"^task:\s*(\S+)\s*$", path.read_text("utf-8", errors="replace"), re.MULTILINE)
    require(found is not None, f"{path}: no line `task: NAME`; give a file that defines a task of lm-eval")
    assert found is not None
    return found[1]


def _scores(found: Mapping[str, Any]) -> Iterator[HarnessScore]:
    for task, figures in found.get("results", {}).items():
        samples = int(found.get("n-samples", {}).get(task, {}).get("effective", 0))
        for metric, value in figures.items():
            name, _, filtered = metric.partition(",")
            if filtered and not name.endswith("_stderr") and isinstance(value, int | float):
                error = figures.get(f"{name}_stderr,{filtered}")
                yield HarnessScore(task, metric, float(value), samples, _interval(name, value, samples, error))


def _interval(name: str, value: float, samples: int, error: Any) -> tuple[float, float] | None:
    if name in _SHARES and samples and 0 <= value <= 1:
        return wilson(round(value * samples), samples)
    known = isinstance(error, int | float)
    return (value - _NORMAL * error, value + _NORMAL * error) if known else None
