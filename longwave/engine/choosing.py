"""The choice of the next tokens of one request.

Legend: `V` vocabulary.
"""

from __future__ import annotations

import math
from functools import cached_property
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from longwave.engine.request import Request
from longwave.engine.sampling import History, biased, choose_token


class Choice(NamedTuple):
    """A chosen token; its log-probability and those of the likeliest ones, where they are asked for."""

    token: int
    logprob: float | None = None
    likeliest: tuple[tuple[int, float], ...] = ()


class Chooser:
    """Chooses the tokens of one request."""

    def __init__(self, request: Request, vocabulary: int, device: torch.device) -> None:
        self.request = request
        penalises = request.sampling.penalises
        self._history = History(request.prompt, (), vocabulary, device) if penalises else None
        self._device = device
        self._first = len(request.prompt)
        self._ends = torch.tensor(sorted(request.stop_tokens), dtype=torch.int64, device=device)

    @cached_property
    def is_plain(self) -> bool:
        """Whether it takes the likeliest token of the logits as they are, and tells nothing more."""
        one = self.request
        changed = self._history is not None or one.sampling.logit_bias or one.min_new_tokens or one.constraint
        return one.sampling.temperature == 0 and one.logprobs is None and not changed

    def choose(self, logits: Float[Tensor, " V"], place: int, peak: float, likeliest: int) -> Choice:
        """The next token, at a place of the sequence. peak, likeliest: the largest logit, and its token.

        MachineError for logits that are not finite.
        """
        request = self.request
        if self.is_plain and math.isfinite(peak):
            return Choice(likeliest)
        logits = self.left(logits, place)
        token = choose_token(logits, request.sampling, request.sequence, place)
        self.accept(token)
        if request.logprobs is None:
            return Choice(token)
        told = torch.log_softmax(logits.double(), -1)
        most = told.topk(min(request.logprobs, told.numel()))
        pairs = zip(most.indices.tolist(), most.values.tolist(), strict=True)
        return Choice(token, float(told[token]), tuple((int(one), float(value)) for one, value in pairs))

    def left(self, logits: Float[Tensor, " V"], place: int) -> Float[Tensor, " V"]:
        """The logits after penalties and bias; minus infinity for tokens that may not come at this place."""
        request = self.request
        if self._history is not None:
            logits = self._history.penalised(logits, request.sampling)
        if request.sampling.logit_bias:
            logits = biased(logits, request.sampling.logit_bias)
        if place - self._first < request.min_new_tokens and self._ends.numel():
            logits = logits.index_fill(0, self._ends, -math.inf)
        allowed = None if request.constraint is None else request.constraint.allowed()
        if allowed is not None:
            logits = logits.masked_fill(~torch.from_numpy(allowed).to(self._device), -math.inf)
        return logits

    def accept(self, token: int) -> None:
        """Takes note of a chosen token."""
        if self._history is not None:
            self._history.add(token)
        if self.request.constraint is not None:
            self.request.constraint.accept(token)
