"""Drafts by Medusa's heads: guesses of several heads, laid out as a tree that the model checks in one forward.

Source: Cai et al. 2024, arXiv 2401.10774. The tree is the paper's (section 2.3.3): of all places that a guess could
have, those are taken, one by one, at which the measured accuracies of the heads promise most. Acceptance is not: the
paper's "typical acceptance" changes what is said; here a draft counts if the model draws that very token, so a text
does not depend on the heads at all.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from longwave.engine.drafts import Drafts
from longwave.engine.sampling import first_tokens
from longwave.engine.speculation import Begun
from longwave.medusa import Medusa, Shares
from longwave.trees import MOST_DRAFTS, chain


class Place(NamedTuple):
    """A place in a tree of guesses. parent: the number of the place before it. head, rank: whose guess stands here.

    chance: that all tokens up to this one are right, if the heads' guesses are right independently of each other.
    """

    parent: int
    head: int
    rank: int
    chance: float


def likeliest_places(accuracies: Shares, count: int) -> list[Place]:
    """The places of a tree, at most `count`, by falling chance. accuracies: of the ranked guesses of each head."""
    found, waiting = list[Place](), list[tuple[float, int, Place]]()

    def offer(parent: int, head: int, rank: int) -> None:
        if head < len(accuracies) and rank < len(accuracies[head]):
            before = found[parent].chance if parent >= 0 else 1.0
            place = Place(parent, head, rank, before * accuracies[head][rank])
            heapq.heappush(waiting, (-place.chance, len(found) * 2 + (rank > 0), place))

    offer(-1, 0, 0)
    while waiting and len(found) < count:
        _, _, place = heapq.heappop(waiting)
        found.append(place)
        offer(len(found) - 1, place.head + 1, 0)
        offer(place.parent, place.head, place.rank + 1)
    return found


def expected_tokens_of(places: Sequence[Place]) -> float:
    """Tokens of one pass: the model's own, and one for every place whose whole path is right."""
    return 1 + sum(place.chance for place in places)


class MedusaDrafts:
    """Drafts by heads of the model that checks them (`longwave.engine.speculation.Proposer`).

    Where drafts may branch and the heads' accuracies are known, they form a tree; otherwise each head's first guess
    follows the one before. Where tokens are drawn, a head's guesses are those that its own probabilities give for the
    random numbers by which the model will draw.
    """

    def __init__(self, medusa: Medusa) -> None:
        self.medusa = medusa.eval()
        self.places = likeliest_places(medusa.accuracies, MOST_DRAFTS)

    @torch.no_grad()
    def propose(self, texts: Sequence[Begun]) -> list[Drafts]:
        """Drafts for each text; none for one whose last token was not chosen by the model."""
        hidden = [text.hidden for text in texts if text.hidden is not None]
        if not hidden:
            return [Drafts()] * len(texts)
        logits = iter(self.medusa(torch.stack(hidden)).unbind(1))
        return [Drafts() if text.hidden is None else self._drafts(text, next(logits)) for text in texts]

    def forget(self, number: int) -> None:
        return

    def _drafts(self, text: Begun, logits: Float[Tensor, "K V"]) -> Drafts:
        places = self._places(text)
        ranks = [max((one.rank for one in places if one.head == head), default=-1) for head in range(len(logits))]
        keys, place = (text.sampling, text.sequence), len(text.tokens)
        guesses = [first_tokens(logits[head], *keys, place + head, rank + 1) for head, rank in enumerate(ranks)]
        tokens = tuple(guesses[one.head][one.rank] for one in places)
        return Drafts(tokens, tuple(one.parent for one in places))

    def _places(self, text: Begun) -> Sequence[Place]:
        if text.branches and self.places:
            return self.places[: text.most]
        count = min(text.most, self.medusa.config.heads)
        return [Place(parent, head, 0, 0.0) for head, parent in enumerate(chain(count))]
