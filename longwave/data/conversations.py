"""Conversations: messages with a role and a content, and the forms in which rows of data hold them.

No key of a row or of a message is passed over in silence. Each is one of these:

- part of a form (`FORMS`), or says whether a message is learned (`LEARNED`): used here;
- any other: offered to the chat template, which must read it (`chat.py`), unless it is a label (`is_label`).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from operator import itemgetter
from typing import Any, NamedTuple

from longwave.data.documents import Conversation, Message
from longwave.errors import UserError, require, shown

ROLES = ("system", "developer", "user", "assistant", "tool")
ASSISTANT = "assistant"

Row = Mapping[str, Any]


class Form(NamedTuple):
    """A form of rows: the fields that a row must have, those that it may have, and how its messages are read."""

    fields: tuple[str, ...]
    read: Callable[[Row], Any]
    optional: tuple[str, ...] = ()


def _from_and_value(row: Row) -> Any:
    """ShareGPT's form: messages with `from` and `value`; a message that has a role and content is left as it is."""
    given = row["conversations"]
    return [_renamed(one) for one in given] if isinstance(given, list) else given


def _prompt_and_completion(row: Row) -> Any:
    """The form of TRL: a prompt and a completion, each a text or a list of messages."""
    return [*_turns(row["prompt"], "user"), *_turns(row["completion"], ASSISTANT)]


def _instruction_and_output(row: Row) -> Any:
    """Alpaca's form: an instruction, on the line below it perhaps an input, and the output that answers them."""
    instruction, more = row["instruction"], row.get("input")
    both = f"{instruction}\n{more}" if isinstance(instruction, str) and isinstance(more, str) and more else instruction
    return [{"role": "user", "content": both}, {"role": ASSISTANT, "content": row["output"]}]


FORMS = (
    Form(("messages",), itemgetter("messages")),
    Form(("conversations",), _from_and_value),
    Form(("prompt", "completion"), _prompt_and_completion),
    Form(("instruction", "output"), _instruction_and_output, optional=("input",)),
)
"""The forms of conversations; the first whose fields a row has counts. `SYSTEM` and `SETTINGS` may stand beside any."""

SYSTEM, SETTINGS, TOOLS = "system", "chat_template_kwargs", "tools"
LEARNED = ("weight", "train", "loss")
"""Keys that say whether a message is learned: OpenAI's and Mistral's, axolotl's, and ms-swift's name for it."""

_ORIGIN = frozenset(
    {"id", "idx", "index", "uuid", "uid", "hash", "source", "origin", "dataset", "subset", "split", "url"}
)
_MAKING = frozenset({"author", "license", "model", "model_name", "generator", "version", "meta", "metadata"})
_SUBJECT = frozenset({"language", "lang", "category", "subcategory", "topic", "domain", "task", "title", "tags"})
_DATES = frozenset({"date", "time", "timestamp", "created", "created_at", "updated_at"})
_LABELS = _ORIGIN | _MAKING | _SUBJECT | _DATES
_NAMES = {"from": "role", "value": "content"}
_ALIASES = {"human": "user", "gpt": ASSISTANT}


def is_label(key: str) -> bool:
    """Whether a key names, dates or sorts what it stands beside, and so can be left unread: `id`, `source`, `date`."""
    return key.lower() in _LABELS or key.lower().endswith("_id")


def conversation_of(row: Row, name: str, where: str) -> Conversation | None:
    """The conversation of a row, or None for a row in none of the `FORMS`.

    name: of the document. where: the file and line that error messages name. Raises UserError for an empty or
    malformed conversation.
    """
    form = next((one for one in FORMS if all(field in row for field in one.fields)), None)
    if form is None:
        return None
    require_weight(row, where)
    fields = " and ".join(form.fields)
    found = checked(form.read(row), where, fields)
    learned = [_learned(message, f"{where}: {fields}[{place}]") for place, message in enumerate(found)]
    before = _system(row, found[0], where)
    messages = [*before, *({key: value for key, value in one.items() if key not in LEARNED} for one in found)]
    unlearned = frozenset(place for place, one in enumerate(learned, start=len(before)) if not one)
    text = "\n".join(message.get("content", "") for message in messages)
    return Conversation(name, text, tuple(messages), _variables(row, form, where), unlearned)


