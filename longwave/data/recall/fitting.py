"""A recall task brought to its length: as many lines as fit, and words for what is left, counted in the joined text.

A tokenizer joins letters across pieces, so that the tokens of a text are not those of its pieces. Pieces say how many
lines to take and which words to try; the whole text, encoded as the evaluation and training encode it, decides.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import accumulate, pairwise
from operator import itemgetter
from typing import Literal, NamedTuple

from longwave.data.encoding import around
from longwave.data.marks import Span
from longwave.data.recall.families import Family, Plan
from longwave.data.recall.words import PADDING, Draws
from longwave.data.tokenizer import Tokenizer
from longwave.errors import UserError, require, shown
from longwave.units import LAST_PLACE

_TRIES = 8  # samples drawn before a length is given up
_SHORTER = 4  # lines less, each of which leaves another rest
_STEPS = 16  # of the search for the number of lines
_LARGE = 40  # tokens of a rest that begins with the text of padding that a plan may have
_CORRECTED = 16  # times that words are chosen anew, since they take other tokens together than alone
_NEAR = 40  # characters on either side by which padding is measured


@dataclass(frozen=True)
class Sample:
    """A recall task of exact length.

    length: tokens of the whole: what the tokenizer puts around a text, prompt, and the answer with its line end.
    prompt: up to the last question, earlier ones with their answers. targets: the answer to each question with its line
    end; spans: the tokens of each, from its first to the one after its last, of the text as it is stored.
    answers: what has to be found in what a model says to the last question: all of it, or any one (`needed`).
    depth: the share of the filler before the needle; None without one. chance: that a guess is right.
    """

    family: str
    length: int
    depth: float | None
    prompt: str
    targets: tuple[str, ...]
    answers: tuple[str, ...]
    needed: Literal["all", "any"]
    spans: tuple[Span, ...]
    chance: float

    @property
    def text(self) -> str:
        """The prompt and its answer."""
        return self.prompt + self.targets[-1]

    @property
    def prompt_tokens(self) -> int:
        """Tokens of the prompt, with what the tokenizer puts before it."""
        return self.spans[-1][0]


def sample(
    family: Family, tokenizer: Tokenizer, length: int, depth: float | None, *key: int, questions: int = 1
) -> Sample:
    """The sample of a key. depth: from 0, at the beginning, to 1; drawn where it is None.

    questions: how many are asked in turn, of a family that asks many.
    Raises UserError for a length too short for the task, longer than it has words for, or that no text of this
    tokenizer has, and for a tokenizer that cannot write the answer.
    """
    require(0 < length <= LAST_PLACE, f"length = {length}: 1 to {LAST_PLACE:,} tokens")
    problems = list[_NotFound]()
    for number in range(_TRIES):
        plan = family.plan(Draws(*key, length, number), length, depth, questions)
        try:
            return _Fit(family, tokenizer, plan, length, depth).sample()
        except _NotFound as error:
            problems.append(error)
    least = max(one.least for one in problems)
    if least > length:
        raise UserError(f"length = {length:,}: {family.name} takes {least:,} tokens or more with this tokenizer")
    raise UserError(f"length = {length:,}: {family.name}: no text of it with this tokenizer; give another length")


class _NotFound(Exception):
    """No text of the length was found with these words. least: tokens that their shortest text has."""

    def __init__(self, least: int) -> None:
        self.least = least


class _Text(NamedTuple):
    """A text by its parts: before the padding, the padding, and after it."""

    before: str
    padding: str
    after: str

    @property
    def whole(self) -> str:
        return self.before + self.padding + self.after


class _Line(NamedTuple):
    """A line, and about the tokens that it takes."""

    text: str
    tokens: int


def _merged(lines: Sequence[_Line], needles: Sequence[tuple[float, _Line]]) -> list[_Line]:
    """Lines with needles among them, each where its share of the lines' tokens comes before it."""
    total, before, merged = sum(line.tokens for line in lines), 0, list[_Line]()
    waiting = deque(sorted(needles, key=itemgetter(0)))
    for line in lines:
        while waiting and waiting[0][0] * total < before + line.tokens / 2:
            merged.append(waiting.popleft()[1])
        merged.append(line)
        before += line.tokens
    return [*merged, *(needle for _, needle in waiting)]


