"""Who runs in a step, and how many tokens of each: pure bookkeeping, which knows no model.

Every step is one stream. Sequences that are being continued all take part in each of them, with the token chosen last;
what is left of the step's budget goes to those that are still being read. Of these the oldest has a right to a quarter,
so that it ends after a number of steps that no later request can put off; the rest goes to those with the least to
read, which begin to answer soonest. So a request with R older ones running beside it waits at most until their tokens
have run, at a quarter of the budget a step.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor

from longwave.engine.drafts import Drafts
from longwave.engine.request import Ended, Request

_SHARE_OF_OLDEST = 4  # one in so many of the tokens of a step that are left for prompts


@dataclass(eq=False)
class Sequence:
    """A request in the engine.

    number: of the request. tokens: the prompt and what was chosen. left: tokens that may still come, the last of which
    ends it as `limit` says. deadline: on the engine's clock. slot: of the state, while it runs. seen: tokens that the
    state holds. cached: tokens of the prompt that were found in the state of others. stops: places at which a piece of
    it has to end, ascending. newest: tokens that run before the next is chosen though others have been: the one chosen
    last, and those that drafts beside them made run in vain. hidden: that from which the last token was chosen, where
    somebody drafts.
    """

    number: int
    request: Request
    left: int
    limit: Ended
    deadline: float | None = None
    slot: int | None = None
    seen: int = 0
    cached: int = 0
    stops: list[int] = field(default_factory=list[int])
    newest: int = 1
    hidden: Float[Tensor, " D"] | None = None
    tokens: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self.tokens = list(self.request.prompt)

    @property
    def pending(self) -> int:
        """Tokens that have to run before the next can be chosen."""
        return len(self.tokens) - self.seen

    @property
    def ready(self) -> int:
        """Tokens of these that may run in one piece."""
        return min([self.pending, *(stop - self.seen for stop in self.stops[:1])])

    @property
    def is_continued(self) -> bool:
        """Whether all but what was chosen in the last step has run, before which there may be tokens to run again."""
        return self.new_tokens > 0 and self.pending <= self.newest

    @property
    def new_tokens(self) -> int:
        """Tokens that were chosen so far."""
        return len(self.tokens) - len(self.request.prompt)


class Piece(NamedTuple):
    """The next `length` tokens of a sequence that run in a step, and drafts behind them, which run as well."""

    sequence: Sequence
    length: int
    drafts: Drafts = Drafts()

    @property
    def tokens(self) -> list[int]:
        """All that run."""
        one = self.sequence
        return [*one.tokens[one.seen : one.seen + self.length], *self.drafts.tokens]

    @property
    def is_last(self) -> bool:
        """Whether a token can be chosen afterwards."""
        return self.length == self.sequence.pending

    @property
    def rows(self) -> int:
        """Rows of logits that are needed: behind its last token, and behind every draft."""
        return 1 + len(self.drafts.tokens) if self.is_last else 0


@dataclass
class Scheduler:
    """The sequences that run and those that wait.

    slots: free ones of the state. tokens: of one step, at most.
    """

    slots: list[int]
    tokens: int
    running: list[Sequence] = field(default_factory=list[Sequence])  # by arrival
    waiting: deque[Sequence] = field(default_factory=deque[Sequence])

    def plan(self) -> list[Piece]:
        """The pieces of the next step, in the order in which their requests came."""
        counts = {one: one.pending for one in self.running if one.is_continued}
        read, left = [one for one in self.running if one not in counts], self.tokens - sum(counts.values())
        if read:
            counts[read[0]] = min(read[0].ready, max(1, left // _SHARE_OF_OLDEST))
            left -= counts[read[0]]
        for one in sorted(read, key=lambda one: one.pending):
            more = min(one.ready - counts.get(one, 0), left)
            counts[one] = counts.get(one, 0) + more
            left -= more
        return [Piece(one, counts[one]) for one in self.running if counts[one]]

    def admit(self) -> Sequence:
        """Gives a slot to the first that waits."""
        one = self.waiting.popleft()
        one.slot = self.slots.pop()
        self.running.append(one)
        self.running.sort(key=lambda one: one.number)
        return one

    def put_back(self, one: Sequence) -> None:
        """Takes the slot of a sequence, which waits before all others until it can run again from its beginning."""
        self.leave(one)
        one.seen, one.stops, one.newest = 0, [], 1
        self.waiting.appendleft(one)

    def leave(self, one: Sequence) -> None:
        """Takes a sequence out."""
        if one.slot is None:
            self.waiting.remove(one)
        else:
            self.running.remove(one)
            self.slots.append(one.slot)
            one.slot = None
