"""How a verb declares what it takes: a frozen dataclass, one field per argument or option.

    @dataclass(frozen=True, kw_only=True)
    class Train(Options):
        recipe: str = argument("a TOML file")
        steps: int = option("optimizer steps", default=100)

makes `longwave train RECIPE [--steps STEPS]`; `longwave.cli.parser` says what each type of a field means.
"""

from __future__ import annotations

from dataclasses import MISSING, dataclass, field, fields
from typing import Any


def argument(help: str, *, default: Any = MISSING, metavar: str | None = None) -> Any:
    """A field that is given by its place; with a default it may be left out."""
    return field(default=default, metadata={"positional": True, "help": help, "metavar": metavar})


def option(help: str, *, default: Any = None, metavar: str | None = None, name: str | None = None) -> Any:
    """A field that is given by a name, `--field-name` unless another is chosen. The help ends with its default."""
    return field(default=default, metadata={"positional": False, "help": help, "metavar": metavar, "name": name})


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of every verb."""

    json: bool = option("print one JSON object as the last line", default=False)

    def keywords(self) -> dict[str, Any]:
        """The options by name, for the function of `longwave.verbs` that does what the verb does."""
        return {one.name: getattr(self, one.name) for one in fields(self) if one.name != "json"}


@dataclass(frozen=True, kw_only=True)
class OnDevice(Options):
    """Options of a verb that runs a model."""

    device: str = option("cpu, cuda, cuda:N, or auto: a GPU where there is one", default="auto")
