"""Conversations: messages with a role and a content, and the forms in which JSONL files hold them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from operator import itemgetter
from typing import Any

from longwave.errors import require

ROLES = ("system", "developer", "user", "assistant", "tool")
ASSISTANT = "assistant"

Message = dict[str, Any]
"""`role`, one of `ROLES`, and `content`, a string; other fields are passed on to the chat template."""

Row = Mapping[str, Any]


def _from_and_value(row: Row) -> Any:
    """ShareGPT's form: messages with `from` and `value`; a message that has a role and content is left as it is."""
    given = row["conversations"]
    return [_renamed(one) for one in given] if isinstance(given, list) else given


def _prompt_and_completion(row: Row) -> Any:
    """The form of TRL: a prompt and a completion, each a text or a list of messages."""
    return [*_turns(row["prompt"], "user"), *_turns(row["completion"], ASSISTANT)]


FORMS: tuple[tuple[tuple[str, ...], Callable[[Row], Any]], ...] = (
    (("messages",), itemgetter("messages")),
    (("conversations",), _from_and_value),
    (("prompt", "completion"), _prompt_and_completion),
)
"""For each form the fields that a row must have, and the function that reads its messages; the first match counts."""

_NAMES = {"from": "role", "value": "content"}
_ALIASES = {"human": "user", "gpt": ASSISTANT}


def messages_of(row: Row, where: str) -> tuple[Message, ...] | None:
    """The messages of a JSONL row, or None for a row that is not a conversation in any of the `FORMS`.

    where: the file and line that error messages name. Raises UserError for an empty or malformed conversation.
    """
    for fields, read in FORMS:
        if all(field in row for field in fields):
            return checked(read(row), where, " and ".join(fields))
    return None


def checked(messages: Any, where: str, name: str = "messages") -> tuple[Message, ...]:
    """The messages without fields that are null; a UserError names the first fault."""
    some = isinstance(messages, list) and bool(messages)
    require(some, f"{where}: {name}: a list of one message or more is expected")
    for number, message in enumerate(messages):
        at = f"{where}: {name}[{number}]"
        require(isinstance(message, dict), f"{at} is a {type(message).__name__}, not an object with role and content")
        role, content = message.get("role"), message.get("content")
        require(role in ROLES, f"{at}.role = {role!r}: use one of {', '.join(ROLES)}")
        require(isinstance(content, str), f"{at}.content is a {type(content).__name__}; a string is expected")
    return tuple({key: value for key, value in message.items() if value is not None} for message in messages)


def _renamed(message: Any) -> Any:
    if not isinstance(message, dict):
        return message
    renamed = {_NAMES.get(key, key): value for key, value in message.items()}
    role = renamed.get("role")
    return {**renamed, "role": _ALIASES.get(role, role) if isinstance(role, str) else role}


def _turns(given: Any, role: str) -> list[Any]:
    return given if isinstance(given, list) else [{"role": role, "content": given}]
