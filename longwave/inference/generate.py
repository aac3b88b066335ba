"""Generation of tokens: prompts of any lengths together, prefilled in chunks, then one token of each per step."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from longwave.errors import require, shown
from longwave.inference.sampling import Sampling, choose_token
from longwave.model import Decoder
from longwave.states import State

PREFILL_CHUNK = 2048  # tokens of a prompt that run at once, which bounds the memory for activations

Ended = Literal["end_token", "stop", "max_new_tokens", "context_window"]
"""Why a text ended: the model wrote an end token, a stop string came (or the caller asked), or a limit was reached."""


class Emitted(NamedTuple):
    """A new token. prompt: the index of the prompt that it continues."""

    prompt: int
    token: int


@dataclass
class _Sequence:
    """A sequence in progress.

    pending: tokens that the model has not run yet. left: how many new tokens may still come. limit: what allows no
    more. place: of the next new token in the sequence, which keys its random draw.
    """

    pending: list[int]
    left: int
    limit: Ended
    place: int = field(init=False)

    def __post_init__(self) -> None:
        self.place = len(self.pending)


class Generation:
    """The continuation of several prompts; iterating yields every new token as it is chosen.

    prompts: token ids of each. stop_tokens: tokens that end a sequence; they are emitted too. A sequence also ends
    after `max_new_tokens`, at the model's context window, and when the caller says `stop(prompt)`.
    ended: why the sequences that have ended did, by the index of the prompt.
    Raises UserError for an empty prompt, a token outside the vocabulary, and a prompt longer than the context window;
    MachineError, while iterating, for logits that are not finite.
    """

    def __init__(
        self,
        model: Decoder,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        sampling: Sampling | None = None,
        stop_tokens: Collection[int] = (),
    ) -> None:
        whole = isinstance(max_new_tokens, int) and max_new_tokens > 0
        require(whole, f"max_new_tokens = {shown(max_new_tokens)}: a whole number, 1 or more")
        checked = [_checked(model, prompt, number) for number, prompt in enumerate(prompts, start=1)]
        self._model, self._sampling, self._stop_tokens = model, sampling or Sampling(), stop_tokens
        room = [model.config.context_window + 1 - len(prompt) for prompt in checked]
        self._live = {i: _sequence(ids, max_new_tokens, room[i]) for i, ids in enumerate(checked)}
        self.ended: dict[int, Ended] = {}
        self.state = model.state(len(checked))

    def stop(self, prompt: int) -> None:
        """Ends the sequence of one prompt."""
        self._end(prompt, "stop")

    def __iter__(self) -> Iterator[Emitted]:
        while self._live:
            logits = self._next_logits()
            for row, (prompt, sequence) in zip(logits, list(self._live.items()), strict=True):
                token = choose_token(row, self._sampling, prompt, sequence.place)
                sequence.pending, sequence.place, sequence.left = [token], sequence.place + 1, sequence.left - 1
                if token in self._stop_tokens:
                    self._end(prompt, "end_token")
                elif sequence.left == 0:
                    self._end(prompt, sequence.limit)
                yield Emitted(prompt, token)

    def _end(self, prompt: int, why: Ended) -> None:
        self._live.pop(prompt, None)
        self.ended[prompt] = why

    def _next_logits(self) -> Tensor:
        """Runs all pending tokens, long prompts in chunks; logits (live sequences, V) after each one's last token."""
        for slot, sequence in self._live.items():
            while len(sequence.pending) > PREFILL_CHUNK:
                chunk, sequence.pending = sequence.pending[:PREFILL_CHUNK], sequence.pending[PREFILL_CHUNK:]
                run(self._model, self.state, [chunk], [slot])
        return run(self._model, self.state, [one.pending for one in self._live.values()], list(self._live))


@torch.no_grad()
def run(model: Decoder, state: State, pieces: Sequence[Sequence[int]], slots: Sequence[int]) -> Tensor:
    """Runs a piece of tokens of each slot's sequence; logits (pieces, V) after each piece's last token."""
    tokens = torch.tensor([token for piece in pieces for token in piece], device=state.device)
    stream = state.stream([len(piece) for piece in pieces], slots).last_rows()
    with model.mode(training=False):
        return model(tokens, stream, state)


def _sequence(ids: list[int], max_new_tokens: int, room: int) -> _Sequence:
    if room < max_new_tokens:
        return _Sequence(ids, room, "context_window")
    return _Sequence(ids, max_new_tokens, "max_new_tokens")


def _checked(model: Decoder, prompt: Any, number: int) -> list[int]:
    """The ids of a prompt, which may be any row of integers, as a list; UserError for one that the model cannot run."""
    ids = prompt.tolist() if hasattr(prompt, "tolist") else prompt
    row = isinstance(ids, Sequence) and all(type(token) is int for token in ids)
    require(row, f"prompt {number} = {shown(ids)}: give the token ids of each prompt, such as [[1, 2], [3]]")
    window, vocabulary = model.config.context_window, model.config.vocab_size
    require(len(ids) > 0, f"prompt {number} is empty; give at least one token")
    fits = len(ids) <= window
    require(fits, f"prompt {number} has {len(ids)} tokens; the model's context_window is {window}")
    known = all(0 <= token < vocabulary for token in ids)
    require(known, f"prompt {number} has a token outside the model's vocabulary of {vocabulary}")
    return list(ids)
