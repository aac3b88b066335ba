"""Tools: what a chat template is told of them, and the calls in what a model writes.

Models write calls in the form that their chat template shows them in. Two forms are read: `<tool_call>` around a JSON
object (Qwen, Hermes), and an answer that is JSON as a whole (Llama 3, Mistral).
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

_OPENING, _CLOSING = "<tool_call>", "</tool_call>"
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
        if "[TOOL_CALLS]" in template:
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

    calls: those that are whole, once `finish` was called.
    """

    def __init__(self, form: Form, most: int | None = None) -> None:
        self._form, self._most, self._held, self._told = form, most, "", False
        self.calls: list[Call] = []

    def push(self, text: str) -> str:
        """The part of the text so far that is no call, and was not returned before."""
        self._held += text
        return self._tagged() if self._form.tagged else self._whole()

    def finish(self) -> str:
        """The text that is left; `calls` is complete afterwards."""
        text = self._split() if self._form.tagged else self._read_whole()
        if self._most is not None:
            del self.calls[self._most :]
        return text

    def _tagged(self) -> str:
        place = self._held.find(_OPENING)
        if place < 0:
            keep = max((n for n in range(1, len(_OPENING)) if self._held.endswith(_OPENING[:n])), default=0)
            place = len(self._held) - keep
        text, self._held = self._held[:place], self._held[place:]
        return text

    def _split(self) -> str:
        """Reads all calls between tags; what is none stays text."""
        text, rest = "", self._held
        while _OPENING in rest:
            before, _, rest = rest.partition(_OPENING)
            inside, closed, after = rest.partition(_CLOSING)
            found = _calls(inside)
            self.calls += found
            text += before if found else before + _OPENING + inside + closed
            rest = after
        return (text + rest).strip() if self.calls else text + rest

    def _whole(self) -> str:
        """Text that may be JSON as a whole is held back to the end."""
        if self._told or self._held.lstrip()[:1] not in ("", "{", "["):
            self._told = True
            text, self._held = self._held, ""
            return text
        return ""

    def _read_whole(self) -> str:
        self.calls += _calls(self._held)
        return "" if self.calls else self._held


def _calls(text: str) -> list[Call]:
    """The calls in JSON: an object with a name and arguments, or a list of them; none where it is anything else."""
    with suppress(ValueError, RecursionError):
        found = json.loads(text)
        calls = [_call(one) for one in (found if isinstance(found, list) else [found])]
        return [call for call in calls if call is not None] if all(calls) else []
    return []


def _call(found: Any) -> Call | None:
    if not isinstance(found, dict) or not isinstance(found.get("name"), str):
        return None
    arguments = next((found[key] for key in _ARGUMENTS if key in found), None)
    if not isinstance(arguments, dict):
        return None
    return Call(found["name"], json.dumps(arguments, ensure_ascii=False))