class _Fit:
    """Fits a plan to a length."""

    def __init__(self, family: Family, tokenizer: Tokenizer, plan: Plan, length: int, depth: float | None) -> None:
        self._family, self._tokenizer, self._plan, self._length, self._depth = family, tokenizer, plan, length, depth
        opening, closing = around(tokenizer)
        self._opening, self._fixed = len(opening), len(opening) + len(closing)
        self._lines, self._ends = list[str](), [0]
        for target in plan.targets:
            _require_written(tokenizer, target)

    @property
    def least(self) -> int:
        """Tokens of the shortest text of the plan, with room for a line of padding."""
        padding = f"{self._plan.joint}{' '.join(PADDING[:2])}"
        return self._size(self._composed(self._plan.least)._replace(padding=padding))

    def sample(self) -> Sample:
        """Raises UserError for a length that the task does not have; _NotFound where only these words are at fault."""
        least, lowest = self.least, self._plan.least
        if least > self._length:
            raise _NotFound(least)
        most = self._most_lines()
        for number in range(most, max(lowest, most - _SHORTER) - 1, -1):
            text = self._padded(self._composed(number))
            found = None if text is None else self._checked(text, number)
            if found is not None:
                return found
        raise _NotFound(least)

    def _most_lines(self) -> int:
        """The most lines that fit, or nearly: what single lines take is corrected by what the text takes as a whole."""
        number = self._plan.least
        room = self._length - self._size(self._composed(number)) + self._end(number)
        for _ in range(_STEPS):
            number = self._lines_within(room)
            rest = self._length - self._size(self._composed(number))
            if 0 <= rest <= self._end(number + 1) - self._end(number):
                return number
            room = self._end(number) + rest
        while self._size(self._composed(number)) > self._length:
            number -= 1
        return number

    def _lines_within(self, room: int) -> int:
        """The most lines that by themselves take no more than so many tokens, and no fewer than the task needs."""
        while self._ends[-1] <= room and len(self._lines) < self._plan.lines:
            self._measure(2 * len(self._lines) + 8)
        number = bisect_right(self._ends, room) - 1
        full = number >= self._plan.lines
        require(
            not full,
            f"length = {self._length:,}: {self._family.name} has too little text for so many tokens; give fewer",
        )
        return max(number, self._plan.least)

    def _end(self, number: int) -> int:
        """About the tokens of so many lines."""
        self._measure(number)
        return self._ends[min(number, self._plan.lines)]

    def _measure(self, number: int) -> None:
        """Makes the lines up to a number, and finds about the tokens that each takes."""
        new = [self._plan.line(place) for place in range(len(self._lines), min(number, self._plan.lines))]
        if new:
            self._lines += new
            self._ends += list(accumulate(self._sizes(new), initial=self._ends[-1]))[1:]

    def _sizes(self, lines: Sequence[str]) -> list[int]:
        """About the tokens that each line takes in a text."""
        joined = [f"a{self._plan.joint}{line}" for line in ["", *lines]]
        bare, *sizes = map(len, self._tokenizer.encode_batch(joined))
        return [max(1, size - bare) for size in sizes]

    def _composed(self, number: int) -> _Text:
        """The text of so many lines of filler, with every needle at its place, and every question answered.

        Padding comes where it moves the needle least: after the first line, if the needle stands in the second half.
        """
        plan, lines = self._plan, self._placed(number)
        cut = 1 if self._family.has_depth and plan.places[0] >= 0.5 and len(lines) > 1 else len(lines)
        after = "".join(plan.joint + line for line in lines[cut:])
        return _Text(plan.head + plan.joint.join(lines[:cut]), "", after + plan.asked)

    def _placed(self, number: int) -> list[str]:
        """Lines and needles in order: where one is asked for, its share of the tokens of all others comes before it."""
        self._measure(number)
        lines = [
            _Line(line, end - start) for line, (start, end) in zip(self._lines, pairwise(self._ends), strict=False)
        ]
        needles = list(zip(self._plan.places, self._needles, strict=True))
        if not self._family.has_depth:
            return [line.text for line in _merged(lines[:number], needles)]
        others = _merged(lines[:number], needles[1:])
        return [line.text for line in _merged(others, needles[:1])]

    @cached_property
    def _needles(self) -> list[_Line]:
        """The needles, with about the tokens that each takes."""
        return [_Line(*one) for one in zip(self._plan.needles, self._sizes(self._plan.needles), strict=True)]

    def _size(self, text: _Text) -> int:
        """Tokens of a whole sample."""
        return self._fixed + len(self._tokenizer.encode(text.whole))

    def _padded(self, text: _Text) -> _Text | None:
        """The text with words that take exactly what is left of the length; None where none are found."""
        rest = self._length - self._size(text)
        if rest == 0:
            return text
        first, joint, costs = self._beginning(text, rest), self._plan.joint, deque(_costs(self._tokenizer))
        aim = rest - (self._taken(text, joint + first) if first else 0)
        for _ in range(_CORRECTED):
            chosen = _summing_to(aim, costs)
            if chosen is None:
                return None
            padding = joint + " ".join([*([first] if first else []), *chosen])
            missing = rest - self._taken(text, padding)
            if missing == 0:
                return text._replace(padding=padding)
            aim += missing
            costs.rotate(-1)  # other words, since the same could be too many and too few by turns
        return None

    def _beginning(self, text: _Text, rest: int) -> str:
        """The words of the plan's own padding that come first, in a rest that is large."""
        words = self._plan.padding.split() if rest > _LARGE else []
        most = bisect_right(
            range(len(words) + 1),
            rest - _LARGE // 2,
            key=lambda count: self._taken(text, self._plan.joint + " ".join(words[:count])),
        )
        return " ".join(words[: max(most - 1, 0)])

    def _taken(self, text: _Text, padding: str) -> int:
        """Tokens that a padding takes, measured in a part of the text."""
        near = _Text(text.before[-_NEAR:], "", text.after[:_NEAR])
        bare, padded = self._tokenizer.encode_batch([near.whole, near._replace(padding=padding).whole])
        return len(padded) - len(bare)

    def _checked(self, text: _Text, number: int) -> Sample | None:
        """The sample, if the joined text has the length, and breaks into tokens where every answer begins and ends."""
        plan, whole, edges = self._plan, text.whole, self._edges(text.whole)
        ids, *parts = self._tokenizer.encode_batch([whole, *(whole[:edge] for edge in edges)])
        if self._fixed + len(ids) != self._length or any(ids[: len(part)] != part for part in parts):
            return None
        depth = self._depth if self._family.has_depth else None
        known = self._family.name, self._length, depth, whole[: edges[-2]], tuple(plan.targets), plan.turns[-1].answers
        starts, ends = ([self._opening + len(part) for part in parts[first::2]] for first in (0, 1))
        spans = tuple(zip(starts, ends, strict=True))
        return Sample(*known, plan.needed, spans, plan.chance(self._placed(number)))

    def _edges(self, whole: str) -> list[int]:
        """The characters at which each answer begins and ends, in order; the last answer ends the text."""
        pairs = zip(self._plan.turns, self._plan.targets, strict=True)
        sizes = [len(piece) for turn, target in pairs for piece in (turn.question, target)]
        return list(accumulate(sizes, initial=len(whole) - sum(sizes)))[1:]


@lru_cache(maxsize=16)
def _costs(tokenizer: Tokenizer) -> list[tuple[str, int]]:
    """The words of padding, and about the tokens of each."""
    bare, *sizes = map(len, tokenizer.encode_batch(["a", *(f"a {word}" for word in PADDING)]))
    return [(word, max(1, size - bare)) for word, size in zip(PADDING, sizes, strict=True)]


def _summing_to(tokens: int, costs: Iterable[tuple[str, int]]) -> list[str] | None:
    """Words, none twice, that by themselves take so many tokens together; None where there are none."""
    reached = {0: list[str]()}
    for word, cost in costs:
        for size, words in list(reached.items()):
            if size + cost <= tokens:
                reached.setdefault(size + cost, [*words, word])
        if tokens in reached:
            break
    return reached.get(tokens) if tokens > 0 else None


def _require_written(tokenizer: Tokenizer, target: str) -> None:
    """UserError for a tokenizer that cannot write the answer."""
    read = tokenizer.decode(tokenizer.encode(f"a{target}"))
    same = read.split() == f"a{target}".split()
    require(same, f"tokenizer: it writes {shown(target.strip())} as {shown(read[1:].strip())}; give one that keeps it")
