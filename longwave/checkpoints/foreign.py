"""Foreign formats: one declarative table of names per format, read in both directions, and configs read strictly."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

from torch import Tensor

from longwave.checkpoints.filling import ReadOptions, StoredTensor, empty, fill
from longwave.checkpoints.generation import IDS
from longwave.checkpoints.names import flat_names
from longwave.checkpoints.weights import Weights
from longwave.config import MOST, ModelConfig
from longwave.errors import UserError, shown
from longwave.files.jsonfile import plain
from longwave.model import Decoder

T = TypeVar("T")
Numbering = Mapping[str, Sequence[int]]

_HOLES = {"i": r"(?P<i>\d+)", "leaf": "(?P<leaf>weight|bias)"}


@dataclass(frozen=True)
class Row:
    """One line of a name table: the name of a foreign tensor, and the flat name of the native tensor in it.

    `{i}` stands for the number of a block or a resampler and `{leaf}` for weight or bias; a foreign name may count in
    another order, which a `Numbering` gives by the hole's name. A foreign tensor that several rows name holds their
    native tensors one after the other along the first dimension. as_row: it is a matrix (1, n) where ours is a vector.
    """

    theirs: str
    ours: str
    as_row: bool = False

    @cached_property
    def pattern(self) -> re.Pattern[str]:
        """Matches the native names that this row maps."""
        parts = re.split(r"\{(\w+)\}", self.ours)  # text and holes in turn
        return re.compile("".join(_HOLES[part] if at % 2 else re.escape(part) for at, part in enumerate(parts)))

    def foreign_name(self, holes: Mapping[str, str], numbering: Numbering) -> str:
        """The foreign name, given the text in the holes of the native one."""
        used = {name: order[int(holes["i"])] for name, order in numbering.items() if f"{{{name}}}" in self.theirs}
        return self.theirs.format(**holes, **used)


def stored_tensors(
    native: Iterable[str], table: Sequence[Row], numbering: Numbering | None = None
) -> dict[str, StoredTensor]:
    """The tensors of a foreign folder by name, for a model that has the given native ones."""
    names, stored = list(native), dict[str, StoredTensor]()
    for row in table:
        for match in filter(None, map(row.pattern.fullmatch, names)):
            theirs = row.foreign_name(match.groupdict(), numbering or {})
            stored.setdefault(theirs, StoredTensor(as_row=row.as_row)).ours.append(match[0])
    return stored


def assemble(
    config: ModelConfig,
    weights: Weights,
    table: Sequence[Row],
    source: str,
    options: ReadOptions,
    *,
    numbering: Numbering | None = None,
) -> Decoder:
    """A model with the weights of a foreign folder; the buffers of brackets, which it does not store, are reset.

    source: where the config comes from. UserError for a missing, unexpected or misshapen tensor, by its foreign name.
    """
    model = empty(config, weights, source)
    for bracket in model.brackets:
        bracket.reset()
    return fill(model, weights, stored_tensors(flat_names(model).values(), table, numbering), options)


def disassemble(model: Decoder, table: Sequence[Row], numbering: Numbering | None = None) -> dict[str, Tensor]:
    """The weights of a model under their foreign names; the buffers of brackets have none."""
    names = flat_names(model)
    native = {names[name]: tensor for name, tensor in model.state_dict().items()}
    stored = stored_tensors(native, table, numbering)
    left = set(native) - {name for tensor in stored.values() for name in tensor.ours}
    assert not left & {names[name] for name, _ in model.named_parameters()}, left
    return {theirs: tensor.join(native) for theirs, tensor in stored.items()}


@dataclass(frozen=True)
class ForeignConfig:
    """The values of a foreign `config.json`; errors name the file, the key, its value and what is supported."""

    values: Mapping[str, Any]
    source: str

    def get(self, key: str, kind: type[T], default: T | None = None) -> T:
        """The value of a key, which must be of the given kind; null means the default, or missing without one."""
        value = self.values.get(key)
        if value is None:
            if default is None:
                raise UserError(f"{self.source}: {key} is missing")
            return default
        if kind is float and type(value) is int and abs(value) < 1 << 53:
            value = float(value)
        if type(value) is not kind:
            raise self.error(key, f"expected {kind.__name__}")
        return value

    def positive(self, key: str, default: int | None = None) -> int:
        """The value of a key, which must be a whole number of at least 1."""
        value = self.get(key, int, default)
        if not 0 < value <= MOST:
            raise self.error(key, f"1 or more, at most {MOST}")
        return value

    def numbers(self, key: str) -> list[float]:
        """The value of a key, which must be a list of numbers."""
        value = self.get(key, list)
        if not all(type(one) in (int, float) for one in value):
            raise self.error(key, "expected a list of numbers")
        return value

    def only(self, key: str, *supported: Any) -> None:
        """Refuses a value that is not among the supported ones; null and absence are fine."""
        if self.values.get(key) not in (None, *supported):
            raise self.error(key, f"supported: {', '.join(map(repr, supported)) or 'none'}")

    def error(self, key: str, what: str) -> UserError:
        """An error about the value of a key."""
        return UserError(f"{self.source}: {plain(key)} = {shown(self.values.get(key))}: {what}")


def respelled(
    new: dict[str, Any], original: dict[str, Any], read: Callable[[dict[str, Any], str], ModelConfig]
) -> dict[str, Any]:
    """The `config.json` to save: the keys and spellings of the original one as far as they still describe the model.

    new: the content that longwave writes for the model. original: of the folder that the model was loaded from.
    read: `Format.config`. The first of three that reads as the model's config is taken: the original with the new dtype
    and ids of special tokens; the new one with keys that only the original has; the new one alone.
    """
    dtype = {key: new["dtype"] for key in ("dtype", "torch_dtype") if key in original and "dtype" in new}
    ids = {name: new.get(name) for name in IDS if original.get(name) is not None}
    meant = read(new, "config.json")
    for candidate in (original | dtype | ids, original | new | dtype):
        with suppress(UserError):
            if read(candidate, "config.json") == meant:
                return candidate
    return new


def refuse_unless(condition: bool, format: str, field_: str, value: object, legal: str) -> None:
    """Raises UserError unless the condition holds: a field of the config keeps the model out of a foreign format."""
    if not condition:
        raise UserError(f"format = {format!r} cannot hold this model: {field_} = {value!r}; {legal}")
