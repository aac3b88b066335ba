"""An argparse parser, derived from the verbs and the dataclasses of their options.

| type of a field | on the command line |
|---|---|
| `str`, `int`, `float` | one value |
| `Literal["a", "b"]` | one of these |
| `X`, or `None` | as X, and None where it is left out |
| `tuple[X, ...]` | any number of values; an option is repeated for each |
| `bool` | a switch without a value |

Any other type is a TypeError.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import MISSING, Field, dataclass, fields
from types import NoneType, UnionType
from typing import Any, Literal, NoReturn, Union, get_args, get_origin, get_type_hints

from longwave.cli.options import Options
from longwave.errors import UserError


@dataclass(frozen=True)
class Verb:
    """A verb: its name, what it does in a line, its options, and the function that returns what `--json` prints."""

    name: str
    help: str
    options: type[Options]
    run: Callable[[Any], dict[str, Any] | None]


@dataclass(frozen=True)
class Group:
    """Verbs below a common one, such as the kinds of `bench`. metavar: what such a verb is called in the help."""

    name: str
    help: str
    metavar: str
    verbs: Sequence[Verb]


class Parser(argparse.ArgumentParser):
    """Reads a command line; a wrong one is a UserError."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see {self.prog} --help)")

    def read(self, arguments: Sequence[str] | None = None) -> tuple[Verb, Options]:
        """The verb of a command line and its options.

        Arguments of any number may also follow options: argparse alone takes them in one place only.
        """
        known, rest = self.parse_known_args(arguments)
        given = vars(known)
        verb: Verb = given.pop("verb")
        many = _takes_many(verb.options)
        if any(word.startswith("-") for word in rest) or (rest and many is None):
            self.error(f"unrecognized arguments: {' '.join(rest)}")
        if rest and many is not None:
            given[many] = [*given.get(many, []), *rest]
        values: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in given.items()}
        return verb, verb.options(**values)  # what was not given has the dataclass's default


def add_verbs(parser: argparse.ArgumentParser, verbs: Sequence[Verb | Group], metavar: str = "VERB") -> None:
    """Adds a parser for each verb, and for those below it."""
    parsers = parser.add_subparsers(metavar=metavar, required=True)
    for verb in verbs:
        added = parsers.add_parser(verb.name, help=verb.help, description=verb.help)
        if isinstance(verb, Group):
            add_verbs(added, verb.verbs, verb.metavar)
        else:
            added.set_defaults(verb=verb)
            _add_fields(added, verb.options)


def _add_fields(parser: argparse.ArgumentParser, options: type[Options]) -> None:
    hints = get_type_hints(options)
    for field in _own_first(options):
        words = {"help": _help(field), "default": argparse.SUPPRESS, **_values(field, hints[field.name])}
        if field.metadata["positional"]:
            parser.add_argument(field.name, **words)
        else:
            name = field.metadata["name"] or f"--{field.name.replace('_', '-')}"
            parser.add_argument(name, dest=field.name, **words)


def _own_first(options: type[Options]) -> Iterator[Field[Any]]:
    """The fields of a dataclass: its own before those of its bases, so that help begins with what is special."""
    named = {field.name: field for field in fields(options)}
    for kind in options.__mro__[:-1]:
        yield from (named[name] for name in kind.__annotations__ if name in named)


def _takes_many(options: type[Options]) -> str | None:
    """The name of the argument that takes any number of values."""
    hints = get_type_hints(options)
    names = [field.name for field in fields(options) if field.metadata["positional"]]
    return next((name for name in names if get_origin(hints[name]) is tuple), None)


def _help(field: Field[Any]) -> str:
    """The help of a field, with its default where that is a value one could have given."""
    says = isinstance(field.default, str | int | float) and not isinstance(field.default, bool)
    return f"{field.metadata['help']} ({field.default})" if says else field.metadata["help"]


def _values(field: Field[Any], hint: Any) -> dict[str, Any]:
    """Keywords for argparse: how many values a field takes, of which type, and their name in the help."""
    if hint is bool:
        return {"action": "store_true"}
    positional, metavar = field.metadata["positional"], {"metavar": field.metadata["metavar"]}
    if get_origin(hint) is tuple:
        several = {"nargs": "*"} if positional else {"action": "append"}
        return several | metavar | _value(get_args(hint)[0])
    may_be_missing = {"nargs": "?"} if positional and field.default is not MISSING else {}
    return may_be_missing | metavar | _value(hint)


def _value(hint: Any) -> dict[str, Any]:
    if get_origin(hint) in (Union, UnionType) and NoneType in get_args(hint):
        return _value(Union[tuple(kind for kind in get_args(hint) if kind is not NoneType)])  # noqa: UP007
    if get_origin(hint) is Literal:
        return {"choices": get_args(hint)}
    if hint in (str, int, float):
        return {"type": hint}
    raise TypeError(f"{hint}: no type of a value on a command line")
