"""A config that could not be made, told in one line: which key it is, its value, and what would do."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from typing import Any

from pydantic_core import ErrorDetails

from longwave.errors import UserError, shown
from longwave.files.jsonfile import plain

Keys = Mapping[str, Any]
"""The keys of a config: each name with the keys below it; `*` stands for any name."""

MOVED = {"attention.window": "window.size"}  # keys of former versions, and what they are now
_UNKNOWN = ("unexpected_keyword_argument", "extra_forbidden")
_LISTS = ("tuple_type", "list_type")
_TABLES = ("dataclass_type", "dataclass_exact_type", "model_attributes_type", "dict_type", "mapping_type")


def told(problems: Sequence[ErrorDetails], keys: Keys) -> str:
    """The line for the first of several problems; an unknown key comes before a missing one, which it may stand for."""
    problem = min(problems, key=lambda one: one["type"] not in _UNKNOWN)  # the first of those that are least
    path, beside, below = _located(problem["loc"], keys, problem["type"] in _UNKNOWN)
    where, given, kind = ".".join(map(plain, path)), problem["input"], problem["type"]
    context = problem.get("ctx", {})
    if isinstance(cause := context.get("error"), UserError):
        return _joined(path, below, str(cause))
    if kind in _UNKNOWN:
        return f"unknown key {where} = {shown(given)}; {_instead(path, beside, keys)}"
    if kind == "missing":
        return f"{where} has too few values" if isinstance(problem["loc"][-1], int) else f"{where} is missing"
    if kind == "union_tag_invalid":
        tags = context["expected_tags"].replace("'", "")
        return f"{where}.kind = {shown(context['tag'])}: use one of {tags}"
    if kind == "union_tag_not_found":
        return f"{where}.kind is missing" if isinstance(given, Mapping) else f"{where} = {shown(given)}: a table"
    should = "a list" if kind in _LISTS else "a table" if kind in _TABLES else problem["msg"].lower()
    return f"{where} = {shown(given)}: {should}"


def _located(steps: Sequence[int | str], keys: Keys, unknown: bool) -> tuple[list[str], Keys, Keys]:
    """The names of a place in a config, the keys beside it and those below it.

    The tags of unions and the indices of lists are left out. unknown: whether the last name is no key.
    """
    path, beside = list[str](), keys
    for at, step in enumerate(steps):
        name = str(step) if step in keys else "*"
        if name in keys or (unknown and at == len(steps) - 1):
            path.append(str(step))
            beside, keys = keys, keys.get(name, {})
    return path, beside, keys


def _joined(path: Sequence[str], below: Keys, cause: str) -> str:
    """What a part of a config says of one of its own keys, with the place of that part before it."""
    named = re.match(r"\w+", cause)
    name = named[0] if named else ""
    if path and name == path[-1] and cause[len(name)] == ".":
        return ".".join([*path[:-1], cause])
    where = ".".join(path)
    return cause if not where else f"{where}.{cause}" if name in below else f"{where}: {cause}"


def _instead(path: Sequence[str], beside: Keys, keys: Keys) -> str:
    """The key that was meant: of a former version, the closest of the same table, or one that stands elsewhere."""
    written, *table = ".".join(path), *path[:-1]
    for former, now in MOVED.items():
        if written == former or written.endswith(f".{former}"):
            return f"it is now {written.removesuffix(former)}{now}"
    if close := get_close_matches(path[-1], [name for name in beside if name != "*"], n=1):
        return f"did you mean {'.'.join([*table, close[0]])}?"
    elsewhere = {one.split(".")[-1]: one for one in reversed(list(_paths(keys)))}  # the outermost of each name
    if close := get_close_matches(path[-1], elsewhere, n=1, cutoff=0.8):
        return f"did you mean {elsewhere[close[0]]}?"
    return f"known: {', '.join(name for name in beside if name != '*')}"


def _paths(keys: Keys, before: str = "") -> Iterator[str]:
    """Every key with a name, dotted; those next to each other before those below them."""
    named = {name: below for name, below in keys.items() if name != "*"}
    yield from (f"{before}{name}" for name in named)
    for name, below in named.items():
        yield from _paths(below, f"{before}{name}.")
