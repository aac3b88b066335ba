"""Chat templates as Hugging Face writes them: Jinja, with the variables and helpers they expect, rendered under limits.

A template runs in a process of its own (`confined.py`, `rendering.py`), which neither it nor a conversation can make
take more than a second or 256 MiB.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

from longwave.data.confined import Exceeded, Renderer
from longwave.data.documents import Message
from longwave.data.marks import Marks, Span
from longwave.data.tokenizer import Tokenizer
from longwave.errors import UserError
from longwave.files.jsonfile import plain

_DRAW = secrets.randbits(64)  # drawn in each process, so that no message can hold an opening or closing by chance
_OPENING, _CLOSING = f"\ue002{_DRAW}\ue001", f"\ue003{_DRAW}\ue001"


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
    Raises UserError for a template that is missing, is not valid Jinja, or takes too long or too much memory.
    """

    def __init__(self, tokenizer: Tokenizer, marks: Marks) -> None:
        source = tokenizer.chat_template
        if source is None:
            raise UserError("chat_template: this tokenizer has none; put a chat_template.jinja beside its files")
        special = {"special": marks.pattern, "marks": marks.names, "around": [_OPENING, _CLOSING]}
        self._marks = marks
        self._renderer = Renderer({"source": source, "names": tokenizer.named_tokens, **special})
        try:
            opened = self._renderer.open()
        except Exceeded as error:
            raise UserError(f"chat_template: it {error}") from None
        if "error" in opened:
            line = f", line {opened['line']}" if "line" in opened else ""
            raise UserError(f"chat_template{line}: {_one_line(opened['error'])}")
        self.names_answers: bool = opened["names_answers"]
        self.variables: frozenset[str] = frozenset(opened["variables"])

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
        given = {"messages": list(messages), "variables": dict(variables), "prompt": prompt}
        try:
            reply = self._renderer.render(given)
        except Exceeded as error:
            raise UserError(f"{where}: the chat template {error}") from None
        except RecursionError:
            raise UserError(f"{where}: a conversation that is nested too deeply") from None
        if "error" in reply:
            raise UserError(f"{where}: the chat template refuses the conversation: {_one_line(reply['error'])}")
        text = reply["text"]
        self._check(text, messages, where)
        return _rendered(text)._replace(asked=frozenset((role, key) for role, key in reply["asked"]))

    def _check(self, text: str, messages: Sequence[Message], where: str) -> None:
        """Refuses a template that writes a special token without a mark, unless a message says that token.

        Such a token is put together at run time, out of parts that were not marked: it would be encoded as text.
        """
        for token in self._marks.unmarked(text):
            if not _says(messages, token):
                made = f"the chat template puts {plain(token)} together out of parts"
                raise UserError(f"{where}: {made}; write it in the template as one string")


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


def _one_line(text: str) -> str:
    return " ".join(text.split())
