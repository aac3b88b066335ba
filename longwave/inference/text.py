"""Generation of text: prompts are encoded, new tokens are decoded as they come, and stop strings are cut off."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from longwave.checkpoints.generation import end_ids
from longwave.data.tokenizer import StreamDecoder, Tokenizer
from longwave.errors import require
from longwave.inference.generate import Generation
from longwave.inference.sampling import Sampling
from longwave.model import Decoder


class Piece(NamedTuple):
    """A piece of new text. prompt: the index of the prompt that it continues."""

    prompt: int
    text: str


@dataclass
class _Writer:
    """Decodes the tokens of one sequence, and holds back text that may be the beginning of a stop string.

    held: the text held back. stopped: whether a stop string has been found.
    """

    decoder: StreamDecoder
    stops: Sequence[str]
    held: str = ""
    stopped: bool = False

    def push(self, token: int) -> str:
        return self._release(self.decoder.push(token))

    def finish(self) -> str:
        if self.stopped:
            return ""
        text = self._release(self.decoder.finish()) + ("" if self.stopped else self.held)
        self.held = ""
        return text

    def _release(self, text: str) -> str:
        self.held += text
        ends = [place for stop in self.stops if (place := self.held.find(stop)) >= 0]
        if ends:
            self.stopped = True
            return self.held[: min(ends)]
        keep = max((n for stop in self.stops for n in range(1, len(stop)) if self.held.endswith(stop[:n])), default=0)
        ready, self.held = self.held[: len(self.held) - keep], self.held[len(self.held) - keep :]
        return ready


def generate_text(
    model: Decoder,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    *,
    max_new_tokens: int = 128,
    sampling: Sampling | None = None,
    stop: Sequence[str] = (),
    chat: bool = False,
) -> Iterator[Piece]:
    """Yields the continuation of every prompt in pieces of text, each up to the first of the strings in `stop`.

    Prompts begin with what the tokenizer puts before a text: bos as a rule. A text ends at the tokenizer's eos token,
    or at an end token that the model's folder names.

    chat: whether each prompt is a user's message, to be continued by the assistant's answer.
    Raises UserError like `Generation`, and with `chat` for a tokenizer without a usable chat template.
    """
    require(all(stop), "stop: a stop string is empty; leave it out")
    encoded, turn_ends = (_questions if chat else _beginnings)(tokenizer, prompts)
    ends = end_ids(model.origin.generation, tokenizer) | turn_ends
    generation = Generation(model, encoded, max_new_tokens=max_new_tokens, sampling=sampling, stop_tokens=ends)
    writers = [_Writer(StreamDecoder(tokenizer, ids), stop) for ids in encoded]
    for prompt, token in generation:
        text = writers[prompt].push(token)
        if writers[prompt].stopped:
            generation.stop(prompt)
        if text:
            yield Piece(prompt, text)
    for prompt, writer in enumerate(writers):
        if text := writer.finish():
            yield Piece(prompt, text)


def _beginnings(tokenizer: Tokenizer, prompts: Sequence[str]) -> tuple[list[list[int]], frozenset[int]]:
    """The ids of texts to be continued, and the tokens that end them besides the model's end tokens: none."""
    return [tokenizer.encode(prompt, add_bos=True) for prompt in prompts], frozenset()


def _questions(tokenizer: Tokenizer, prompts: Sequence[str]) -> tuple[list[list[int]], frozenset[int]]:
    """The ids of conversations of one user's message up to the assistant's answer, and the ids that end an answer."""
    from longwave.data.chat import Chat

    chat = Chat(tokenizer)
    messages = [{"role": "user", "content": prompt} for prompt in prompts]
    return [chat.prompt([one], f"prompt {number}") for number, one in enumerate(messages, start=1)], chat.stop_ids


def complete(
    model: Decoder,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    *,
    max_new_tokens: int = 128,
    sampling: Sampling | None = None,
    stop: Sequence[str] = (),
    chat: bool = False,
) -> list[str]:
    """The whole continuation of every prompt; the arguments are those of `generate_text`."""
    texts = [""] * len(prompts)
    for prompt, text in generate_text(
        model, tokenizer, prompts, max_new_tokens=max_new_tokens, sampling=sampling, stop=stop, chat=chat
    ):
        texts[prompt] += text
    return texts
