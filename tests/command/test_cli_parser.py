"""Command lines derived from dataclasses: what each type of a field means, and what is refused."""

from __future__ import annotations

from dataclasses import dataclass, make_dataclass
from typing import Any, Literal

import pytest

from longwave.cli.options import Options, argument, option
from longwave.cli.parser import Group, Parser, Verb, add_verbs
from longwave.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Base(Options):
    size: int = option("of a base", default=3)


@dataclass(frozen=True, kw_only=True)
class Walk(Base):
    start: str = argument("where")
    others: tuple[str, ...] = argument("more places", default=(), metavar="PLACE")
    gait: Literal["slow", "fast"] | None = option("how; as it comes by default")
    pace: float = option("steps per second", default=0.5)
    seen: tuple[int, ...] = option("what was seen", default=(), metavar="N")
    far_away: bool = option("to the end", default=False)
    literal: str | None = option("another name", name="--word")


@dataclass(frozen=True, kw_only=True)
class Rest(Options):
    place: str | None = argument("where", default=None)


def parser() -> Parser:
    made = Parser(prog="go")
    walk, rest = (Verb(kind.__name__.lower(), "what it does", kind, vars) for kind in (Walk, Rest))
    add_verbs(made, [walk, Group("more", "verbs below", "KIND", [rest])])
    return made


def read(*words: str) -> Options:
    return parser().read(words)[1]


@pytest.mark.parametrize(
    ("words", "options"),
    [
        (["walk", "home"], Walk(start="home")),
        (["walk", "a", "b", "c"], Walk(start="a", others=("b", "c"))),
        (
            ["walk", "a", "b", "--pace", "2", "c", "--json", "d"],
            Walk(start="a", others=("b", "c", "d"), pace=2.0, json=True),
        ),
        (["walk", "a", "--gait", "slow", "--size", "4"], Walk(start="a", gait="slow", size=4)),
        (["walk", "a", "--seen", "1", "--seen", "2"], Walk(start="a", seen=(1, 2))),
        (["walk", "a", "--far-away", "--word", "x"], Walk(start="a", far_away=True, literal="x")),
        (["walk", "--word=--", "a"], Walk(start="a", literal="--")),
        (["walk", "--", "a"], Walk(start="a")),
        (["more", "rest"], Rest()),
        (["more", "rest", "here"], Rest(place="here")),
    ],
)
def test_what_is_read(words: list[str], options: Options):
    assert read(*words) == options


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], r"give a VERB, one of the above \(see go --help\)"),
        (["wlak"], r"no verb 'wlak'; did you mean walk\? \(see go --help\)"),
        (["fly"], r"no verb 'fly'; use one of walk, more \(see go --help\)"),
        (["--", "walk"], "no verb '--'; use one of walk, more"),
        (["--word"], r"unrecognised argument '--word' \(see go --help\)"),
        (["walk"], r"required: start \(see go walk --help\)"),
        (["walk", "a", "--size", "big"], "--size: invalid int value: 'big'"),
        (["walk", "a", "--size"], "--size: expected one argument; one that begins with - is written --name=-value"),
        (["walk", "a", "--gait", "odd"], "--gait 'odd': use one of slow, fast"),
        (["walk", "a", "--gait=--"], "--gait '--': use one of slow, fast"),
        (["walk", "a", "--size=--"], "--size: invalid int value: '--'"),
        (["walk", "a", "--unknown"], r"unrecognised argument '--unknown' \(see go walk --help\)"),
        (["walk", "a", "--gate", "slow"], "'--gate'; did you mean --gait?"),
        (["walk", "a", "--pac=1"], "'--pac=1'; did you mean --pace?"),
        (["more", "rest", "a", "b"], r"unrecognised argument 'b' \(see go more rest --help\)"),
        (["more"], r"give a KIND, one of the above \(see go more --help\)"),
        (["more", "rset"], "no kind 'rset'; did you mean rest?"),
    ],
)
def test_what_is_refused(words: list[str], says: str):
    with pytest.raises(UserError, match=says):
        read(*words)


def test_a_line_without_a_verb_shows_the_verbs_where_errors_stand(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(UserError):
        read()
    out, err = capsys.readouterr()
    assert out == ""
    assert "walk  " in err
    assert "more  " in err


def test_help_tells_defaults_and_begins_with_the_verbs_own_options(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        read("walk", "--help")
    shown = " ".join(capsys.readouterr().out.split())
    assert "steps per second (0.5)" in shown
    assert "of a base (3)" in shown
    assert "as it comes by default --pace" in shown
    assert "to the end --word" in shown
    assert "start [PLACE ...]" in shown
    assert shown.rindex("--word") < shown.rindex("--size") < shown.rindex("--json")


@pytest.mark.parametrize("kind", [dict, int | str, tuple[list[str], ...]])
def test_a_type_that_no_word_can_have_is_an_error(kind: Any):
    odd = make_dataclass("Odd", [("field", kind, option("odd"))], bases=(Options,), frozen=True, kw_only=True)
    with pytest.raises(TypeError, match="no type of a value on a command line"):
        add_verbs(Parser(prog="go"), [Verb("odd", "odd", odd, vars)])
