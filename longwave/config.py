"""The settings of a model: small frozen dataclasses, one per component; a key that none of them knows is an error."""

from __future__ import annotations

import dataclasses
import math
from collections import abc
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import cached_property
from importlib import import_module
from typing import Annotated, Any, ClassVar, Literal, TypeVar, cast, get_args, get_origin, get_type_hints

from pydantic import ConfigDict, Discriminator, GetCoreSchemaHandler, TypeAdapter, ValidationError
from pydantic_core import core_schema

from longwave.errors import UserError, require, shown, within
from longwave.layout import Layout, parse
from longwave.problems import Keys, told

T = TypeVar("T")
MOST = 1 << 27  # of any size: what a matrix of two such sizes holds can still be counted in 64 bits


class Strict:
    """Base of every config: a key that no field knows is an error.

    only_training: fields that say how a part is trained, and nothing of what it computes afterwards.
    """

    only_training: ClassVar[frozenset[str]] = frozenset()
    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")


def build(kind: type[T], values: dict[str, Any], source: str, at: str = "") -> T:
    """Makes a config from plain values; a UserError names the key, its value and what would do.

    source: where the values come from, such as the path of a recipe. at: the table of the source that they are.
    """
    with within(source):
        try:
            return TypeAdapter(kind).validate_python(values)
        except ValidationError as error:
            raise UserError(_told(kind, error, at)) from None


def _told(kind: type, error: ValidationError, at: str) -> str:
    keys, problems = _keys(kind), error.errors()
    for problem in problems if at else ():
        problem["loc"] = (at, *problem["loc"])
    return told(problems, {at: keys} if at else keys)


def _keys(hint: Any) -> Keys:
    """The keys of a config, or of whatever a field of one may hold."""
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        hints = get_type_hints(hint)
        own = {entry.name: hints[entry.name] for entry in dataclasses.fields(hint) if entry.name != "tables"}
        own |= _kinds() if issubclass(hint, _Tables) else {}
        return {name: _keys(held) for name, held in own.items()}
    if get_origin(hint) is abc.Mapping:
        return {"*": _keys(get_args(hint)[1])}
    return {name: below for one in get_args(hint) for name, below in _keys(one).items()}


@dataclass(frozen=True)
class LinearScaling(Strict):
    """Position interpolation: positions count in units of `factor` (Chen et al. 2023)."""

    factor: float
    kind: Literal["linear"] = "linear"

    def __post_init__(self) -> None:
        _check_scaling(factor=self.factor)


@dataclass(frozen=True)
class Llama3Scaling(Strict):
    """Llama 3.1's: wavelengths above original_window / low_freq_factor are stretched by `factor`, those below
    original_window / high_freq_factor are kept, and a ramp joins them.

    original_window: tokens of a window before the stretching.
    """

    factor: float
    original_window: int
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    kind: Literal["llama3"] = "llama3"

    def __post_init__(self) -> None:
        _check_scaling(factor=self.factor, original_window=self.original_window)
        low, high = self.low_freq_factor, self.high_freq_factor
        require(0 < low < high < math.inf, f"rotary.scaling.high_freq_factor = {high}: more than low_freq_factor {low}")


@dataclass(frozen=True)
class YarnScaling(Strict):
    """YaRN (Peng et al. 2023): channels that turn less than `beta_slow` times in `original_window` tokens are stretched
    by `factor`, those that turn more than `beta_fast` times are kept, and a ramp over the channels joins them.

    attention_factor: on cosines and sines; 0.1 ln(factor) + 1 by default. truncate: the ramp begins and ends at whole
    channels.
    """

    factor: float
    original_window: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    truncate: bool = True
    kind: Literal["yarn"] = "yarn"

    def __post_init__(self) -> None:
        attention = 1.0 if self.attention_factor is None else self.attention_factor
        _check_scaling(factor=self.factor, original_window=self.original_window, attention_factor=attention)
        slow, fast = self.beta_slow, self.beta_fast
        require(0 < slow < fast < math.inf, f"rotary.scaling.beta_fast = {fast}: more than beta_slow = {slow}")


