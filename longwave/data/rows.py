"""Rows of data, objects with named fields, read as texts or as conversations; no key of them is passed over in silence.

A row in one of the forms of `conversations.FORMS` is a conversation. Any other holds its text in one field; its other
keys describe that text, unless they are known to say how a row is learned (`_MEANT`): then they are refused.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NoReturn

from longwave.data.conversations import FORMS, LEARNED, SETTINGS, SYSTEM, TOOLS, conversation_of, given, require_weight
from longwave.data.documents import Conversation, Document
from longwave.errors import UserError, require

TEXT, SOURCE = "text", "source"
_MEANT = frozenset(
    {name for form in FORMS for name in (*form.fields, *form.optional)}
    | {*LEARNED, SYSTEM, SETTINGS, TOOLS, "functions", "images", "image", "videos", "audios", "audio"}
    | {"chosen", "rejected", "conversation", "segments", "history", "response", "query", "question", "answer"}
    | {"input_ids", "labels", "label", "loss_mask", "completion_mask", "assistant_masks", "attention_mask"}
)
"""Keys with a meaning for training in the formats of TRL, axolotl, LLaMA-Factory, OpenAI and Mistral."""


@dataclass(frozen=True)
class Rules:
    """How rows are read.

    text_field: the field that holds the text, whatever else a row holds; by default `text`, or a conversation.
    ignore: keys of rows and of messages that are passed over.
    """

    text_field: str | None = None
    ignore: frozenset[str] = frozenset()

    def document(self, row: Any, name: str, where: str) -> Document:
        """The text or conversation of a row.

        A string in its field `source` is the document's source.
        name: of the document. where: the file and line that error messages name. Raises UserError for a row that is
        neither, that holds what would have no effect, or whose strings no UTF-8 can hold.
        """
        require(isinstance(row, dict), f"{where}: a {type(row).__name__}; each row must be a JSON object")
        row = _without(row, self.ignore) if self.ignore else row
        document = self._read(row, name, where)
        with json_faults(where):
            is_chat = isinstance(document, Conversation)
            said = json.dumps(row, ensure_ascii=False, default=str) if is_chat else document.text
            said.encode()  # fails on half a surrogate pair, which JSON can write as an escape and UTF-8 cannot
        source = row.get(SOURCE) if self.text_field != SOURCE else None
        return replace(document, source=source) if isinstance(source, str) else document

    def fits(self, row: Any) -> bool:
        """Whether something is a row in a form that is known."""
        texts = (self.text_field or TEXT,)
        forms = [texts] if self.text_field else [texts, *(form.fields for form in FORMS)]
        return isinstance(row, dict) and any(all(name in row for name in form) for form in forms)

    def _read(self, row: Mapping[str, Any], name: str, where: str) -> Document:
        if self.text_field is None and (found := conversation_of(row, name, where)) is not None:
            return found
        field = self.text_field or TEXT
        text = row.get(field)
        require(isinstance(text, str), f"{where}: no string field {field!r}{'' if self.text_field else _FORMS}")
        if self.text_field is None:
            _require_text_alone(row, where)
        return Document(name, str(text))


_FORMS = f", nor {', '.join(' and '.join(form.fields) for form in FORMS[:-1])}, or {' and '.join(FORMS[-1].fields)}"


def _require_text_alone(row: Mapping[str, Any], where: str) -> None:
    """Raises UserError for a row with a text and with keys that say something else about learning."""
    require_weight(row, where)
    others = [key for key in row if key in _MEANT and key not in LEARNED and given(row[key])]
    ways = " ".join(f"--ignore {name}" for name in others)
    said = f"{where}: {', '.join(others)} beside {TEXT}: which of them is meant? pass over the others ({ways})"
    require(not others, f"{said}, or name the field of the text (--text-field {TEXT})")


def _without(row: Mapping[str, Any], names: frozenset[str]) -> dict[str, Any]:
    """A row without keys that are passed over, in its messages too."""
    left = {key: value for key, value in row.items() if key not in names}
    for key in (key for form in FORMS for key in form.fields if isinstance(left.get(key), list)):
        left[key] = [_without(one, names) if isinstance(one, dict) else one for one in left[key]]
    return left


def parsed(line: str) -> Any:
    """The value of a text in JSON. ValueError for anything else, a key that stands twice and NaN included."""
    return DECODER.decode(line)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        raise ValueError("a key stands there twice")
    return content


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no number in JSON")


DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_refuse)


@contextmanager
def json_faults(where: str) -> Iterator[None]:
    """Names the place of a fault of JSON or UTF-8."""
    try:
        yield
    except (ValueError, RecursionError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{where}: not a row of JSON in UTF-8 ({error})") from error
