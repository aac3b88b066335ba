"""The laws: promises about its outputs that a part of a model declares and the contract tests prove."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Law(Enum):
    """A promise about a part's outputs; the value says it in words."""

    CHUNKING = "running a sequence at once or in pieces through its state gives the same output"
    COMPANY = "which other sequences share the stream never changes a sequence's result"
    CAUSALITY = "changing a token changes nothing before it"
    ROLLBACK = "the state can be returned to any earlier token boundary"


ALL = frozenset(Law)


@dataclass(frozen=True)
class Laws:
    """The laws that a part keeps in training and at inference.

    Training has no state, so chunking and rollback are not asked of it.
    """

    training: frozenset[Law] = frozenset({Law.COMPANY, Law.CAUSALITY})
    inference: frozenset[Law] = ALL