@dataclass(frozen=True)
class LongRopeScaling(Strict):
    """LongRoPE (Ding et al. 2024): every pair of channels has a factor of its own by which its wavelength is stretched.

    A model whose `context_window` is larger than `original_window` turns by `long_factors` at every position, any other
    by `short_factors`. Published code switches from short to long once a sequence has grown past `original_window`,
    which leaves keys in the cache that were turned by other angles than the queries that meet them; here an angle is a
    function of the position alone. So prompts short enough for the short factors come out as published when
    `context_window` is set to `original_window`.

    attention_factor: on cosines and sines.
    """

    short_factors: tuple[float, ...]
    long_factors: tuple[float, ...]
    original_window: int
    attention_factor: float = 1.0
    kind: Literal["longrope"] = "longrope"

    def __post_init__(self) -> None:
        _check_scaling(original_window=self.original_window, attention_factor=self.attention_factor)
        for name in ("short_factors", "long_factors"):
            legal = all(0 < factor < math.inf for factor in getattr(self, name))
            require(legal, f"rotary.scaling.{name}: every factor is a number above 0")

    def factors(self, context_window: int) -> tuple[float, ...]:
        """The factors by which a model of this context window turns."""
        return self.long_factors if context_window > self.original_window else self.short_factors


def _check_scaling(**positive: float) -> None:
    for name, value in positive.items():
        require(0 < value < math.inf, f"rotary.scaling.{name} = {value}: a number above 0")


RotaryScaling = LinearScaling | Llama3Scaling | YarnScaling | LongRopeScaling


@dataclass(frozen=True)
class RotaryConfig(Strict):
    """Rotary positions, half-split pairing (Su et al. 2021).

    scaling: how wavelengths are stretched beyond the window of the first training.
    """

    base: float = 10000.0
    scaling: Annotated[RotaryScaling, Discriminator("kind")] | None = None

    def __post_init__(self) -> None:
        require(1 < self.base < math.inf, f"rotary.base = {self.base}: more than 1")


@dataclass(frozen=True)
class ScalesConfig(Strict):
    """muP-style factors on the embedding, on every residual branch and on the logits."""

    embedding: float = 1.0
    residual: float = 1.0
    logits: float = 1.0

    def __post_init__(self) -> None:
        for name, value in dataclasses.asdict(self).items():
            require(math.isfinite(value), f"scales.{name} = {value}: a finite number")


@dataclass(frozen=True)
class InitConfig(Strict):
    """Initial weights: normal, truncated at 3 sigma, output projections of block l divided by sqrt(2 (l + 1)).

    embedding_std: hidden_size ** -0.5 by default.
    """

    std: float = 0.02
    embedding_std: float | None = None

    def __post_init__(self) -> None:
        require(0 < self.std < math.inf, f"init.std = {self.std}: more than 0")


_KINDS: dict[str, type] = {}


def register_tables(kinds: Mapping[str, type]) -> None:
    """Makes the tables of a part known to configs, by name."""
    for name, kind in kinds.items():
        known = _KINDS.setdefault(name, kind)
        assert known is kind or known.__qualname__ == kind.__qualname__, f"two parts give the table {name} two meanings"
        _KINDS[name] = kind


def _kinds() -> dict[str, type]:
    """Every table that some part reads, and its config."""
    import_module("longwave.model")  # by name, since parts are built on this module: whoever has it has all of them
    return _KINDS


