"""The laws a part can keep, which it declares per mode and the contract tests prove."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Law(Enum):
    """What is promised about a part's outputs."""

    CHUNKING = "running a sequence at once or in pieces through its state gives the same output"
    COMPANY = "which other sequences share the stream never changes a sequence's result"
    CAUSALITY = "changing a token changes nothing before it"
    ROLLBACK = "the state can be returned to any earlier token boundary"


ALL = frozenset(Law)


@dataclass(frozen=True)
class Laws:
    """The laws kept in training and at inference."""

    training: frozenset[Law] = frozenset({Law.COMPANY, Law.CAUSALITY})
    inference: frozenset[Law] = ALL
