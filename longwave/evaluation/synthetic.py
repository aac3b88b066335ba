"""A task that needs no data: a text of two of four words, of which only the examples tell which one is its label.

A model that repeats a word of the text comes to 50 %, against 25 % by chance; the rest is the rule, which the seed
draws: always the first word, or always the last.
"""

from __future__ import annotations

from longwave import draws
from longwave.evaluation.tasks import Row, Task, Template

NAME = "synthetic"
TRAIN_ROWS, TESTED_ROWS = 64, 256
TEMPLATE = Template("{first} {last}: {label}")
LABELS = ("cat", "dog", "car", "boy")


def synthetic(seed: int = 0) -> Task:
    """The task of a seed: which word is the label, and the rows. Each label is that of one row in four."""
    asked = "last" if draws.uniform(seed) < 0.5 else "first"
    rows = [_row(seed, number, asked) for number in range(TRAIN_ROWS + TESTED_ROWS)]
    return Task(NAME, TEMPLATE, rows[:TRAIN_ROWS], rows[TRAIN_ROWS:])


def _row(seed: int, number: int, asked: str) -> Row:
    label = number % len(LABELS)
    further = 1 + int(draws.uniform(seed, number) * (len(LABELS) - 1))
    fields = dict.fromkeys(("first", "last"), LABELS[(label + further) % len(LABELS)])
    return Row(f"{NAME}:{number + 1}", {**fields, asked: LABELS[label]}, LABELS[label])