class _Tables(Strict):
    """Base of configs that hold one table for each kind of part that reads it: `attention`, `mlp`, `lightning`, ...

    Each table is a config of its own, which the file of its part defines; here they are known by name only.
    """

    tables: Mapping[str, Any]

    def __init__(self, *values: Any, **named: Any) -> None:
        entries = [entry for entry in dataclasses.fields(self) if entry.name != "tables"]  # pyright: ignore[reportArgumentType]
        given = _by_place(type(self).__name__, entries, values) | named
        if twice := [entry.name for entry in entries[: len(values)] if entry.name in named]:
            raise TypeError(f"fields given twice: {', '.join(twice)}")
        for entry in entries:
            object.__setattr__(self, entry.name, given.pop(entry.name) if entry.name in given else _default(entry))
        tables = {**given.pop("tables", {}), **given}
        object.__setattr__(self, "tables", {name: table for name, table in tables.items() if table is not None})
        for name, table in self.tables.items():
            _check_table(type(self).__name__, name, table)
        self.__post_init__()

    def __post_init__(self) -> None:
        """Checks what is common to all models."""

    def __getattr__(self, name: str) -> Any:
        """The table of this name, or None if it is not given."""
        if not name.startswith("_") and name in _kinds():
            return self.__dict__.get("tables", {}).get(name)
        raise AttributeError(f"{type(self).__name__} has no field {name}")

    def table(self, name: str) -> Any:
        """A table as it is given, or with its defaults; a UserError if it has none for some key."""
        if name in self.tables:
            return self.tables[name]
        try:
            return _kinds()[name]()
        except TypeError:
            needed = [entry.name for entry in dataclasses.fields(_kinds()[name]) if _is_needed(entry)]
            raise UserError(f"{name} is missing; a part in the layout needs it: give {name}.{needed[0]}") from None

    def to_dict(self) -> dict[str, Any]:
        """Plain values that `build` makes the same config from."""
        entries = dataclasses.fields(self)  # pyright: ignore[reportArgumentType]
        common = {entry.name: _plain(getattr(self, entry.name)) for entry in entries if entry.name != "tables"}
        return common | {name: _plain(table) for name, table in self.tables.items()}

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> core_schema.CoreSchema:
        """Validates the tables as fields of their own kinds, beside the common ones."""
        entries = [entry for entry in dataclasses.fields(cls) if entry.name != "tables"]  # pyright: ignore[reportArgumentType]
        types = get_type_hints(cls, include_extras=True)
        fields: list[Any] = [(entry.name, types[entry.name], _as_declared(entry)) for entry in entries]
        fields += [(name, kind | None, None) for name, kind in _kinds().items()]
        flat = dataclasses.make_dataclass(cls.__name__, fields, bases=(Strict,), frozen=True)
        return core_schema.no_info_after_validator_function(lambda one: cls(**vars(one)), handler.generate_schema(flat))


def _by_place(kind: str, entries: list[dataclasses.Field[Any]], values: tuple[Any, ...]) -> dict[str, Any]:
    """Values that were given without a name: those of the fields without a default alone, so that none is mistaken."""
    first = [entry.name for entry in entries if _is_needed(entry)]
    if len(values) > len(first):
        extra = values[len(first)]
        table = next((name for name, table in _kinds().items() if isinstance(extra, table)), None)
        rest = f"{table}={type(extra).__name__}(...)" if table else f"{entries[len(first)].name}={shown(extra)}"
        given = f"{len(values)} values by place, which only {', '.join(first)} can be"
        raise TypeError(f"{kind}: {given}; give the rest by name, such as {rest}")
    return dict(zip(first, values, strict=False))


def _check_table(kind: str, name: str, table: Any) -> None:
    """Raises TypeError for a table that no part reads, and for one that is not the config it should be."""
    known = _kinds()
    if name not in known:
        close = get_close_matches(name, [*known, *(entry.name for entry in dataclasses.fields(ModelConfig))], n=1)
        raise TypeError(f"{kind}: unexpected field {name}" + (f"; did you mean {close[0]}?" if close else ""))
    if not isinstance(table, known[name]):
        raise TypeError(f"{kind}: {name} = {shown(table)}: give {known[name].__name__}(...)")


