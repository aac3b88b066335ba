"""A conversation with a model: what was said so far, and the next answer as it is written."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from longwave.checkpoints.generation import end_ids
from longwave.data.chat import Chat
from longwave.data.documents import Message
from longwave.data.tokenizer import StreamDecoder, Tokenizer
from longwave.engine import Ended, Engine, EngineOptions, Request, Sampling
from longwave.errors import MachineError, UserError
from longwave.inference.text import Writer
from longwave.model import Decoder


@runtime_checkable
class History(Protocol):
    """What was said so far, and how a model reads it. ends: the tokens that end an answer."""

    ends: frozenset[int]

    def ids(self) -> list[int]:
        """The ids of everything up to the next answer."""
        ...

    def say(self, text: str) -> None:
        """Adds what the user says."""
        ...

    def answer(self, text: str) -> None:
        """Adds what the model answered."""
        ...

    def undo(self) -> str:
        """Takes back the last thing that the user said, and what followed; returns it, empty where there is none."""
        ...


class Conversation:
    """Messages in turns, written by the tokenizer's chat template. system: the instructions before them."""

    def __init__(self, model: Decoder, tokenizer: Tokenizer, system: str | None = None) -> None:
        self._chat = Chat(tokenizer)
        self.ends = frozenset(end_ids(model.origin.generation, tokenizer)) | self._chat.stop_ids
        self.messages: list[Message] = [] if system is None else [{"role": "system", "content": system}]

    def ids(self) -> list[int]:
        """The ids of the messages and of the beginning of the next answer. Raises UserError as the template does."""
        return self._chat.prompt(self.messages, "conversation")

    def say(self, text: str) -> None:
        """Adds a message of the user's."""
        self.messages.append({"role": "user", "content": text})

    def answer(self, text: str) -> None:
        """Adds an answer."""
        self.messages.append({"role": "assistant", "content": text})

    def undo(self) -> str:
        """Takes back the last message of the user's and its answer."""
        while self.messages and self.messages[-1]["role"] != "system":
            last = self.messages.pop()
            if last["role"] == "user":
                return last["content"]
        return ""


class Passage:
    """A text that user and model write in turns, for a model without a chat template; a line each."""

    def __init__(self, model: Decoder, tokenizer: Tokenizer, system: str | None = None) -> None:
        self._tokenizer = tokenizer
        self.ends = frozenset(end_ids(model.origin.generation, tokenizer))
        self._before = [] if system is None else [system]
        self._said: list[tuple[str, str]] = []

    def ids(self) -> list[int]:
        """The ids of the whole text."""
        lines = [*self._before, *(said + answered for said, answered in self._said)]
        return self._tokenizer.encode("\n".join(lines), add_bos=True)

    def say(self, text: str) -> None:
        """Adds a line."""
        self._said.append((text, ""))

    def answer(self, text: str) -> None:
        """Adds to the last line."""
        self._said[-1] = (self._said[-1][0], text)

    def undo(self) -> str:
        """Takes back the last line."""
        return self._said.pop()[0] if self._said else ""


@dataclass
class Talk:
    """Answers in a history. ended: why the last answer ended; None for one that was broken off."""

    model: Decoder
    history: History
    sampling: Sampling = field(default_factory=Sampling)
    max_new_tokens: int = 512
    ended: Ended | None = None

    def __post_init__(self) -> None:
        self._engine = Engine(self.model, EngineOptions(running=1))

    def answer(self, text: str) -> Generator[str]:
        """The answer to what the user says, a piece for each step of the model, which may be empty.

        Whoever stops reading breaks it off; what was written stays.

        Raises UserError for a history that the model cannot read, which is then as it was before.
        """
        self.history.say(text)
        try:
            ids = self.history.ids()
            number = self._submit(ids)
        except UserError:
            self.history.undo()
            raise
        written = ""
        try:
            for piece in self._pieces(ids):
                written += piece
                yield piece
        finally:
            self._engine.cancel(number)
            self.history.answer(written)

    def _submit(self, ids: list[int]) -> int:
        self.ended = None
        return self._engine.submit(
            Request(
                prompt=tuple(ids),
                max_new_tokens=self.max_new_tokens,
                sampling=self.sampling,
                stop_tokens=self.history.ends,
            )
        )

    def _pieces(self, ids: list[int]) -> Generator[str]:
        tokenizer = self.model.tokenizer
        assert tokenizer is not None
        writer = Writer(StreamDecoder(tokenizer, after=ids), (), tokenizer.special_tokens)
        while self.ended is None:
            text = ""
            for event in self._engine.step():
                if event.error is not None:
                    raise MachineError(event.error)
                text += "" if event.token is None else writer.push(event.token)
                self.ended = event.ended
            yield text + (writer.finish() if self.ended else "")