def checked(messages: Any, where: str, name: str = "messages") -> tuple[Message, ...]:
    """The messages without fields that are null; a UserError names the first fault.

    A message that calls tools needs no content.
    """
    some = isinstance(messages, list) and bool(messages)
    require(some, f"{where}: {name}: a list of one message or more is expected")
    for number, message in enumerate(messages):
        at = f"{where}: {name}[{number}]"
        require(isinstance(message, dict), f"{at} is a {type(message).__name__}, not an object with role and content")
        role, content = message.get("role"), message.get("content")
        require(role in ROLES, f"{at}.role = {shown(role)}: use one of {', '.join(ROLES)}")
        silent = content is None and bool(message.get("tool_calls"))
        is_text = isinstance(content, str) or silent
        require(is_text, f"{at}.content is a {type(content).__name__}; a string is expected")
    return tuple({key: value for key, value in message.items() if value is not None} for message in messages)


def require_weight(row: Row, where: str) -> None:
    """Raises UserError for a row with a weight other than 1: only messages can be left out of the loss."""
    for key in LEARNED:
        if not (value := row.get(key, 1)) == 1 and value is not None:
            raise UserError(f"{where}: {key} = {shown(value)}: a row counts as 1; drop the row, or the key from it")


def given(value: Any) -> bool:
    """Whether a key says anything: null and an empty string, list or object do not."""
    return value is not None and value != "" and value != [] and value != {}


def _learned(message: Message, at: str) -> bool:
    """Whether the message may be learned; `at` names it."""
    learned = True
    for key in (key for key in LEARNED if key in message):
        value, role = message[key], message["role"]
        require(value in (0, 1), f"{at}.{key} = {shown(value)}: use 0, not learned, or 1")
        said = f"{at}.{key} = {shown(value)}: only the assistant's messages are learned, and this is the {role}'s"
        require(value == 0 or role == ASSISTANT, said)
        learned = learned and bool(value)
    return learned


def _system(row: Row, first: Message, where: str) -> list[Message]:
    """The system message that a row holds outside of its messages, if it does."""
    text = row.get(SYSTEM)
    if not given(text):
        return []
    require(isinstance(text, str), f"{where}: {SYSTEM} is a {type(text).__name__}; a string is expected")
    require(first["role"] != SYSTEM, f"{where}: {SYSTEM}: the messages begin with another; leave one of the two out")
    return [{"role": SYSTEM, "content": text}]


def _variables(row: Row, form: Form, where: str) -> dict[str, Any]:
    """The variables that a row holds for the chat template: its other keys, and those in `SETTINGS`."""
    used = {*form.fields, *form.optional, *LEARNED, SYSTEM, SETTINGS}
    rest = {key: value for key, value in row.items() if key not in used and given(value)}
    settings = row.get(SETTINGS) or {}
    require(isinstance(settings, dict), f"{where}: {SETTINGS} is a {type(settings).__name__}; an object is expected")
    twice = sorted(settings.keys() & rest.keys())
    require(not twice, f"{where}: {', '.join(twice)}: given in {SETTINGS} too; leave one of the two out")
    if isinstance(rest.get(TOOLS), str):  # columns of tables often hold tools as JSON
        rest[TOOLS] = _parsed(rest[TOOLS], f"{where}: {TOOLS}")
    return {**rest, **settings}


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: a string that is not JSON ({error}); give a list of tools") from None


def _renamed(message: Any) -> Any:
    if not isinstance(message, dict):
        return message
    renamed = {_NAMES.get(key, key): value for key, value in message.items()}
    role = renamed.get("role")
    return {**renamed, "role": _ALIASES.get(role, role) if isinstance(role, str) else role}


def _turns(given: Any, role: str) -> list[Any]:
    return given if isinstance(given, list) else [{"role": role, "content": given}]
