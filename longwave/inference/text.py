"""Generation of text: prompts are encoded, new tokens are decoded as they come, and stop strings are cut off."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import compress

from longwave.checkpoints.generation import end_ids
from longwave.data.tokenizer import StreamDecoder, Tokenizer
from longwave.engine.generation import TOGETHER, Generation
from longwave.engine.request import Ended
from longwave.engine.sampling import Sampling
from longwave.errors import require, shown
from longwave.inference.drafter import Draft, drafter
from longwave.model import Decoder


class Continuation(str):
    """Text that a model wrote: a string that also knows which prompt it continues, and why it ends.

    prompt: the index of the prompt. ended: why the text ends here; None for a piece that may be followed by others.
    """

    prompt: int
    ended: Ended | None

    def __new__(cls, text: str, prompt: int = 0, ended: Ended | None = None) -> Continuation:
        made = super().__new__(cls, text)
        made.prompt, made.ended = prompt, ended
        return made


@dataclass
class Writer:
    """Decodes the tokens of one sequence, and holds back text that may be the beginning of a stop string.

    names: special tokens by their ids; stop strings can name them, though no text shows them.
    held: the characters held back, names among them. shown: which of them are text. stopped: whether a stop string has
    been found.
    """

    decoder: StreamDecoder
    stops: Sequence[str]
    names: Mapping[int, str] = field(default_factory=dict[int, str])
    held: str = ""
    shown: list[bool] = field(default_factory=list[bool])
    stopped: bool = False

    def push(self, token: int) -> str:
        """The text that a token brings; after a stop string, `stopped` is true and nothing more should come."""
        if token not in self.names:
            return self._release(self.decoder.push(token))
        name, rest = self.names[token], self.decoder.rest
        if any(stop in self.held + rest + name for stop in self.stops):
            self._hold(rest, shown=True)  # half characters before the name, which nothing will complete
        return self._release(name, shown=False)

    def finish(self) -> str:
        """The text that is still held back, once no token follows."""
        if self.stopped:
            return ""
        text = self._release(self.decoder.finish())
        return text if self.stopped else text + self._take(len(self.held))

    def _release(self, text: str, shown: bool = True) -> str:
        self._hold(text, shown)
        ends = [place for stop in self.stops if (place := self.held.find(stop)) >= 0]
        if ends:
            self.stopped = True
            return self._take(min(ends))
        keep = max((n for stop in self.stops for n in range(1, len(stop)) if self.held.endswith(stop[:n])), default=0)
        return self._take(len(self.held) - keep)

    def _hold(self, text: str, shown: bool) -> None:
        self.held += text
        self.shown += [shown] * len(text)

    def _take(self, count: int) -> str:
        """The text among the first `count` characters, which are held no longer."""
        text = "".join(compress(self.held[:count], self.shown))
        self.held, self.shown = self.held[count:], self.shown[count:]
        return text


def generate_text(
    model: Decoder,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    *,
    max_new_tokens: int = 128,
    sampling: Sampling | None = None,
    stop: str | Sequence[str] = (),
    chat: bool = False,
    draft: Draft = None,
) -> Iterator[Continuation]:
    """Yields the continuation of every prompt in pieces of text, each up to the first of the strings in `stop`.

    Prompts begin with what the tokenizer puts before a text: bos as a rule. A text ends at the tokenizer's eos token,
    or at an end token that the model's folder names. The last piece of a prompt says why it ended, and may be empty.

    stop: a string, or several; a special token's name stops at that token. chat: whether each prompt is a user's
    message, to be continued by the assistant's answer. draft: who drafts tokens for the model to check, which changes
    no text.
    Raises UserError like `Generation`, and with `chat` for a tokenizer without a usable chat template; MachineError,
    while iterating, for logits that are not finite.
    """
    stops = _stops(stop)
    encoded, turn_ends = (_questions if chat else _beginnings)(tokenizer, _texts(prompts))
    ends = end_ids(model.origin.generation, tokenizer) | turn_ends
    proposer = drafter(draft, model, min(max(1, len(encoded)), TOGETHER))
    generation = Generation(
        model, encoded, max_new_tokens=max_new_tokens, sampling=sampling, stop_tokens=ends, proposer=proposer
    )
    writers = [Writer(StreamDecoder(tokenizer, after=ids), stops, tokenizer.special_tokens) for ids in encoded]
    return _written(generation, writers)


def _written(generation: Generation, writers: Sequence[Writer]) -> Iterator[Continuation]:
    for prompt, token in generation:
        writer = writers[prompt]
        text = writer.push(token)
        if prompt in generation.ended:
            text += writer.finish()
        if writer.stopped:
            generation.stop(prompt)
        ended = generation.ended.get(prompt)
        if text or ended:
            yield Continuation(text, prompt, ended)


def _stops(stop: str | Sequence[str]) -> tuple[str, ...]:
    stops = (stop,) if isinstance(stop, str) else tuple(stop)
    for one in stops:
        require(isinstance(one, str), f"stop = {shown(one)}: a string, or a list of them")
        require(bool(one), "stop: a stop string is empty; leave it out")
    return stops


def _texts(prompts: Sequence[str]) -> list[str]:
    several = isinstance(prompts, Iterable) and not isinstance(prompts, str | bytes)
    require(several, f"prompts = {shown(prompts)}: a list of texts")
    for number, prompt in enumerate(texts := list(prompts), start=1):
        require(isinstance(prompt, str), f"prompt {number} = {shown(prompt)}: a text")
    return texts


def _beginnings(tokenizer: Tokenizer, prompts: Sequence[str]) -> tuple[list[list[int]], frozenset[int]]:
    """The ids of texts to be continued, and the tokens that end them besides the model's end tokens: none."""
    return [tokenizer.encode(prompt, add_bos=True) for prompt in prompts], frozenset()


def _questions(tokenizer: Tokenizer, prompts: Sequence[str]) -> tuple[list[list[int]], frozenset[int]]:
    """The ids of conversations of one user's message up to the assistant's answer, and the ids that end an answer."""
    from longwave.data.chat import Chat

    chat = Chat(tokenizer)
    messages = [{"role": "user", "content": prompt} for prompt in prompts]
    return [chat.prompt([one], f"prompt {number}") for number, one in enumerate(messages, start=1)], chat.stop_ids


def joined(pieces: Iterable[Continuation]) -> list[Continuation]:
    """The whole continuation of every prompt, from all pieces of all of them."""
    texts, ended = dict[int, str](), dict[int, Ended | None]()
    for piece in pieces:
        texts[piece.prompt] = texts.get(piece.prompt, "") + piece
        ended[piece.prompt] = piece.ended
    return [Continuation(texts[prompt], prompt, ended[prompt]) for prompt in sorted(texts)]


def complete(
    model: Decoder,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    *,
    max_new_tokens: int = 128,
    sampling: Sampling | None = None,
    stop: str | Sequence[str] = (),
    chat: bool = False,
) -> list[Continuation]:
    """The whole continuation of every prompt; the arguments are those of `generate_text`."""
    pieces = generate_text(
        model, tokenizer, prompts, max_new_tokens=max_new_tokens, sampling=sampling, stop=stop, chat=chat
    )
    return joined(pieces)
