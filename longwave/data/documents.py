"""Documents: the unit of training data, a text or a conversation, with the name it is known by."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

Message = dict[str, Any]
"""`role`, one of `conversations.ROLES`, and `content`, a string; other fields are for the chat template."""


@dataclass(frozen=True)
class Document:
    """A text and the name it is known by: its path below what is prepared, with a line or piece number where needed.

    source: a name that it shares with the documents of one origin, by which losses are told apart; empty if not known.
    """

    name: str
    text: str
    source: str = field(default="", kw_only=True)


@dataclass(frozen=True)
class Conversation(Document):
    """Messages of a conversation; `text` is their contents joined, without the form that a chat template adds.

    variables: what the data says beside the messages, such as `tools`, for the chat template to read as variables.
    unlearned: the places of messages that the data excludes from the loss.
    """

    messages: tuple[Message, ...]
    variables: dict[str, Any] = field(default_factory=dict)
    unlearned: frozenset[int] = frozenset()

    @property
    def answers(self) -> list[int]:
        """The places of the messages that can be learned: the assistant's, without those that the data excludes."""
        places = (place for place, message in enumerate(self.messages) if message["role"] == "assistant")
        return [place for place in places if place not in self.unlearned]
