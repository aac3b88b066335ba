"""The families of recall tasks: for each, what stands in the text, what is asked, and what answers.

A family makes a `Plan`: lines of filler without end, the needles among them, and the question. `fitting.py` takes as
many lines as give the length that is wanted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from longwave import draws
from longwave.data.recall.words import ADJECTIVES, NOUNS, Draws, Names, sentence
from longwave.errors import UserError, shown

SHORT_TEXT = 800  # tokens; up to here keys have one word and chains of variables two steps, as short texts need
DIGITS = 5
_KEYS, _VALUES, _QUERIES = 4, 4, 4  # RULER's numbers of needles
_COPIED = 8  # words
_COMMON, _TIMES = 5, 8  # words, and how often each stands in the list
_BLOCK = (0, 0, 0, 0, 1, 1, 1, 2, 2, 3)  # of ten words: the most frequent, the next two, and one of the others
_STEPS = (1, 3, 7, 9)  # through a block, each of which meets every word of it
_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


@dataclass(frozen=True)
class Plan:
    """A task before it is brought to a length.

    head: the text before the lines. line: the lines of filler by their number. lines: how many there are of them, and
    `least` of which the task needs. needles: what is hidden, and `places`, where: shares of the filler before them.
    question: the end of the prompt. answers: what has to be said, all of it, or any one of it. joint: between lines.
    padding: a text whose beginning fills a rest that is large because the lines are long. chance: that a guess is right
    which knows what an answer looks like and not which is asked for; of the lines of a text, where they decide it.
    """

    head: str
    line: Callable[[int], str]
    needles: Sequence[str]
    places: Sequence[float]
    question: str
    answers: tuple[str, ...]
    lines: int = 1 << 31
    least: int = 0
    joint: str = "\n"
    needed: Literal["all", "any"] = "all"
    padding: str = ""
    chance: Callable[[Sequence[str]], float] = field(default=lambda lines: 0.0)

    @property
    def target(self) -> str:
        """The answer as a text goes on with it, and its line end."""
        said = self.answers if self.needed == "all" else self.answers[:1]
        return f" {_listed(said)}\n"


@dataclass(frozen=True)
class Family:
    """A kind of recall task. has_depth: whether one needle is asked for, whose depth can be chosen.

    plan: makes a task from draws, a length in tokens and, where there is a depth, the share of the text before the
    needle; a depth of None is drawn.
    """

    name: str
    has_depth: bool
    plan: Callable[[Draws, int, float | None], Plan]


def _listed(words: Sequence[str]) -> str:
    return " and ".join([", ".join(words[:-1]), words[-1]]) if len(words) > 1 else words[0]


# Needles in sentences -------------------------------------------------------------------------------------------------

_HEAD = "Some sentences of this text name a code. Remember the codes.\n"


def _needle(name: str, code: str) -> str:
    return f"The code of the {name} is {code}."


def _single(drawn: Draws, length: int, depth: float | None) -> Plan:
    return _asked(drawn, depth, keys=1)


def _multi_key(drawn: Draws, length: int, depth: float | None) -> Plan:
    return _asked(drawn, depth, keys=_KEYS)


def _asked(drawn: Draws, depth: float | None, keys: int) -> Plan:
    """One code is asked for; the others stand anywhere."""
    names, codes, place = _names(drawn, keys), drawn.numbers(keys, DIGITS), _drawn(drawn, depth)
    needles = [_needle(*pair) for pair in zip(names, codes, strict=True)]
    places = [place, *(drawn.share() for _ in names[1:])]
    question = f"\nWhat is the code of the {names[0]}? The code of the {names[0]} is"
    chance = 1 / keys if keys > 1 else 1 / (9 * 10 ** (DIGITS - 1))
    return Plan(_HEAD, _filler(drawn), needles, places, question, (codes[0],), chance=lambda lines: chance)


def _multi_value(drawn: Draws, length: int, depth: float | None) -> Plan:
    [name], codes = _names(drawn, 1), drawn.numbers(_VALUES, DIGITS)
    needles = [_needle(name, code) for code in codes]
    question = f"\nWhat are all the codes of the {name}? The codes of the {name} are"
    return Plan(_HEAD, _filler(drawn), needles, _anywhere(drawn, _VALUES), question, tuple(codes))


def _multi_query(drawn: Draws, length: int, depth: float | None) -> Plan:
    names, codes = _names(drawn, _QUERIES), drawn.numbers(_QUERIES, DIGITS)
    needles = [_needle(*pair) for pair in zip(names, codes, strict=True)]
    asked = _listed([f"the {name}" for name in names])
    question = f"\nWhat are the codes of {asked}? In this order, the codes are"
    return Plan(_HEAD, _filler(drawn), needles, _anywhere(drawn, _QUERIES), question, tuple(codes))


def _names(drawn: Draws, count: int) -> list[str]:
    names = Names(drawn.below(1 << 62), 2)
    return [names[number] for number in range(count)]


def _filler(drawn: Draws) -> Callable[[int], str]:
    key = drawn.below(1 << 62)
    return lambda number: sentence(key, number)


def _drawn(drawn: Draws, depth: float | None) -> float:
    return drawn.share() if depth is None else depth


def _anywhere(drawn: Draws, count: int) -> list[float]:
    return sorted(drawn.share() for _ in range(count))


# Lines of their own form ----------------------------------------------------------------------------------------------


def _key_value(drawn: Draws, length: int, depth: float | None) -> Plan:
    """Nothing but pairs, each on a line; the key of one of them stands once more at the end."""
    names, key = Names(drawn.below(1 << 62), 1 if length <= SHORT_TEXT else 2), drawn.below(1 << 62)

    def value(number: int) -> str:
        return Draws(key, number).one(ADJECTIVES)

    answer, question = value(0), f"\n\n{names[0]}:"
    return Plan(
        "",
        lambda number: f"{names[number + 1]}: {value(number + 1)}",
        [f"{names[0]}: {answer}"],
        [_drawn(drawn, depth)],
        question,
        (answer,),
        lines=len(names) - 1,
        chance=lambda lines: sum(line.endswith(f": {answer}") for line in lines) / len(lines),
    )


def _copy(drawn: Draws, length: int, depth: float | None) -> Plan:
    """A line of words to be written once more."""
    words = " ".join(drawn.several((*NOUNS, *ADJECTIVES), _COPIED))
    needle, question = f"Copy this line: {words}", "\nThe line to copy:"
    return Plan("", _filler(drawn), [needle], [_drawn(drawn, depth)], question, (words,))


def _variables(drawn: Draws, length: int, depth: float | None) -> Plan:
    """Two chains of variables, each of which takes the value of the one before it; all of one chain are asked for."""
    size = (2 if length <= SHORT_TEXT else 4) + 1
    names = ["".join(_LETTERS[code // 26**place % 26] for place in range(3)) for code in _codes(drawn, 2 * size)]
    values, needles, places = drawn.numbers(2, DIGITS), list[str](), list[float]()
    for chain, value in zip((names[:size], names[size:]), values, strict=True):
        needles += [f"{name} = {source}" for name, source in zip(chain, [value, *chain], strict=False)]
        places += _anywhere(drawn, size)
    question = f"\nWhich variables have the value {values[0]}? The variables with the value {values[0]} are"
    return Plan("", _filler(drawn), needles, places, question, tuple(names[:size]))


def _codes(drawn: Draws, count: int) -> list[int]:
    return drawn.several(range(26**3), count)


# Counting words -------------------------------------------------------------------------------------------------------


def _common(drawn: Draws, length: int, depth: float | None) -> Plan:
    """A list of words of which five stand there eight times, and all others once."""
    words, order = drawn.several(NOUNS, _COMMON), _others(drawn)
    question = f"\nWhich {_COMMON} words come most often in this list? The words are"
    needles = [word for word in words for _ in range(_TIMES)]
    places = [drawn.share() for _ in needles]
    return Plan(_LIST, order.__getitem__, needles, places, question, tuple(words), len(order), joint=" ")


def _frequent(drawn: Draws, length: int, depth: float | None) -> Plan:
    """A list of words of which three make 40, 30 and 20 % of it."""
    words, order, key = drawn.several(NOUNS, 3), _others(drawn), drawn.below(1 << 62)

    def line(number: int) -> str:
        block, place = divmod(number, len(_BLOCK))
        first, step = divmod(draws.key(key, block), len(_STEPS))
        kind = _BLOCK[(first + place * _STEPS[step]) % len(_BLOCK)]
        return order[block] if kind == len(words) else words[kind]

    question = "\nWhich 3 words come most often in this list? The words are"
    lines = len(order) * len(_BLOCK)
    return Plan(_LIST, line, [], [], question, tuple(words), lines, len(_BLOCK), joint=" ")


_LIST = "A list of words, some of which come more often than others:\n"


class _Compounds(Names):
    """Words of a noun and an adjective in one, which no other list has."""

    def __getitem__(self, place: int) -> str:
        return super().__getitem__(place).replace(" ", "-")


def _others(drawn: Draws) -> _Compounds:
    return _Compounds(drawn.below(1 << 62), 2)


FAMILIES = {
    family.name: family
    for family in (
        Family("single", True, _single),
        Family("multi-key", True, _multi_key),
        Family("multi-value", False, _multi_value),
        Family("multi-query", False, _multi_query),
        Family("variables", False, _variables),
        Family("common-words", False, _common),
        Family("frequent-words", False, _frequent),
        Family("key-value", True, _key_value),
        Family("copy", True, _copy),
    )
}
RULER = tuple(FAMILIES)[:7]
"""The families of RULER that need no data; its questions are `questions.py`."""


def family_of(name: str) -> Family:
    """The family of a name. Raises UserError for another."""
    if name not in FAMILIES:
        raise UserError(f"family = {shown(name)}: use one of {', '.join(FAMILIES)}")
    return FAMILIES[name]
