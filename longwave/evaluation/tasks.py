"""Classification tasks: rows with a label, read from a file or made with a seed, and the template that asks for it."""

from __future__ import annotations

import string
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from longwave import draws
from longwave.data import formats
from longwave.data.rows import Rules
from longwave.errors import UserError, require, shown
from longwave.files.jsonfile import plain
from longwave.units import counted

TEMPLATE = "{text}\nLabel: {label}"
LABEL, SPLIT, TRAIN = "label", "split", "train"
TRAIN_SHARE = 0.25  # of the rows, where none say to which part they belong
_FORM = 'such as {"text": "...", "label": "..."}'


@dataclass(frozen=True)
class Row:
    """A row of a task. where: file and line, for error messages. fields: what the template reads. label: the answer."""

    where: str
    fields: Mapping[str, str]
    label: str


@dataclass(frozen=True)
class Template:
    """How a row is written: text in which `{name}` stands for a field of the row, and which ends with `{label}`."""

    text: str

    def __post_init__(self) -> None:
        try:
            pieces = [piece[1:] for piece in string.Formatter().parse(self.text) if piece[1] is not None]
        except ValueError:
            pieces = []
        names = [name for name, form, how in pieces if name and name.isidentifier() and not form and not how]
        once = names.count(LABEL) == 1 and self.text.endswith("{label}")
        what = "names fields of a row and ends with its label"
        good = len(names) == len(pieces) > 1 and once
        require(good, f"template = {shown(self.text)}: {what}, such as {shown(TEMPLATE)}")

    @cached_property
    def fields(self) -> tuple[str, ...]:
        """The fields that it reads, but for the label."""
        names = (name for _, name, _, _ in string.Formatter().parse(self.text) if name not in (None, LABEL))
        return tuple(dict.fromkeys(str(name) for name in names))

    def question(self, row: Row) -> str:
        """A row up to its label."""
        return self.text.removesuffix("{label}").format(**row.fields)

    def example(self, row: Row) -> str:
        """A row with its label."""
        return self.question(row) + row.label


@dataclass(frozen=True)
class Task:
    """Rows to be labelled. train: those that examples are drawn from. tested: the others."""

    name: str
    template: Template
    train: Sequence[Row]
    tested: Sequence[Row]

    @property
    def labels(self) -> list[str]:
        """All labels, sorted."""
        return sorted({row.label for row in (*self.train, *self.tested)})

    def examples(self, count: int, seed: int) -> list[Row]:
        """So many rows of the training part, drawn with the seed: the labels in turn, as evenly as there are rows.

        Raises UserError for more than there are.
        """
        there = len(self.train)
        require(0 <= count <= there, f"shots = {count}: {self.name} has {counted(there, 'row')} to draw examples from")
        drawn = sorted(range(there), key=lambda number: draws.uniform(seed, number))
        met, turns = Counter[str](), list[tuple[int, int, int]]()
        for place, number in enumerate(drawn):
            label = self.train[number].label
            turns.append((met[label], place, number))
            met[label] += 1
        chosen = [number for *_, number in sorted(turns)[:count]]
        # The order in which they stand is drawn once more, so that no label comes last more often than others.
        return [self.train[number] for number in sorted(chosen, key=lambda number: draws.uniform(seed, number, 1))]


def from_file(path: str | Path, template: str | None = None) -> Task:
    """The task in a file of rows: JSON on each line, or another of the kinds of `longwave prepare`.

    A row has a `label`, text or a whole number, and the fields that the template names: `text` by default. Rows whose
    `split` is `train` are those that examples are drawn from; where no row has a `split`, a quarter of them, which the
    number of the row alone decides, so that the tested rows are the same with any seed.
    Raises UserError naming the file and line.
    """
    form = Template(TEMPLATE if template is None else template)
    rows = [(_row(content, where, form), _split(content, where)) for content, where in _contents(Path(path), form)]
    name = plain(str(path))
    require(bool(rows), f"{name}: no rows; give {_FORM}, one on each line")
    found = {row.label for row, _ in rows}
    require(len(found) > 1, f"{name}: every label is {shown(next(iter(found)))}; a task has two labels or more")
    if all(split is None for _, split in rows):
        parts = [draws.uniform(number) < TRAIN_SHARE for number in range(len(rows))]
    else:
        parts = [split == TRAIN for _, split in rows]
    train, tested = ([row for (row, _), one in zip(rows, parts, strict=True) if one is part] for part in (True, False))
    require(bool(tested), f"{name}: no row is left to be tested; {len(train)} are for examples")
    return Task(name, form, train, tested)


def _contents(path: Path, form: Template) -> Iterator[tuple[Any, str]]:
    """The rows of a file, each with its place."""
    named = f"give a file of rows {_FORM}, synthetic, or a recall task such as single"
    require(path.is_file(), f"{plain(str(path))}: no such file; {named}")
    try:
        for piece in formats.read(path, Rules(form.fields[0])):
            require(isinstance(piece, formats.Row), f"{plain(str(path))}: text, not rows; give .jsonl, {_FORM}")
            assert isinstance(piece, formats.Row)
            yield piece.content, f"{plain(str(path))}{piece.place}"
    except formats.NotRead as error:
        raise UserError(f"{plain(str(path))}: not read ({error}); give .jsonl, {_FORM}") from error


def _row(content: Any, where: str, form: Template) -> Row:
    require(isinstance(content, dict), f"{where}: a {type(content).__name__}; each row must be a JSON object")
    fields = {name: _text(content, name, where) for name in form.fields}
    return Row(where, fields, _text(content, LABEL, where))


def _text(content: Mapping[str, Any], name: str, where: str) -> str:
    """A field as text, which whole numbers become, too."""
    require(name in content, f"{where}: no field {name!r}; the template reads it")
    value = content[name]
    text = str(value) if isinstance(value, str) or type(value) is int else ""
    require(bool(text.strip()), f"{where}: {name} = {shown(value)}: a text that is not empty, or a whole number")
    return text


def _split(content: Mapping[str, Any], where: str) -> str | None:
    split = content.get(SPLIT)
    require(split is None or isinstance(split, str), f"{where}: {SPLIT} = {shown(split)}: train, or test")
    return split
