"""Generation of tokens for several prompts on an engine of its own: what `lw.generate` and evaluations run."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterator, Sequence
from typing import NamedTuple

from longwave.engine.engine import Engine, EngineOptions
from longwave.engine.request import Ended, Request, ids_of
from longwave.engine.sampling import Sampling
from longwave.engine.speculation import Proposer
from longwave.errors import MachineError
from longwave.model import Decoder

STEP_TOKENS = 2048  # of prompts that run at once, which bounds the memory for activations
TOGETHER = 64  # prompts that are continued together at most


class Emitted(NamedTuple):
    """A new token. prompt: the index of the prompt that it continues."""

    prompt: int
    token: int


class Generation:
    """The continuation of several prompts; iterating yields every new token as it is chosen.

    prompts: token ids of each. stop_tokens: tokens that end a sequence; they are emitted too. A sequence also ends
    after `max_new_tokens`, at the model's context window, and when the caller says `stop(prompt)`. proposer: drafts
    tokens for the model to check.
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
        proposer: Proposer | None = None,
    ) -> None:
        requests = [
            Request(
                prompt=ids_of(prompt, f"prompt {number + 1}"),
                max_new_tokens=max_new_tokens,
                sampling=sampling or Sampling(),
                stop_tokens=frozenset(stop_tokens),
                sequence=number,
            )
            for number, prompt in enumerate(prompts)
        ]
        for number, request in enumerate(requests, start=1):
            request.check(model.config.vocab_size, model.config.context_window, f"prompt {number}")
        together = max(1, min(TOGETHER, len(requests)))
        longest = max((len(request.prompt) for request in requests), default=1) + max_new_tokens
        options = EngineOptions(
            running=together,
            step_tokens=max(STEP_TOKENS, together + 1),
            waiting=max(1, len(requests)),
            window=longest,
            prefixes=False,
        )
        self.engine = Engine(model, options, proposer=proposer)
        self.ended: dict[int, Ended] = {}
        self._prompts = {self.engine.submit(request): number for number, request in enumerate(requests)}
        self._numbers = {prompt: number for number, prompt in self._prompts.items()}

    def stop(self, prompt: int) -> None:
        """Ends the sequence of one prompt."""
        self.engine.cancel(self._numbers[prompt])
        self.ended[prompt] = "stop"

    def __iter__(self) -> Iterator[Emitted]:
        events = deque(self.engine.step())
        while events or not self.engine.idle:
            while events:
                event = events.popleft()
                if event.error is not None:
                    raise MachineError(event.error)
                prompt = self._prompts[event.request]
                if event.token is None or prompt in self.ended:
                    continue
                if event.ended is not None:
                    self.ended[prompt] = event.ended
                yield Emitted(prompt, event.token)
            events.extend(self.engine.step())
