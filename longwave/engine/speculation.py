"""Speculative decoding: cheap drafts of the next tokens, which the model checks in one forward.

Leviathan et al. (2023) and Chen et al. (2023) accept a draft with a probability by which the result is distributed as
without drafts. Here the model draws every token as it would without drafts, by the same keyed random number, and a
draft is accepted if it is that token; drafts are drawn by the same number, too. So a text does not depend on whether,
by whom, or how much was drafted (drafter-invariant: Daliri et al. 2024, arXiv 2408.07978), sampled or greedy, and
penalties, grammars and biases need nothing of their own. Of a draft that is certain of its token no rule accepts more.
A drawn one counts with a chance of (1 - d) / (1 + d) or more, where d is the total variation distance of the two
distributions; the optimal rule would accept 1 - d.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from longwave.engine.drafts import Drafts
from longwave.engine.memory import page_options
from longwave.engine.sampling import Sampling, choose_token
from longwave.errors import require
from longwave.model import Decoder
from longwave.states import Branch, OutOfPages

_CHUNK = 512  # tokens that a draft model runs at once
_PAGE = 64  # tokens of a page of a draft model's state


class Begun(NamedTuple):
    """A text to be continued by drafts.

    number: of its request. most: tokens that may be drafted. hidden: the normalised hidden state from which the model
    chose the last token, where it did. branches: whether drafts may be on several paths.
    """

    number: int
    tokens: Sequence[int]
    most: int
    sampling: Sampling
    sequence: int
    hidden: Float[Tensor, " D"] | None = None
    branches: bool = False


@runtime_checkable
class Proposer(Protocol):
    """Drafts the next tokens of texts."""

    def propose(self, texts: Sequence[Begun]) -> list[Drafts]:
        """At most `most` tokens for each text; none is always right."""
        ...

    def forget(self, number: int) -> None:
        """The request has ended."""
        ...


@dataclass
class PromptLookup:
    """Drafts what followed the last tokens of a text where they came before (Saxena 2023; Yang et al. 2023).

    longest, shortest: how many of the last tokens have to agree; more are tried first. within: so many of the newest
    tokens are searched.
    """

    longest: int = 3
    shortest: int = 2
    within: int = 8192

    def __post_init__(self) -> None:
        require(0 < self.shortest <= self.longest, f"shortest = {self.shortest}: from 1 to longest = {self.longest}")

    def propose(self, texts: Sequence[Begun]) -> list[Drafts]:
        return [Drafts.of(self._following(list(text.tokens[-self.within :]), text.most)) for text in texts]

    def _following(self, tokens: list[int], most: int) -> list[int]:
        for length in range(min(self.longest, len(tokens) - 1), self.shortest - 1, -1):
            sought = tokens[-length:]
            for start in range(len(tokens) - length - 1, -1, -1):
                if tokens[start] == sought[0] and tokens[start : start + length] == sought:
                    return tokens[start + length : start + length + most]
        return []

    def forget(self, number: int) -> None:
        return


@dataclass
class _Drafted:
    """A draft model's side of a sequence. slot: of its state. ran: the tokens that its state has seen.

    sure: the boundary before the newest drafts, for a state that cannot be cut.
    """

    slot: int
    ran: list[int] = field(default_factory=list[int])
    sure: Branch | None = None


class DraftModel:
    """Drafts by a smaller model with the same tokens, which draws as the large one does.

    sequences: how many texts are drafted for at most; others get no drafts.
    """

    def __init__(self, model: Decoder, sequences: int = 16) -> None:
        self.model = model
        window = model.config.context_window
        self._state = model.state(sequences, pages=page_options(model, sequences, window, None, _PAGE))
        self._forgets = any(spec.forgets for spec in self._state.specs.values())
        self._slots, self._known = list(range(sequences)), dict[int, _Drafted]()

    def propose(self, texts: Sequence[Begun]) -> list[Drafts]:
        drafts = {text.number: list[int]() for text in texts}
        live = [text for text in texts if self._takes(text)]
        try:
            self._catch_up(live)
            while live := [text for text in live if len(drafts[text.number]) < text.most]:
                self._draft(live, drafts)
        except OutOfPages:
            for text in live:
                self.forget(text.number)
        return [Drafts.of(drafts[text.number]) for text in texts]

    def forget(self, number: int) -> None:
        if (one := self._known.pop(number, None)) is not None:
            if one.sure is not None:
                one.sure.drop()
            self._state.release(one.slot)
            self._slots.append(one.slot)

    def _takes(self, text: Begun) -> bool:
        """Whether there are drafts for a text: where there is a slot, and room in the window."""
        fits = len(text.tokens) + text.most <= self.model.config.context_window
        if text.number not in self._known and fits and self._slots:
            self._known[text.number] = _Drafted(self._slots.pop())
        return fits and text.number in self._known and text.most > 0

    def _catch_up(self, texts: Sequence[Begun]) -> None:
        """Takes back drafts that were not accepted, and runs what was chosen since, all but the last token."""
        for text in texts:
            self._take_back(self._known[text.number], text.tokens)
        while behind := [text for text in texts if len(self._known[text.number].ran) < len(text.tokens) - 1]:
            pieces, left = list[Sequence[int]](), _CHUNK
            for text in behind:
                done = len(self._known[text.number].ran)
                pieces.append(text.tokens[done : min(len(text.tokens) - 1, done + left)])
                left -= len(pieces[-1])
            self._run(behind, pieces, wanted=False)
        for text in texts if self._forgets else ():
            one = self._known[text.number]
            one.sure = self._state.branch(one.slot)

    def _take_back(self, one: _Drafted, tokens: Sequence[int]) -> None:
        same = next(
            (i for i, pair in enumerate(zip(one.ran, tokens, strict=False)) if pair[0] != pair[1]), len(one.ran)
        )
        same = min(same, len(tokens) - 1)
        if self._forgets and same < len(one.ran):
            self._state.release(one.slot)
            if one.sure is not None and one.sure.seen <= same:
                self._state.continue_from(one.slot, one.sure)
            one.ran = one.ran[: one.sure.seen if one.sure is not None and one.sure.seen <= same else 0]
        elif same < len(one.ran):
            self._state.truncate(one.slot, same)
            one.ran = one.ran[:same]
        if one.sure is not None:
            one.sure.drop()
            one.sure = None

    def _draft(self, texts: Sequence[Begun], drafts: Mapping[int, list[int]]) -> None:
        """One more token for each of the texts."""
        newest = [[*text.tokens[-1:], *drafts[text.number]][-1:] for text in texts]
        logits = self._run(texts, newest, wanted=True)
        assert logits is not None
        for text, row in zip(texts, logits, strict=True):
            place = len(text.tokens) + len(drafts[text.number])
            drafts[text.number].append(choose_token(row, text.sampling, text.sequence, place))

    @torch.no_grad()
    def _run(self, texts: Sequence[Begun], pieces: Sequence[Sequence[int]], wanted: bool) -> Tensor | None:
        slots = [self._known[text.number].slot for text in texts]
        stream = self._state.stream([len(piece) for piece in pieces], slots).last_rows([int(wanted)] * len(pieces))
        tokens = torch.tensor([token for piece in pieces for token in piece], device=self._state.device)
        with self.model.mode(training=False):
            logits = self.model(tokens, stream, self._state)
        for text, piece in zip(texts, pieces, strict=True):
            self._known[text.number].ran.extend(piece)
        return logits if wanted else None


def expected_tokens(acceptance: float, drafted: int) -> float:
    """Tokens of one pass at a rate of acceptance: (1 - a^(k+1)) / (1 - a) (Leviathan et al. 2023, equation 1)."""
    return drafted + 1.0 if acceptance == 1 else (1 - acceptance ** (drafted + 1)) / (1 - acceptance)
