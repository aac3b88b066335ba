"""Few-shot classification: a model is shown examples with their labels, and the label of a row is the likeliest one.

As in the evaluation of SUBLLM (arXiv 2406.06571, table 2) and GPT-3 (arXiv 2005.14165, section 2.4). The score of a
label is the log-probability of its tokens after the prompt. It decides by itself by default: the labels of a task are
few and given, and the sum is the probability of the label as a whole, as a classifier needs it. The mean by token or by
byte, which harnesses use where answers differ much in length, favours labels whose ends are easily guessed.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from longwave.data.tokenizer import Tokenizer
from longwave.errors import UserError, require
from longwave.evaluation.likelihood import Question, answer_scores, shared_beginning
from longwave.evaluation.synthetic import NAME, synthetic
from longwave.evaluation.tasks import Row, Task, from_file
from longwave.intervals import wilson
from longwave.machine import not_finite
from longwave.model import Decoder
from longwave.units import counted

SHOTS = 4
_SEPARATOR = "\n\n"


@dataclass(frozen=True)
class FewShot:
    """How well a model labels the rows of a task, from examples in its prompt.

    shots: examples in every prompt; asked: how many were asked for, more where not all fit into the context window.
    rows: number of tested rows. accuracy: share of them whose label has the largest log-probability. interval: of the
    accuracy, 95 % (Wilson's, for these examples: others are drawn with other seeds). per_token, per_byte: accuracy by
    the log-probability of a token or a byte of the label instead. calibrated: accuracy after the mean log-probability
    of each label over the tested rows is taken off, which evens out what a model likes to say whatever it is shown
    (Zhou et al. 2023, arXiv 2309.17249). chance: accuracy of guessing. majority: accuracy of
    always answering with the label that most tested rows have. labels: tested rows of each label. predicted: how often
    each was chosen.
    """

    task: str
    shots: int
    asked: int
    seed: int
    rows: int
    accuracy: float
    interval: tuple[float, float]
    per_token: float
    per_byte: float
    calibrated: float
    chance: float
    majority: float
    labels: Mapping[str, int]
    predicted: Mapping[str, int]


def named_task(name: str | Path, template: str | None = None, seed: int = 0) -> Task:
    """A task by its name, `synthetic`, which has a template of its own, or from a file of rows."""
    return synthetic(seed) if str(name) == NAME else from_file(name, template)


def few_shot(model: Decoder, task: Task, *, shots: int = SHOTS, seed: int = 0, limit: int | None = None) -> FewShot:
    """Scores every label of every tested row, and counts how often the likeliest is the right one.

    shots: examples in the prompt, which `seed` draws once for all rows; fewer where they do not fit into the context
        window with the longest row. limit: only the first so many of the tested rows.
    Raises UserError for more shots than rows to draw from, and for a row longer than the context window; MachineError
    for scores that are not finite.
    """
    require(shots >= 0, f"shots = {shots}: 0 examples or more")
    require(limit is None or limit > 0, f"limit = {limit}: 1 row or more")
    require(model.tokenizer is not None, "this model has no tokenizer, which few-shot tasks need: set model.tokenizer")
    assert model.tokenizer is not None
    rows, labels = task.tested[:limit], task.labels
    questions, used = _fitting(model, task, rows, shots, seed)
    scores = answer_scores(model, questions)
    for row, found in zip(rows, scores, strict=True):
        worst = next((score for score in found if not math.isfinite(score)), None)
        if worst is not None:
            raise not_finite(f"{row.where}: log-probability of a label", worst, model.embed.weight.dtype)
    return _judged(task, rows, labels, questions, scores, (used, shots, seed))


def _fitting(model: Decoder, task: Task, rows: Sequence[Row], shots: int, seed: int) -> tuple[list[Question], int]:
    """The questions, with as many examples as fit into the context window for every row, and their number."""
    assert model.tokenizer is not None
    window, sizes = model.config.context_window, list[int]()
    for used in range(shots, -1, -1):
        prompt = "".join(task.template.example(row) + _SEPARATOR for row in task.examples(used, seed))
        questions = _questions(model.tokenizer, task, prompt, rows)
        sizes = [len(one.context) + max(map(len, one.answers)) - 1 for one in questions]
        if max(sizes) <= window:
            return questions, used
    longest = max(range(len(rows)), key=sizes.__getitem__)
    size = f"{rows[longest].where}: {counted(sizes[longest], 'token')} without any example"
    raise UserError(f"{size}; the model's context_window is {window:,}")


def _questions(tokenizer: Tokenizer, task: Task, prompt: str, rows: Sequence[Row]) -> list[Question]:
    """Every row as a question: its context is what the prompt and all answers have in common, token by token.

    A tokenizer may join the end of the prompt with a label. Such tokens belong to the answers.
    """
    labels = task.labels
    asked = [prompt + task.template.question(row) for row in rows]
    texts = [text + end for text in asked for end in ("", *labels)]
    ids = [tokenizer.opening + found for found in tokenizer.encode_batch(texts)]
    found = list[Question]()
    for start, row in zip(range(0, len(ids), len(labels) + 1), rows, strict=True):
        alone, *answered = ids[start : start + len(labels) + 1]
        context = shared_beginning([alone, *(one[:-1] for one in answered)])
        require(bool(context), f"{row.where}: nothing stands before the label; give a template that begins with text")
        found.append(Question(context, [one[len(context) :] for one in answered]))
    return found


def _judged(
    task: Task,
    rows: Sequence[Row],
    labels: Sequence[str],
    questions: Sequence[Question],
    scores: Sequence[Sequence[float]],
    drawn: tuple[int, int, int],
) -> FewShot:
    tokens = [[len(answer) for answer in question.answers] for question in questions]
    sizes = [len(label.encode()) for label in labels]
    chosen = [_best(found) for found in scores]
    right = _right(rows, labels, chosen)
    by_token = [_best([s / n for s, n in zip(*pair, strict=True)]) for pair in zip(scores, tokens, strict=True)]
    by_byte = [_best([s / n for s, n in zip(found, sizes, strict=True)]) for found in scores]
    means = [sum(column) / len(rows) for column in zip(*scores, strict=True)]
    calibrated = [_best([score - mean for score, mean in zip(found, means, strict=True)]) for found in scores]
    counts, predicted = Counter(row.label for row in rows), Counter(labels[one] for one in chosen)
    return FewShot(
        task.name,
        *drawn,
        len(rows),
        right / len(rows),
        wilson(right, len(rows)),
        _right(rows, labels, by_token) / len(rows),
        _right(rows, labels, by_byte) / len(rows),
        _right(rows, labels, calibrated) / len(rows),
        1 / len(labels),
        max(counts.values()) / len(rows),
        {label: counts[label] for label in labels},
        {label: predicted[label] for label in labels},
    )


def _best(scores: Sequence[float]) -> int:
    return max(range(len(scores)), key=scores.__getitem__)


def _right(rows: Sequence[Row], labels: Sequence[str], chosen: Sequence[int]) -> int:
    return sum(row.label == labels[one] for row, one in zip(rows, chosen, strict=True))
