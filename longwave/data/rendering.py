"""What runs in the process that renders chat templates (`confined.py`): Jinja in a sandbox, and nothing of longwave.

A template is a program of whoever made a model's folder. Jinja's sandbox keeps it from everything but its own text, and
not from taking hours or all memory: a number raised to a power, a string repeated, a loop within a loop. Here the
process is bounded by the system: it ends, whatever it is at, when a request takes too long or the memory too much.

Requests and replies are JSON, each behind its length in four bytes. A request opens a template or renders one.
"""

from __future__ import annotations

import json
import os
import re
import resource
import signal
import sys
from collections.abc import Iterator
from datetime import datetime
from itertools import chain
from typing import Any, BinaryIO, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

SECONDS = 1.0  # of a processor for one request; published templates take milliseconds for a hundred messages
MEMORY = 256 << 20  # bytes of the whole process, of which Python and Jinja are some 40 MiB
CHARACTERS = 4 << 20  # of a rendered conversation: a million tokens
OUT_OF_MEMORY, TOO_LONG = 77, int(signal.SIGPROF)  # the exit status, and the signal that ends the process

_OWN = {"messages", "add_generation_prompt", "loop", "self", "caller"}  # names that no data can give


def serve(requests: BinaryIO, replies: BinaryIO) -> None:
    """Answers requests until there are no more."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    opened = dict[str, _Opened]()
    try:
        while (request := read(requests)) is not None:
            signal.setitimer(signal.ITIMER_PROF, SECONDS)  # SIGPROF ends the process
            reply = packed(_answer(request, opened))
            signal.setitimer(signal.ITIMER_PROF, 0)
            replies.write(reply)
            replies.flush()
    except MemoryError:
        os._exit(OUT_OF_MEMORY)


def packed(message: dict[str, Any]) -> bytes:
    """A message as it is sent."""
    content = json.dumps(message, ensure_ascii=False, default=str).encode("utf-8", "surrogatepass")
    return len(content).to_bytes(4, "big") + content


def read(file: BinaryIO) -> dict[str, Any] | None:
    """The next message; None at the end."""
    size = file.read(4)
    return unpacked(file.read(int.from_bytes(size, "big"))) if size else None


def unpacked(content: bytes) -> dict[str, Any]:
    """The message of its bytes."""
    return json.loads(content.decode("utf-8", "surrogatepass"))


def _answer(request: dict[str, Any], opened: dict[str, _Opened]) -> dict[str, Any]:
    key = request["template"]
    try:
        if "source" in request:
            opened.clear()  # one is enough, and all share the memory
            opened[key] = made = _Opened(request)
            return {"names_answers": made.names_answers, "variables": sorted(made.variables)}
        return opened[key].render(request) if key in opened else {"unknown": True}
    except MemoryError:
        raise
    except jinja2.TemplateSyntaxError as error:
        return {"line": error.lineno, "error": str(error.message)[:300]}
    except RecursionError:
        return {"error": "nested too deeply"}
    except Exception as error:  # a template may raise anything
        return {"error": str(error)[:300]}


class _Opened:
    """A template, changed so that it writes a mark wherever it means a special token."""

    def __init__(self, request: dict[str, Any]) -> None:
        marks, pattern = request["marks"], re.compile(request["special"])
        environment = _environment(*request["around"])
        tree = environment.parse(request["source"])
        opening = request["around"][0]
        self.names_answers = any(data.data == opening for data in tree.find_all(nodes.TemplateData))
        self.variables = _variables(tree) - environment.globals.keys() - request["names"].keys() - _OWN
        self._names = {name: marks.get(token, token) for name, token in request["names"].items()}
        self._template = environment.from_string(_marking(tree, pattern, marks))

    def render(self, request: dict[str, Any]) -> dict[str, Any]:
        asked = set[tuple[str, str]]()
        given = {"messages": [_Asked(one, asked) for one in request["messages"]], **self._names}
        given["add_generation_prompt"] = request["prompt"]
        text = self._template.render({"tools": None, "documents": None, **request["variables"], **given})
        if len(text) > CHARACTERS:
            return {"error": f"it writes more than {CHARACTERS:,} characters"}
        return {"text": text, "asked": sorted(asked)}


class _Asked(dict[str, Any]):
    """A message that notes which of its fields the template looks for, whether it has them or not."""

    def __init__(self, message: dict[str, Any], asked: set[tuple[str, str]]) -> None:
        super().__init__(message)
        self._asked, self._role = asked, message["role"]

    def __getitem__(self, key: str) -> Any:
        self._asked.add((self._role, key))
        return super().__getitem__(key)

    def __contains__(self, key: object) -> bool:
        self._asked.add((self._role, str(key)))
        return super().__contains__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self._asked.add((self._role, key))
        return super().get(key, default)

    def __iter__(self) -> Iterator[str]:
        self._asked.update((self._role, key) for key in list(super().__iter__()))
        return super().__iter__()

    def keys(self) -> Any:
        return dict.fromkeys(self).keys()

    def values(self) -> Any:
        return dict(self.items()).values()

    def items(self) -> Any:
        return {key: self[key] for key in self}.items()


def _generation(opening: str, closing: str) -> type[Extension]:
    """The Jinja tag `{% generation %}...{% endgeneration %}`: encloses the assistant's text, for the reader to find."""

    class Generation(Extension):
        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Parser) -> list[nodes.Node]:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            parts = [_data(opening), nodes.Scope(body), _data(closing)]
            return [part.set_lineno(line) for part in parts]

    return Generation


def _data(text: str) -> nodes.Node:
    return nodes.Output([nodes.TemplateData(text)])


def _environment(opening: str, closing: str) -> jinja2.Environment:
    extensions = [_generation(opening, closing), "jinja2.ext.loopcontrols"]
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
    environment.filters["tojson"] = _to_json
    environment.globals |= {"raise_exception": _raise, "strftime_now": _now}
    return environment


def _variables(tree: nodes.Template) -> frozenset[str]:
    """The names of variables that a template reads before it sets them: those that it expects to be given."""
    first: dict[str, str] = {}
    for name in _names(tree):
        first.setdefault(name.name, name.ctx)
    return frozenset(name for name, context in first.items() if context == "load")


def _names(node: nodes.Node) -> Iterator[nodes.Name]:
    """The names in a template as they are met when it runs: a value before the name that it is given."""
    if isinstance(node, nodes.Name):
        yield node
    inner = list(node.iter_child_nodes())
    found = chain.from_iterable(map(_names, reversed(inner) if isinstance(node, nodes.Assign) else inner))
    own = {argument.name for argument in node.args} if isinstance(node, nodes.Macro) else set[str]()
    yield from (name for name in found if name.name not in own)


def _marking(tree: nodes.Template, special: re.Pattern[str], marks: dict[str, str]) -> nodes.Template:
    """The template with a mark in place of every special token in its strings and its text."""

    def marked(text: str) -> str:
        return special.sub(lambda found: marks[found[0]], text)

    for constant in tree.find_all(nodes.Const):
        if isinstance(constant.value, str):
            constant.value = marked(constant.value)
    for data in tree.find_all(nodes.TemplateData):
        data.data = marked(data.data)
    return tree


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """The filter `tojson` of chat templates; Jinja's own would escape `<`, `>` and `&` for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _now(format: str) -> str:
    return datetime.now().strftime(format)


if __name__ == "__main__":
    serve(sys.stdin.buffer, sys.stdout.buffer)
