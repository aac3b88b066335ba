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
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import MISSING, Field, dataclass, fields
from difflib import get_close_matches
from types import NoneType, UnionType
from typing import Any, Literal, NoReturn, Union, get_args, get_origin, get_type_hints

from longwave.cli.options import Options
from longwave.errors import UserError, shown


@dataclass(frozen=True)
class Verb:
    """A verb: its name, what it does in a line, its options, and the function that returns what `--json` prints."""

    name: str
    help: str
    options: type[Options]
    run: Callable[[Any], object]


@dataclass(frozen=True)
class Group:
    """Verbs below a common one, such as the kinds of `bench`. metavar: what such a verb is called in the help."""

    name: str
    help: str
    metavar: str
    verbs: Sequence[Verb]


class Parser(argparse.ArgumentParser):
    """Reads a command line; a wrong one is a UserError.

    Options are given in full, so that no command changes its meaning with an option that is added later.
    below: what the verbs below it are called.
    """

    below: str = ""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**{"allow_abbrev": False, "formatter_class": _Help, **settings})

    def error(self, message: str) -> NoReturn:
        remedy = (
            "; one that begins with - is written --name=-value" if message.endswith("expected one argument") else ""
        )
        raise UserError(f"{message}{remedy} (see {self.prog} --help)")

    def read(self, arguments: Sequence[str] | None = None) -> tuple[Verb, Options]:
        """The verb of a command line and its options.

        Arguments of any number may also follow options: argparse alone takes them in one place only.
        """
        known, rest = self.parse_known_args(arguments)
        given = vars(known)
        parser: Parser = given.pop("parser")
        verb = given.pop("verb") or parser.ask(rest)
        many = _takes_many(verb.options)
        if unknown := [word for word in rest if word.startswith("-") or many is None]:
            parser.error(parser.unrecognised(unknown[0]))
        if rest and many is not None:
            given[many] = [*given.get(many, []), *rest]
        values: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in given.items()}
        return verb, verb.options(**values)  # what was not given has the dataclass's default

    def ask(self, rest: Sequence[str]) -> NoReturn:
        """Refuses a command line without a verb; shows the verbs if there is nothing else wrong with it."""
        if rest:
            self.error(self.unrecognised(rest[0]))
        self.print_help(sys.stderr)
        self.error(f"give a {self.below}, one of the above")

    def unrecognised(self, word: str) -> str:
        """What to say of a word that no option or argument takes."""
        close = get_close_matches(word.split("=")[0], self._option_string_actions, n=1)
        return f"unrecognised argument {shown(word)}" + (f"; did you mean {close[0]}?" if close else "")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        """Refuses a value that is not among the choices of an option, or names no verb."""
        if action.choices is None or value in action.choices:
            return
        known = [str(choice) for choice in action.choices]
        if isinstance(action, argparse._SubParsersAction):  # pyright: ignore[reportPrivateUsage]
            close = get_close_matches(str(value), known, n=1)
            meant = f"did you mean {close[0]}?" if close else f"use one of {', '.join(known)}"
            self.error(f"no {str(action.metavar).lower()} {shown(value)}; {meant}")
        self.error(f"{action.option_strings[0]} {shown(value)}: use one of {', '.join(known)}")

    def _get_values(self, action: argparse.Action, arg_strings: list[str]) -> Any:
        """The values of an argument; `--name=--` gives two dashes, which argparse takes for its own mark elsewhere."""
        if action.option_strings and arg_strings == ["--"]:
            value = self._get_value(action, "--")
            self._check_value(action, value)
            return value
        return super()._get_values(action, arg_strings)


class _Help(argparse.RawDescriptionHelpFormatter):
    """Help in which the name of every verb stands on the line of what it does."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=28)
        self._action_max_length = 14


def add_verbs(parser: Parser, verbs: Sequence[Verb | Group], metavar: str = "VERB") -> None:
    """Adds a parser for each verb, and for those below it. A parser to which none of them is given shows its help."""
    parsers = parser.add_subparsers(metavar=metavar, title=f"{metavar.lower()}s")
    parser.set_defaults(verb=None, parser=parser)
    parser.below = metavar
    for verb in verbs:
        text = f"{verb.help[:1].upper()}{verb.help[1:]}."
        added = parsers.add_parser(verb.name, help=verb.help, description=text)
        if isinstance(verb, Group):
            add_verbs(added, verb.verbs, verb.metavar)
        else:
            added.set_defaults(verb=verb, parser=added)
            _add_fields(added, verb.options)


def _add_fields(parser: argparse.ArgumentParser, options: type[Options]) -> None:
    hints = get_type_hints(options)
    for field in _own_first(options):
        words = {"help": _help(field), "default": argparse.SUPPRESS, **_values(field, hints[field.name])}
        if field.metadata["positional"]:
            action = parser.add_argument(field.name, **words)
            action.required = action.nargs not in ("*", "?")  # which some versions of Python list as missing
        else:
            name = field.metadata["name"] or f"--{field.name.replace('_', '-')}"
            parser.add_argument(name, dest=field.name, **words)


def _own_first(options: type[Options]) -> Iterator[Field[Any]]:
    """The fields of a dataclass: its own before those of its bases, so that help begins with what is special."""
    named = {field.name: field for field in fields(options)}
    for kind in options.__mro__[:-1]:
        yield from (named.pop(name) for name in kind.__annotations__ if name in named)


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
    positional, metavar = field.metadata["positional"], field.metadata["metavar"]
    if get_origin(hint) is tuple:
        several = {"nargs": "*"} if positional else {"action": "append"}
        return several | _value(get_args(hint)[0], metavar)
    may_be_missing = {"nargs": "?"} if positional and field.default is not MISSING else {}
    return may_be_missing | _value(hint, metavar)


def _value(hint: Any, metavar: str | None) -> dict[str, Any]:
    if get_origin(hint) in (Union, UnionType) and NoneType in get_args(hint):
        return _value(Union[tuple(kind for kind in get_args(hint) if kind is not NoneType)], metavar)  # noqa: UP007
    if get_origin(hint) is Literal:
        return {"choices": get_args(hint), "metavar": metavar}
    if hint in (str, int, float):
        return {"type": hint, "metavar": metavar or {int: "N", float: "X"}.get(hint)}
    raise TypeError(f"{hint}: no type of a value on a command line")
