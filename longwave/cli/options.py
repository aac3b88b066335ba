"""How a verb declares what it takes: a frozen dataclass, one field per argument or option.

    @dataclass(frozen=True, kw_only=True)
    class Train(Options):
        recipe: str = argument("a TOML file")
        steps: int = option("optimizer steps", default=100)

makes `longwave train RECIPE [--steps STEPS]`; `longwave.cli.parser` says what each type of a field means.
"""

from __future__ import annotations

from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any

from longwave.errors import UserError

DRAFT = "lookup, layers:N (its own first), a folder of a model or heads: drafts tokens that a model only checks"


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
        return {one.name: getattr(self, one.name) for one in fields(self) if one.name not in ("json", "revision")}


@dataclass(frozen=True, kw_only=True)
class OfModel(Options):
    """Options of a verb that takes a model, whose field of this name then holds the revision, too: `org/name@v1`."""

    model: str | None
    revision: str | None = option("of a model of the hub: a branch, a tag or a commit", metavar="REV")

    def __post_init__(self) -> None:
        if self.revision is None:
            return
        if self.model is None or Path(self.model).exists():
            raise UserError(f"--revision {self.revision}: of a model of the hub, such as org/name, and none is given")
        object.__setattr__(self, "model", f"{self.model}@{self.revision}")


@dataclass(frozen=True, kw_only=True)
class OnDevice(Options):
    """Options of a verb that runs a model."""

    device: str = option("cpu, cuda, cuda:N, or auto: a GPU where there is one", default="auto")
