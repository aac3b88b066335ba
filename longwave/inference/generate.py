"""Generation of tokens: prompts of any lengths together, prefilled in chunks, then one token of each per step."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from longwave.errors import UserError, require
from longwave.inference.sampling import Sampling, choose_token
from longwave.model import Decoder
from longwave.states import State

PREFILL_CHUNK = 2048  # tokens of a prompt that run at once, which bounds the memory for activations


class Emitted(NamedTuple):
    """A new token. prompt: the index of the prompt that it continues."""

    prompt: int
    token: int


@dataclass
class _Sequence:
    """A sequence in progress.

    pending: tokens that the model has not run yet. left: how many new tokens may still come. place: of the next new
    token in the sequence, which keys its random draw.
    """

    pending: list[int]
    left: int
    place: int = field(init=False)

    def __post_init__(self) -> None:
        self.place = len(self.pending)


class Generation:
    """The continuation of several prompts; iterating yields every new token as it is chosen.

    stop_tokens: tokens that end a sequence; they are emitted too. A sequence also ends after `max_new_tokens`, at the
    model's context window, and when the caller says `stop(prompt)`.
    Raises UserError for an empty prompt, a token outside the vocabulary, and a prompt longer than the context window.
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
        require(max_new_tokens > 0, f"max_new_tokens = {max_new_tokens}: 1 or more")
        _check_prompts(model, prompts)
        self._model, self._sampling, self._stop_tokens = model.eval(), sampling or Sampling(), stop_tokens
        room = [model.config.context_window + 1 - len(prompt) for prompt in prompts]
        self._live = {i: _Sequence(list(p), min(max_new_tokens, room[i])) for i, p in enumerate(prompts)}
        self.state = model.state(len(prompts))

    def stop(self, prompt: int) -> None:
        """Ends the sequence of one prompt."""
        self._live.pop(prompt, None)

    def __iter__(self) -> Iterator[Emitted]:
        while self._live:
            logits = self._next_logits()
            for row, (prompt, sequence) in zip(logits, list(self._live.items()), strict=True):
                token = choose_token(row, self._sampling, prompt, sequence.place)
                sequence.pending, sequence.place, sequence.left = [token], sequence.place + 1, sequence.left - 1
                if sequence.left == 0 or token in self._stop_tokens:
                    self.stop(prompt)
                yield Emitted(prompt, token)

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
    return model(tokens, stream, state)


def _check_prompts(model: Decoder, prompts: Sequence[Sequence[int]]) -> None:
    window, vocabulary = model.config.context_window, model.config.vocab_size
    for index, prompt in enumerate(prompts):
        if not prompt:
            raise UserError(f"prompt {index + 1} is empty; give at least one token")
        if len(prompt) > window:
            raise UserError(f"prompt {index + 1} has {len(prompt)} tokens; the model's context_window is {window}")
        if not all(0 <= token < vocabulary for token in prompt):
            raise UserError(f"prompt {index + 1} has a token outside the model's vocabulary of {vocabulary}")
