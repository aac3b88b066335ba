"""A model that is served: its name, its engine and what turns text into its tokens."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from longwave.checkpoints.generation import end_ids
from longwave.data.chat import Chat
from longwave.data.documents import Message
from longwave.data.tokenizer import Tokenizer
from longwave.engine import Engine
from longwave.errors import UserError, require
from longwave.inference.grammar import Grammars
from longwave.model import Decoder
from longwave.serving.errors import ApiError
from longwave.serving.limits import Limits
from longwave.serving.metrics import Metrics
from longwave.serving.runner import Runner

_PIECE = 1 << 15  # characters of a long text that are tokenised at a time, to see whether it can fit
_SLACK = 16  # tokens that a cut between two pieces may add


class Served:
    """A model with the thread that runs it.

    ends: the tokens that end a text. window: tokens of prompt and answer. created: seconds since 1970.
    chat: the chat template; None without one, and `no_chat` says why.
    """

    def __init__(self, name: str, model: Decoder, engine: Engine, metrics: Metrics, limits: Limits) -> None:
        require(model.tokenizer is not None, f"{name}: no tokenizer.json; a server needs one")
        assert model.tokenizer is not None
        self.name, self.model, self.engine, self.created = name, model, engine, int(time.time())
        self.tokenizer: Tokenizer = model.tokenizer
        self.window, self.vocabulary = engine.window, model.config.vocab_size
        self.ends = frozenset(end_ids(model.origin.generation, self.tokenizer))
        self.metrics, self.limits = metrics.of(name), limits
        self.runner = Runner(engine, name, self.metrics.stepped)
        self.chat, self.no_chat = _chat_of(self.tokenizer)
        self.chat_ends = self.ends | (frozenset() if self.chat is None else self.chat.stop_ids)
        self.grammars = Grammars(self.tokenizer, self.vocabulary, self.chat_ends)

    @cached_property
    def longest(self) -> int:
        """Characters of the longest token, so that a text of more than `longest * window` cannot fit."""
        vocabulary = self.tokenizer.twin().get_vocab(with_added_tokens=True)
        return max(map(len, vocabulary), default=1)

    def text_prompt(self, text: str) -> list[int]:
        """The ids of a text to be continued. Raises ApiError for one that is longer than the context window."""
        return [*self.tokenizer.opening, *self._fitting(text, self.tokenizer.encode)]

    def chat_prompt(self, messages: Sequence[Message], variables: Mapping[str, Any]) -> list[int]:
        """The ids of a conversation up to the assistant's answer.

        Raises ApiError for one that is longer than the context window, and UserError for one that the template refuses.
        """
        if self.chat is None:
            raise ApiError(400, f"{self.name} takes no conversations ({self.no_chat}); use /v1/completions")
        written = self.chat.written(messages, variables=variables)
        return self._fitting(written, self.chat.ids)

    def _fitting(self, text: str, encode: Callable[[str], list[int]]) -> list[int]:
        """The ids of a text; one that cannot fit is refused after a look at as little of it as shows that."""
        if len(text) > self.longest * self.window:
            raise self._too_long(f"of {len(text):,} characters")
        if len(text) > 4 * self.window:
            self._require_room(text, encode)
        ids = encode(text)
        if len(ids) > self.window:
            raise self._too_long(f"of {len(ids):,} tokens")
        return ids

    def _require_room(self, text: str, encode: Callable[[str], list[int]]) -> None:
        tokens, begin = 0, 0
        while begin < len(text):
            end = _cut(text, begin)
            tokens += max(len(encode(text[begin:end])) - _SLACK, 0)
            if tokens > self.window:
                raise self._too_long(f"of {len(text):,} characters")
            begin = end

    def _too_long(self, what: str) -> ApiError:
        message = f"a prompt {what} is too long: the context_window of {self.name} is {self.window:,} tokens"
        return ApiError(400, message, code="context_length_exceeded")


def _cut(text: str, begin: int) -> int:
    """Where a piece of a long text ends: before a blank if there is one near."""
    end = begin + _PIECE
    if end >= len(text):
        return len(text)
    blank = max(text.rfind(" ", end - 200, end), text.rfind("\n", end - 200, end))
    return blank if blank > begin else end


def _chat_of(tokenizer: Tokenizer) -> tuple[Chat | None, str]:
    try:
        return Chat(tokenizer), ""
    except UserError as error:
        return None, str(error)


def names_of(folders: Sequence[str], given: Sequence[str] = ()) -> list[str]:
    """The names of models: those that are given, then those of their folders.

    A run's model, in `RUN/model`, has the name of the run. Raises UserError for a name twice, or too many of them.
    """
    require(len(given) <= len(folders), f"{len(given)} names for {len(folders)} models; give one for each at most")
    names = [*given, *(_name(folder) for folder in folders[len(given) :])]
    twice = next((name for place, name in enumerate(names) if name in names[:place]), None)
    require(twice is None, f"two models have the name {twice}; give others with --name")
    odd = next((name for name in names if not re.fullmatch(r"[\w.:/@+-]{1,200}", name)), None)
    require(odd is None, f"name = {odd!r}: letters, digits and . _ - : / @ + only; give another with --name")
    return names


def _name(folder: str) -> str:
    path = Path(folder)
    place = path.resolve() if path.exists() else path
    return place.parent.name if place.name == "model" and place.parent.name else place.name