def _is_needed(entry: dataclasses.Field[Any]) -> bool:
    """Whether a field has no default."""
    return entry.default is entry.default_factory is dataclasses.MISSING


def _default(entry: dataclasses.Field[Any]) -> Any:
    if entry.default_factory is not dataclasses.MISSING:
        return entry.default_factory()
    if entry.default is dataclasses.MISSING:
        raise TypeError(f"missing the field {entry.name}")
    return entry.default


def _as_declared(entry: dataclasses.Field[Any]) -> Any:
    """A field of the same default for another dataclass."""
    if entry.default_factory is not dataclasses.MISSING:
        return field(default_factory=entry.default_factory)
    return field() if entry.default is dataclasses.MISSING else field(default=entry.default)


def _plain(value: Any) -> Any:
    """A config, or a mapping of configs, as plain values."""
    if isinstance(value, Mapping):
        return {name: _plain(one) for name, one in cast("Mapping[str, Any]", value).items()}
    if isinstance(value, _Tables):
        return value.to_dict()
    return dataclasses.asdict(value) if dataclasses.is_dataclass(value) and not isinstance(value, type) else value


@dataclass(frozen=True, init=False)
class BlockConfig(_Tables):
    """A block of a letter of its own: its parts in order, how they are wired, and tables that stand in for the model's.

    parts: names of the table of parts, such as `window` and `mlp`. wiring: a name of `longwave.blocks.WIRINGS`.
    """

    parts: tuple[str, ...]
    wiring: str = "residual"
    tables: Mapping[str, Any] = field(default_factory=dict[str, Any])


@dataclass(frozen=True, init=False)
class ModelConfig(_Tables):
    """One decoder: vocabulary, width, layout, and a table for each kind of part.

    layout: the one-line notation of `longwave.layout`.
    context_window: the longest sequence the model is meant for, in tokens.
    blocks: block kinds of this model alone, by their letter in the layout.
    tables: the settings of its parts by name, which can also be given and read as fields: `attention`, `mlp`, ...
    """

    vocab_size: int
    hidden_size: int
    layout: str
    context_window: int = 2048
    rotary: RotaryConfig = field(default_factory=RotaryConfig)
    scales: ScalesConfig = field(default_factory=ScalesConfig)
    init: InitConfig = field(default_factory=InitConfig)
    norm_eps: float = 1e-5
    tie_embeddings: bool = False
    blocks: Mapping[str, BlockConfig] = field(default_factory=dict[str, BlockConfig])
    tables: Mapping[str, Any] = field(default_factory=dict[str, Any])

    def __post_init__(self) -> None:
        _ = self.parsed  # a layout that does not parse is refused first of all
        for name in ("vocab_size", "hidden_size", "context_window"):
            value = getattr(self, name)
            require(0 < value <= MOST, f"{name} = {value}: 1 or more, at most {MOST}")
        require(0 <= self.norm_eps < math.inf, f"norm_eps = {self.norm_eps}: a number of at least 0")
        for letter in self.blocks:
            named = len(letter) == 1 and letter.isascii() and letter.isupper()
            require(named, f"blocks.{letter}: a block is named by one letter from A to Z")

    @cached_property
    def parsed(self) -> Layout:
        """The layout as a tree."""
        return parse(self.layout)

    def completed(self, names: Iterable[str]) -> ModelConfig:
        """A copy in which these tables are filled in by their defaults, where they are not given and have them."""
        tables = dict(self.tables)
        for name in set(names) - set(tables):
            with suppress(UserError):
                tables[name] = self.table(name)
        return dataclasses.replace(self, tables=tables)

    def of_block(self, letter: str) -> ModelConfig:
        """This config as a block of the given letter sees it: with the block's own tables in place of the model's."""
        own: Mapping[str, Any] = self.blocks[letter].tables if letter in self.blocks else {}
        return dataclasses.replace(self, tables={**self.tables, **own}) if own else self
