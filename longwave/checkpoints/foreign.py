"""Foreign layouts: one declarative table of names per layout, read in both directions, and configs read strictly."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeVar

import torch
from torch import Tensor

from longwave.checkpoints.names import flat_names
from longwave.checkpoints.weights import assign, check
from longwave.config import ModelConfig
from longwave.errors import UserError
from longwave.model import Decoder

T = TypeVar("T")
Numbering = Mapping[str, Sequence[int]]

_HOLES = {"i": r"(?P<i>\d+)", "leaf": "(?P<leaf>weight|bias)"}


@dataclass(frozen=True)
class Row:
    """One line of a name table: the name of a foreign tensor, and the flat native name of what it holds.

    `{i}` stands for the number of a block or a resampler and `{leaf}` for weight or bias; a foreign name may count in
    another order, which a `Numbering` gives by the hole's name. A foreign name in several rows holds those tensors one
    after the other along their first dimension. as_row: it is a matrix (1, n) where ours is a vector (n,).
    """

    theirs: str
    ours: str
    as_row: bool = False

    @cached_property
    def pattern(self) -> re.Pattern[str]:
        """Matches the native names that this row is about."""
        parts = re.split(r"\{(\w+)\}", self.ours)  # text and holes in turn
        return re.compile("".join(_HOLES[part] if at % 2 else re.escape(part) for at, part in enumerate(parts)))

    def foreign_name(self, holes: Mapping[str, str], numbering: Numbering) -> str:
        """The foreign name, given what stands in the holes of the native one."""
        used = {name: order[int(holes["i"])] for name, order in numbering.items() if f"{{{name}}}" in self.theirs}
        return self.theirs.format(**holes, **used)


@dataclass
class Holding:
    """What a foreign tensor holds: native tensors by name, one after the other along their first dimension."""

    ours: list[str] = field(default_factory=list)
    as_row: bool = False

    def shape(self, shapes: Mapping[str, torch.Size]) -> torch.Size:
        """The shape of the foreign tensor, given those of the native ones."""
        first, *rest = shapes[self.ours[0]]
        together = (sum(shapes[name][0] for name in self.ours), *rest)
        return torch.Size((1, first) if self.as_row else together)

    def take(self, tensor: Tensor, shapes: Mapping[str, torch.Size]) -> dict[str, Tensor]:
        """The native tensors in a foreign one, as views of it."""
        pieces = (tensor[0] if self.as_row else tensor).split([shapes[name][0] for name in self.ours])
        return dict(zip(self.ours, pieces, strict=True))

    def give(self, native: Mapping[str, Tensor]) -> Tensor:
        """The foreign tensor."""
        tensors = [native[name] for name in self.ours]
        together = tensors[0] if len(tensors) == 1 else torch.cat(tensors)
        return together.unsqueeze(0) if self.as_row else together


def holdings(native: Iterable[str], table: Sequence[Row], numbering: Numbering | None = None) -> dict[str, Holding]:
    """The foreign names of a model that has the given native ones, and what each holds."""
    names, held = list(native), dict[str, Holding]()
    for row in table:
        for match in filter(None, map(row.pattern.fullmatch, names)):
            theirs = row.foreign_name(match.groupdict(), numbering or {})
            held.setdefault(theirs, Holding(as_row=row.as_row)).ours.append(match[0])
    return held


def assemble(
    config: ModelConfig,
    tensors: Mapping[str, Tensor],
    table: Sequence[Row],
    source: str,
    *,
    numbering: Numbering | None = None,
    dtype: torch.dtype | None = None,
) -> Decoder:
    """A model with the weights of a foreign folder; what that layout does not store (thresholds) has its default.

    dtype: of the weights; as they come by default. UserError for a missing, unexpected or misshapen tensor, under its
    foreign name.
    """
    with torch.device("meta"):
        model = Decoder(config)
    for resampler in model.resamplers:
        resampler.threshold = type(resampler.threshold)()
    names = flat_names(model)
    own = {names[name]: tensor for name, tensor in model.state_dict(keep_vars=True).items()}
    shapes = {name: tensor.shape for name, tensor in own.items()}
    held = holdings(own, table, numbering)
    check({theirs: holding.shape(shapes) for theirs, holding in held.items()}, tensors, source)
    native = {name: tensor for name, tensor in own.items() if not tensor.is_meta}
    for theirs, holding in held.items():
        native |= holding.take(tensors[theirs], shapes)
    assign(model, native, names, source)
    return (model if dtype is None else model.to(dtype)).eval()


def disassemble(model: Decoder, table: Sequence[Row], numbering: Numbering | None = None) -> dict[str, Tensor]:
    """The weights of a model under their foreign names; thresholds have none."""
    names = flat_names(model)
    native = {names[name]: tensor for name, tensor in model.state_dict().items()}
    held = holdings(native, table, numbering)
    left = set(native) - {name for holding in held.values() for name in holding.ours}
    assert all(".threshold." in name for name in left), left
    return {theirs: holding.give(native) for theirs, holding in held.items()}


def without_tied_head(tensors: dict[str, Tensor], head: str, embedding: str, source: str) -> dict[str, Tensor]:
    """The tensors of a tied model without the second copy of its embedding, which a folder may hold if it is equal."""
    if head not in tensors or embedding not in tensors:
        return tensors
    if not torch.equal(tensors[head], tensors[embedding]):
        raise UserError(f"{source}: tensor {head} differs from {embedding}, yet the config ties them")
    return {name: tensor for name, tensor in tensors.items() if name != head}


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
        if kind is float and type(value) is int:
            value = float(value)
        if type(value) is not kind:
            raise self.error(key, f"expected {kind.__name__}")
        return value

    def only(self, key: str, *supported: Any) -> None:
        """Refuses a value that is not among the supported ones; null and absence are fine."""
        if self.values.get(key) not in (None, *supported):
            raise self.error(key, f"supported: {', '.join(map(repr, supported)) or 'none'}")

    def error(self, key: str, what: str) -> UserError:
        """An error about the value of a key."""
        return UserError(f"{self.source}: {key} = {self.values.get(key)!r}: {what}")


def refuse_unless(condition: bool, layout: str, field_: str, value: object, legal: str) -> None:
    """A UserError that a model cannot be written in a foreign layout because of one field of its config."""
    if not condition:
        raise UserError(f"layout = {layout!r} cannot hold this model: {field_} = {value!r}; {legal}")
