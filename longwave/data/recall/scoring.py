"""Whether an answer stands in a text as a word of its own: 12 is neither in 4123 nor in 12.5."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from functools import lru_cache
from typing import Literal


def stands_in(answer: str, text: str) -> bool:
    """Whether an answer stands in a text, whatever its case and blanks, and not within a word."""
    return _pattern(answer).search(text.casefold()) is not None


def found_in(answers: Sequence[str], text: str, needed: Literal["all", "any"] = "all") -> float:
    """The share of the answers that stand in a text; with `any`, 1 or 0 for whether one of them does."""
    found = [stands_in(answer, text) for answer in answers]
    return float(any(found)) if needed == "any" else sum(found) / len(found)


@lru_cache(maxsize=1024)
def _pattern(answer: str) -> re.Pattern[str]:
    words = answer.casefold().split()
    # Nothing may touch the answer that would make it another word or number.
    before = r"(?<!\w)(?<!\d\.)" if _is_bounded(words[0][0]) else ""
    after = r"(?!\w)(?!\.\d)" if _is_bounded(words[-1][-1]) else ""
    return re.compile(before + r"\s+".join(map(re.escape, words)) + after)


def _is_bounded(letter: str) -> bool:
    """Whether a letter is of a script that puts blanks between words, unlike Chinese or Japanese."""
    return unicodedata.east_asian_width(letter) not in ("W", "F")
