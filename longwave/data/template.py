"""Chat templates as Hugging Face writes them: Jinja, run in a sandbox, with the variables and helpers they expect."""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from itertools import chain
from types import MappingProxyType
from typing import Any, NamedTuple, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from longwave.data.documents import Message
from longwave.data.marks import Marks, Span
from longwave.data.tokenizer import Tokenizer
from longwave.errors import UserError

_DRAW = secrets.randbits(64)  # drawn in each process, so that no message can hold an opening or closing by chance
_OPENING, _CLOSING = f"\ue002{_DRAW}\ue001", f"\ue003{_DRAW}\ue001"

_OWN = {"messages", "add_generation_prompt", "loop", "self", "caller"}  # names that no data can give


class Rendered(NamedTuple):
    """A text with marks for special tokens, and the spans of characters that the template marks as the assistant's.

    asked: the fields that the template looked for in messages, each with the role of the message.
    """

    text: str
    answers: list[Span]
    asked: frozenset[tuple[str, str]] = frozenset()


class Template:
    """A tokenizer's chat template, changed so that it writes a mark wherever it means a special token (`marks.py`).

    names_answers: whether the template says by `{% generation %}` which text is the assistant's.
    variables: the names of all variables that it reads and a conversation may give.
    Raises UserError for a template that is missing, or is not valid Jinja.
    """

    def __init__(self, tokenizer: Tokenizer, marks: Marks) -> None:
        source = tokenizer.chat_template
        if source is None:
            raise UserError("chat_template: this tokenizer has none; put a chat_template.jinja beside its files")
        environment = _environment()
        try:
            tree = environment.parse(source)
            self.names_answers = any(data.data == _OPENING for data in tree.find_all(nodes.TemplateData))
            self.variables = _variables(tree) - environment.globals.keys() - tokenizer.named_tokens.keys() - _OWN
            self._template = environment.from_string(_marking(tree, marks))
        except jinja2.TemplateSyntaxError as error:
            raise UserError(f"chat_template, line {error.lineno}: {error.message}") from None
        self._names = {name: marks.mark(token) for name, token in tokenizer.named_tokens.items()}
        self._marks = marks

    def render(
        self,
        messages: Sequence[Message],
        where: str,
        *,
        prompt: bool = False,
        variables: Mapping[str, Any] = MappingProxyType({}),
    ) -> Rendered:
        """The conversation as the template writes it.

        where: the file and line that error messages name. prompt: whether the beginning of the assistant's next turn
        is added. variables: for the template to read. Raises UserError for every failure of the template on this
        conversation.
        """
        asked = set[tuple[str, str]]()
        given = {**self._names, "messages": [_Asked(one, asked) for one in messages], "add_generation_prompt": prompt}
        try:
            text = self._template.render({"tools": None, "documents": None, **variables, **given})
        except Exception as error:  # a template is a program, and may raise anything
            raise UserError(f"{where}: the chat template refuses the conversation: {error}") from None
        self._check(text, messages, where)
        return _rendered(text)._replace(asked=frozenset(asked))

    def _check(self, text: str, messages: Sequence[Message], where: str) -> None:
        """Refuses a template that writes a special token without a mark, unless a message says that token.

        Such a token is put together at run time, out of parts that were not marked: it would be encoded as text.
        """
        for token in self._marks.unmarked(text):
            if not _says(messages, token):
                made = f"the chat template puts {token} together out of parts"
                raise UserError(f"{where}: {made}; write it in the template as one string")


class _Asked(dict[str, Any]):
    """A message that notes which of its fields the template looks for, whether it has them or not."""

    def __init__(self, message: Message, asked: set[tuple[str, str]]) -> None:
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


class _Generation(Extension):
    """The Jinja tag `{% generation %}...{% endgeneration %}`: encloses the assistant's text for `_rendered` to find."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> list[nodes.Node]:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        parts = [_data(_OPENING), nodes.Scope(body), _data(_CLOSING)]
        return [part.set_lineno(line) for part in parts]


def _data(text: str) -> nodes.Node:
    return nodes.Output([nodes.TemplateData(text)])


def _environment() -> jinja2.Environment:
    extensions = [_Generation, "jinja2.ext.loopcontrols"]
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


def _marking(tree: nodes.Template, marks: Marks) -> nodes.Template:
    """The template with a mark in place of every special token in its strings and its text."""
    for constant in tree.find_all(nodes.Const):
        if isinstance(constant.value, str):
            constant.value = marks.mark(constant.value)
    for data in tree.find_all(nodes.TemplateData):
        data.data = marks.mark(data.data)
    return tree


def _rendered(text: str) -> Rendered:
    clean, answers, begun = "", list[Span](), 0
    for piece in re.split(f"({_OPENING}|{_CLOSING})", text):
        if piece == _OPENING:
            begun = len(clean)
        elif piece == _CLOSING:
            answers.append((begun, len(clean)))
        else:
            clean += piece
    return Rendered(clean, answers)


def _says(value: Any, token: str) -> bool:
    """Whether any string within nested lists and dicts contains the token."""
    if isinstance(value, str):
        return token in value
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return any(_says(part, token) for part in parts)


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """The filter `tojson` of chat templates; Jinja's own would escape `<`, `>` and `&` for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _now(format: str) -> str:
    return datetime.now().strftime(format)
