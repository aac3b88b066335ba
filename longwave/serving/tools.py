"""Tools: what a chat template is told of them, and the calls in what a model writes.

Models write calls in the form that their chat template shows them in. Two forms are read: `<tool_call>` around a JSON
object (Qwen, Hermes), and an answer that is JSON as a whole (Llama 3, Mistral). A call that is forced is one call.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from longwave.data.tokenizer import Tokenizer
from longwave.serving.bodies import ChatBody, Function, NamedTool, Tool
from longwave.serving.errors import ApiError

_OPENING, _CLOSING, _LISTING = "<tool_call>", "</tool_call>", "[TOOL_CALLS]"
_ARGUMENTS = ("arguments", "parameters")


@dataclass(frozen=True)
class Call:
    """A call of a function. arguments: JSON."""

    name: str
    arguments: str

    def content(self, index: int | None = None) -> dict[str, Any]:
        """The call as it is sent. index: of the call, in a piece of a stream."""
        function = {"name": self.name, "arguments": self.arguments}
        made = {"id": f"call_{uuid.uuid4().hex[:24]}", "type": "function", "function": function}
        return made if index is None else {"index": index, **made}


def tools_of(body: ChatBody) -> list[Tool]:
    """The tools that the model may call; none where the choice is none. Raises ApiError for a choice without effect."""
    tools, choice = body.tools or [], body.tool_choice
    if choice not in (None, "none", "auto") and not tools:
        raise ApiError(400, "tool_choice: there are no tools to choose from", param="tool_choice")
    if isinstance(choice, NamedTool) and choice.function.name not in {one.function.name for one in tools}:
        raise ApiError(400, f"tool_choice: no tool has the name {choice.function.name!r}", param="tool_choice")
    return [] if choice == "none" else tools


def schema_of_call(tools: Sequence[Tool], arguments: str) -> dict[str, Any]:
    """The JSON schema of a call of one of the tools. arguments: the key of its arguments."""
    return {"anyOf": [_schema(tool.function, arguments) for tool in tools]}


def _schema(function: Function, arguments: str) -> dict[str, Any]:
    properties = {"name": {"const": function.name}, arguments: function.parameters or {"type": "object"}}
    return {"type": "object", "properties": properties, "required": ["name", arguments], "additionalProperties": False}


@dataclass(frozen=True)
class Form:
    """How a model writes calls.

    tagged: whether each stands in `<tool_call>`; else the answer is JSON as a whole. arguments: the key of the
    arguments. listed: whether a call stands in a list.
    """

    tagged: bool
    arguments: str = "arguments"
    listed: bool = False

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> Form:
        """The form that a chat template shows."""
        template = tokenizer.chat_template or ""
        if _OPENING in template:
            return cls(tagged=True)
        if _LISTING in template:
            return cls(tagged=False, listed=True)
        return cls(tagged=False, arguments="parameters" if '"parameters"' in template else "arguments")

    def grammar(self, tools: Sequence[Tool]) -> str:
        """The grammar of an answer that is one call, in Lark's notation."""
        call = schema_of_call(tools, self.arguments)
        whole = {"type": "array", "items": call, "minItems": 1, "maxItems": 1} if self.listed else call
        whole["x-guidance"] = {"whitespace_flexible": False}  # no blanks but those after a comma and a colon
        around = (f'"{_OPENING}\\n" ', f' "\\n{_CLOSING}"') if self.tagged else ("", "")
        return f"start: {around[0]}call{around[1]}\ncall: %json {json.dumps(whole)}\n"


class CallReader:
    """Tells the calls in an answer from its text, as it comes.

    most: calls that count; later ones are left out. calls: those that are whole so far; after `finish`, all.
    """

    def __init__(self, form: Form, most: int | None = None) -> None:
        self._form, self._most, self._held = form, most, ""
        self._is_text = False  # whether an answer that could have been JSON as a whole is none
        self._after_call = False  # whether blanks belong to a call that has just ended
        self.calls: list[Call] = []

    def push(self, text: str) -> str:
        """The part of the text so far that is no call, and was not returned before."""
        self._held += text
        return self._between() if self._form.tagged else self._before_json()

    def finish(self) -> str:
        """The text that is left; `calls` is complete afterwards."""
        text, self._held = self._held, ""
        # The model may end before the last tag, and the mark before a list is shown where it is no special token.
        found = [] if self._is_text else _calls(text.removeprefix(_OPENING).removeprefix(_LISTING))
        self._add(found)
        return "" if found else text

    def _between(self) -> str:
        """The text around calls in tags; blanks after a call belong to it."""
        text = ""
        while True:
            if self._after_call:
                self._held = self._held.lstrip()
                self._after_call = not self._held
            before, opening, rest = self._held.partition(_OPENING)
            inside, closing, after = rest.partition(_CLOSING)
            if not closing:
                break
            found = _calls(inside)
            text += before if found else before + opening + inside + closing
            self._add(found)
            self._held, self._after_call = after, bool(found)
        if opening:
            self._held = opening + rest
            return text + before
        return text + self._all_but_a_beginning()

    def _all_but_a_beginning(self) -> str:
        """What is held, but for what may be the beginning of a tag."""
        keep = max((n for n in range(1, len(_OPENING)) if self._held.endswith(_OPENING[:n])), default=0)
        place = len(self._held) - keep
        text, self._held = self._held[:place], self._held[place:]
        return text

    def _before_json(self) -> str:
        """Text that may be JSON as a whole is held back to the end."""
        if not self._is_text and self._held.lstrip()[:1] in ("", "{", "["):
            return ""
        self._is_text = True
        text, self._held = self._held, ""
        return text

    def _add(self, found: Sequence[Call]) -> None:
        self.calls = [*self.calls, *found][: self._most]


def _calls(text: str) -> list[Call]:
    """The calls in JSON: objects with a name and arguments, or a list of them; none where it is anything else."""
    with suppress(ValueError, RecursionError):
        calls = [_call(one) for one in _values(text)]
        return [call for call in calls if call is not None] if all(calls) else []
    return []


def _values(text: str) -> list[Any]:
    """The values in a text of JSON; Llama writes several calls one after the other, with semicolons or blanks between.

    Raises ValueError where it is anything else.
    """
    found, rest = list[Any](), text.strip()
    while rest:
        value, end = json.JSONDecoder().raw_decode(rest)
        found += value if isinstance(value, list) else [value]
        rest = rest[end:].lstrip(" \t\n\r;")
    return found


def _call(found: Any) -> Call | None:
    if not isinstance(found, dict) or not isinstance(found.get("name"), str):
        return None
    arguments = next((found[key] for key in _ARGUMENTS if key in found), None)
    if isinstance(arguments, str):  # some models write the arguments as a string that holds their JSON
        with suppress(ValueError, RecursionError):
            arguments = json.loads(arguments)
    if not isinstance(arguments, dict):
        return None
    return Call(found["name"], json.dumps(arguments, ensure_ascii=False))
